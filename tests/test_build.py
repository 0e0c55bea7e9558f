"""From a plan to a file, training and the stock quantizer included."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from networks import make_device
from tiny_workload import workload
from torch import nn

from autocompress.bank import Bank
from autocompress.build import Builder, Stopwatch
from autocompress.config import CalibrationSettings
from autocompress.errors import PlanError
from autocompress.export.coding import decode_model, load_coded
from autocompress.export.exporter import Exporter
from autocompress.graph import trace
from autocompress.plan import Decision, Plan, Step
from autocompress.recover import trainer as trainer_module
from autocompress.techniques import NETWORK
from autocompress.techniques.codebook import Codebook
from autocompress.techniques.codebook_tuning import TuneCodebooks
from autocompress.techniques.entropy_grid import EntropyGrid
from autocompress.techniques.equalize import Equalize
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.precision import Precision
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover
from autocompress.techniques.stock import StockQuantizer
from autocompress.techniques.weight_prune import WeightPrune

LAYERS = ("0", "3", "8")
INT8 = Precision(weight_bits=8, activation_bits=8)
HALF = FilterPrune(pruning_ratio=0.5)


def code(builder, model):
    return builder.start_coding(model, os.sched_getaffinity(0), checked=False).wait()


def everywhere(decision: Decision) -> list[Step]:
    return [Step(layer, decision) for layer in LAYERS]


def whole(decision: Decision) -> list[Step]:
    return [Step(NETWORK, decision)]


def plan(*steps: list[Step]) -> Plan:
    return Plan(tuple(step for each in steps for step in each))


def new_builder(folder: Path) -> Builder:
    data = workload()
    graph = trace(data.network, data.example_inputs)
    settings = CalibrationSettings(statistics_samples=64, repair_samples=32)
    bank = Bank(data.network, graph, 1, folder / "bank")
    bank.calibrate(data.calibration.inputs, settings)
    exporter = Exporter(data.network, graph, data.example_inputs, data.example_inputs)
    return Builder(data, exporter, bank, make_device(), settings, folder)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return new_builder(tmp_path_factory.mktemp("build"))


def outputs(model: Path) -> np.ndarray:
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    x = workload().search_split.inputs[0].numpy()
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize(
    ("steps", "label"),
    [
        (everywhere(INT8), "int8"),
        (everywhere(Precision(weight_bits=4, activation_bits=32)), "storage only"),
        (everywhere(Codebook(code_bits=4)), "storage only"),
        (everywhere(EntropyGrid(step=0.1)), "storage only"),
        (everywhere(INT8) + whole(Equalize(iterations=2)), "int8"),
        (everywhere(INT8) + whole(Qat(epochs=1)), "int8"),
        (everywhere(Codebook(code_bits=4)) + whole(TuneCodebooks(epochs=1)), "storage only"),
        (whole(StockQuantizer(mode="static")), "stock static int8"),
        (whole(StockQuantizer(mode="dynamic")), "stock dynamic int8"),
    ],
    ids=lambda v: v if isinstance(v, str) else "+".join(sorted({s.decision.technique for s in v})),
)
def test_every_way_to_quantize_is_built_and_labelled(
    builder: Builder, steps: list[Step], label: str
) -> None:
    wanted = plan(steps)
    artifact = builder.build(wanted.hash, wanted)
    assert set(artifact.details["layers"].values()) == {label}
    original = builder.build("original", Plan())
    # Repair finds better batch-norm statistics than this network came with.
    assert np.corrcoef(outputs(artifact.path).ravel(), outputs(original.path).ravel())[0, 1] > 0.75


def test_training_brings_a_pruned_network_nearer_and_is_kept(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = plan([Step("0", HALF)])
    trained = plan([Step("0", HALF)], whole(Recover(epochs=8, learning_rate=0.05)))
    original = torch.from_numpy(outputs(builder.build("original", Plan()).path))

    def distance(which: Plan) -> float:
        found = torch.from_numpy(outputs(builder.build(which.hash, which).path))
        return float(
            nn.functional.kl_div(found.log_softmax(1), original.softmax(1), reduction="batchmean")
        )

    before, after = distance(pruned), distance(trained)
    assert after < before

    def refuse(*args: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(trainer_module, "recover_network", refuse)
    quantized = plan(list(trained.steps), everywhere(INT8))
    artifact = builder.build(quantized.hash, quantized)
    assert "recover" not in artifact.seconds
    assert not list((artifact.path.parents[1] / "recovered").glob("*.checkpoint"))


def test_pruning_in_rounds_ends_at_the_wanted_sparsity(builder: Builder) -> None:
    sparse = everywhere(WeightPrune(sparsity=0.8))
    wanted = plan(sparse, whole(Recover(epochs=2, pruning_rounds=2)))
    network = builder.network(wanted, Stopwatch()).network
    for name in LAYERS:
        weight = network.get_submodule(name).weight
        assert float((weight == 0).float().mean()) == pytest.approx(0.8, abs=0.02)


def test_two_builders_make_the_same_file(tmp_path: Path, builder: Builder) -> None:
    wanted = plan([Step("0", HALF)], whole(Recover(epochs=1)), everywhere(INT8))
    files = [b.build(wanted.hash, wanted).path for b in (builder, new_builder(tmp_path))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_container_gives_the_file_and_a_session(builder: Builder) -> None:
    wanted = plan(everywhere(EntropyGrid(step=0.1)))
    model = builder.build(wanted.hash, wanted).path
    size = code(builder, model)
    container = model.with_suffix(".acz")
    assert size == container.stat().st_size < model.stat().st_size
    assert decode_model(container.read_bytes()) == model.read_bytes()
    session = load_coded(container)
    x = workload().search_split.inputs[0].numpy()
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    assert np.array_equal(found, outputs(model))


def test_an_old_container_is_not_taken_for_a_new_file(builder: Builder) -> None:
    one, other = (plan(everywhere(EntropyGrid(step=s))) for s in (0.1, 2.0))
    code(builder, builder.build("same-name", one).path)
    model = builder.build("same-name", other).path
    code(builder, model)
    assert decode_model(model.with_suffix(".acz").read_bytes()) == model.read_bytes()


def test_masks_of_a_pruning_in_rounds_come_back(builder: Builder) -> None:
    wanted = plan(everywhere(WeightPrune(sparsity=0.5)), whole(Recover(epochs=2, pruning_rounds=2)))
    fresh, again = (builder.network(wanted, Stopwatch()).network for _ in range(2))
    for name in LAYERS:
        one, other = fresh.get_submodule(name), again.get_submodule(name)
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.weight_mask, other.weight_mask)
        assert not bool(other.weight[~other.weight_mask].any())


@pytest.mark.parametrize("retrain", [Qat(epochs=1), TuneCodebooks(epochs=1)])
def test_a_training_leaves_layers_of_the_other_kind_alone(
    builder: Builder, retrain: Decision
) -> None:
    wanted = plan([Step("0", INT8), Step("3", Codebook(code_bits=4))], whole(retrain))
    artifact = builder.build(wanted.hash, wanted)
    assert artifact.details["layers"] == {"0": "int8", "3": "storage only"}


def test_a_stock_quantizer_of_no_mode_does_nothing(builder: Builder) -> None:
    idle = plan(whole(StockQuantizer(mode="none", per_channel=False)))
    with pytest.raises(PlanError, match="void"):
        builder.build(idle.hash, idle)


def test_a_killed_build_leaves_its_temporary_files_where_the_next_call_clears(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def stock(self: Builder, model: object, target: Path, options: object) -> None:
        begun.append(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Builder, "_stock", stock)
    quantized = plan(whole(StockQuantizer(mode="dynamic")))
    with pytest.raises(KeyboardInterrupt):
        builder.build(quantized.hash, quantized)
    assert begun[0].parents[1] == builder.path("any").parents[1] / "scratch"


@pytest.mark.parametrize(
    "steps",
    [
        whole(StockQuantizer(mode="static")) + everywhere(INT8),
        whole(Qat(epochs=1)),
        everywhere(INT8) + whole(TuneCodebooks(epochs=1)),
    ],
    ids=["two quantizers", "nothing to train", "no codebook"],
)
def test_plans_with_void_steps_are_refused(builder: Builder, steps: list[Step]) -> None:
    with pytest.raises(PlanError, match="void"):
        builder.build("bad", plan(steps))


def test_sample_inputs_are_those_of_the_repair_and_then_some_of_the_search_split(
    builder: Builder,
) -> None:
    data = workload()
    (inputs,) = builder.sample_inputs
    assert torch.equal(inputs[:32], data.calibration.inputs[0][:32])
    assert torch.equal(inputs[32:], builder.sample.inputs[0])
    # The whole of a small split, in an order that is the same for every builder.
    split = data.search_split.inputs[0]
    assert len(inputs) == 32 + len(split)
    assert {row.sum().item() for row in inputs[32:]} == {row.sum().item() for row in split}
    assert not torch.equal(inputs[32:], split)


def test_two_builders_have_the_same_sample(tmp_path: Path, builder: Builder) -> None:
    assert torch.equal(new_builder(tmp_path).sample_inputs[0], builder.sample_inputs[0])


@pytest.mark.parametrize(
    "steps",
    [
        [Step("0", HALF)],
        everywhere(INT8),
        [Step("0", HALF), *everywhere(Precision(weight_bits=4, activation_bits=32))],
        everywhere(Precision(weight_bits=8, activation_bits=8, granularity="tensor")),
        everywhere(INT8) + whole(Equalize(iterations=2)),
        [Step("0", HALF), *whole(StockQuantizer(mode="static"))],
    ],
    ids=["pruned", "int8", "pruned int4", "folded", "equalized", "stock"],
)
def test_outputs_in_passing_are_those_of_the_finished_network(
    builder: Builder, steps: list[Step]
) -> None:
    tried = builder.network(plan(steps), Stopwatch())
    assert not tried.network.training
    with torch.no_grad():
        expected = tried.network(*builder.sample_inputs)
    assert tried.outputs is not None
    (found,) = tried.outputs
    # They may be in bf16.
    assert float((found - expected).norm()) < 0.03 * float((expected - expected.mean(0)).norm())


def test_networks_that_are_unchanged_or_trained_have_no_outputs(builder: Builder) -> None:
    trained = plan([Step("0", HALF)], whole(Recover(epochs=1)))
    retrained = plan(everywhere(INT8), whole(Qat(epochs=1)))
    for wanted in (Plan(), trained, retrained):
        assert builder.network(wanted, Stopwatch()).outputs is None
