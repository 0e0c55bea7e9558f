"""Networks without some blocks against the same networks made by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import (
    Stacked,
    as_run_here,
    assemble,
    bank_of,
    exporter_of,
    graph_of,
    make_case,
    make_device,
    new_bank,
    run,
)
from torch import Tensor, nn

import autocompress.export.exporter as exporter_module
from autocompress import Split, Workload
from autocompress.bank import stitch
from autocompress.build import Builder, Stopwatch
from autocompress.config import CalibrationSettings
from autocompress.errors import ExportError, PlanError
from autocompress.export.exporter import Exporter
from autocompress.export.observe import run_float
from autocompress.export.quantize import quantize
from autocompress.plan import Decision, Plan, Step
from autocompress.techniques import NETWORK, consistent
from autocompress.techniques.block_drop import BlockDrop
from autocompress.techniques.codebook import Codebook
from autocompress.techniques.codebook_tuning import TuneCodebooks
from autocompress.techniques.equalize import Equalize, equalize
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover

DROP, KEEP = BlockDrop(drop=True), BlockDrop(drop=False)
INT8 = Precision(weight_bits=8, activation_bits=8)
HALF = FilterPrune(pruning_ratio=0.5)


def plan(*steps: tuple[str, Decision]) -> Plan:
    return Plan(tuple(Step(*step) for step in steps))


def drops(*blocks: str) -> Plan:
    return plan(*((block, DROP) for block in blocks))


def by_hand(name: str, gone: Sequence[str]) -> nn.Module:
    """The test network without blocks, by its own means."""
    network = copy.deepcopy(make_case(name).network)
    if name == "residual":
        assert gone == ["block1"]
        network.block1 = nn.Identity()
        return network
    assert isinstance(network, Stacked)
    left = [i for i in range(3) if f"layers.{i}" not in gone]
    network.layers = nn.ModuleList(network.layers[i] for i in left)
    return network


CASES = [
    ("residual", ["block1"]),
    ("stacked", ["layers.1"]),
    ("stacked", ["layers.0", "layers.2"]),
    ("stacked", ["layers.0", "layers.1", "layers.2"]),
]


@pytest.mark.parametrize(("name", "gone"), CASES)
def test_it_is_the_network_without_the_blocks(name: str, gone: list[str]) -> None:
    case = make_case(name)
    stitched = stitch(bank_of(name), drops(*gone))
    expected = run(by_hand(name, gone), case.inputs)
    for one, other in zip(run(stitched.network, case.inputs), expected, strict=True):
        assert torch.equal(one, other)
    assert stitched.kept_channels == {} and stitched.removed == {}


@pytest.mark.parametrize(("name", "gone"), CASES)
def test_its_file_is_that_of_the_network_without_the_blocks(name: str, gone: list[str]) -> None:
    case = make_case(name)
    inputs = [x.numpy() for x in case.inputs]
    floating = exporter_of(name).export(stitch(bank_of(name), drops(*gone)).network)
    assert not floating.fresh and floating.parity <= 1e-4
    expected = run(by_hand(name, gone), case.inputs)
    for one, other in zip(run_float(floating.graph.model, inputs, ()), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-4)
    layers = {x.name for x in graph_of(name).layers if x.name.rpartition(".")[0] not in gone}
    # Weights are called as in the original's file, so that files can be compared layer by layer.
    original = exporter_of(name).export(case.network).graph.sites
    assert floating.graph.sites == {n: site for n, site in original.items() if n in layers}
    assert {site.initializer for site in original.values()} == {f"{n}.weight" for n in original}


def test_each_set_of_blocks_is_exported_once_and_the_last_few_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case("stacked")
    parity = tuple(x[:4] for x in case.inputs)
    exporter = Exporter(case.network, graph_of("stacked"), case.example_inputs, parity)
    made: list[int] = []

    class Counted(exporter_module.Skeleton):  # type: ignore[misc]
        def __init__(self, *args: object) -> None:
            made.append(len(args))
            super().__init__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(exporter_module, "Skeleton", Counted)
    monkeypatch.setattr(exporter_module, "_MOST_SKELETONS", 2)
    bank = bank_of("stacked")

    def export(*gone: str, more: Sequence[tuple[str, Decision]] = ()) -> int:
        network = assemble(bank, Plan((*drops(*gone).steps, *plan(*more).steps))).network
        assert exporter.export(network).parity <= 1e-4
        return len(made)

    assert export() == 0
    assert export("layers.1") == 1
    # Pruned, decomposed and with other weights it is the same graph.
    rank = ("layers.0.down", LowRank(rank_ratio=0.5))
    assert export("layers.1", more=[("layers.0.up", HALF), rank, ("head", INT8)]) == 1
    assert export("layers.2") == 2
    assert export("layers.1") == 2
    assert export("layers.1", "layers.2") == 3
    # The one that was used the longest ago had to go.
    assert export("layers.1") == 3
    assert export("layers.2") == 4


def test_what_its_skeleton_does_not_fit_is_exported_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(*_: object) -> None:
        raise ExportError("no skeleton fits")

    monkeypatch.setattr(exporter_module.Skeleton, "fill", unfit)
    steps = (*drops("layers.1").steps, Step("layers.0.up", LowRank(rank_ratio=0.5)))
    floating = exporter_of("stacked").export(assemble(bank_of("stacked"), Plan(steps)).network)
    assert floating.fresh and floating.parity <= 1e-4
    gone = {"layers.1.up", "layers.1.down", "layers.0.up"}
    layers = {x.name for x in graph_of("stacked").layers} - gone
    assert set(floating.graph.sites) == {*layers, "layers.0.up.0", "layers.0.up.1"}


@pytest.mark.parametrize(("name", "gone"), CASES)
def test_what_is_left_is_quantized(name: str, gone: list[str]) -> None:
    case = make_case(name)
    inputs = [x.numpy() for x in case.inputs]
    steps = [(x.name, as_run_here(INT8)) for x in graph_of(name).layers]
    wanted = consistent(plan(*((block, DROP) for block in gone), *steps))
    left = {x.name for x in graph_of(name).layers if x.name.rpartition(".")[0] not in gone}
    assert set(wanted.of("precision")) == left
    network = assemble(bank_of(name), wanted).network
    file = quantize(exporter_of(name).export(network), inputs, make_device())
    assert len(file.labels) == len(left)
    expected = run(by_hand(name, gone), case.inputs)
    for found, other in zip(run_float(file.model, inputs, ()), expected, strict=True):
        error = float((torch.from_numpy(found) - other).abs().max())
        assert 0 < error <= 0.1 * float(other.abs().max())


def test_a_group_that_runs_through_a_block_is_pruned_in_the_rest() -> None:
    """The stream's channels are those that go without the drop, and so are the weights."""
    case, bank = make_case("residual"), bank_of("residual")
    prune = ("stem+1", FilterPrune(pruning_ratio=0.5, refit=False))
    expected = assemble(bank, plan(prune)).network
    expected.block1 = nn.Identity()
    found = assemble(bank, plan(prune, ("block1", DROP)))
    assert found.network.stem.out_channels == found.network.block2.conv1.in_channels == 4
    assert torch.equal(run(found.network, case.inputs)[0], run(expected, case.inputs)[0])
    assert set(found.kept_channels) == {"bn", "block1.bn2"}
    assert exporter_of("residual").export(found.network).parity <= 1e-4


def test_readers_of_a_pruned_stream_are_refitted_without_the_block() -> None:
    bank = bank_of("residual")
    prune = ("stem+1", HALF)
    whole = assemble(bank, plan(prune)).network
    dropped = assemble(bank, plan(prune, ("block1", DROP))).network
    assert torch.equal(dropped.block2.conv1.weight, whole.block2.conv1.weight)
    plain = assemble(bank, plan(("stem+1", FilterPrune(pruning_ratio=0.5, refit=False)))).network
    assert not torch.equal(dropped.block2.conv1.weight, plain.block2.conv1.weight)


def test_what_stands_in_a_dropped_block_is_void() -> None:
    inner = [
        ("layers.1.up", HALF), ("layers.1.down", LowRank(rank_ratio=0.5)), ("layers.1.up", INT8),
        ("layers.1.down", INT8),
    ]  # fmt: skip
    outer = [("layers.10.up", INT8), ("layers.0.up", HALF), ("embed+3", HALF)]
    assert consistent(plan(*inner, *outer, ("layers.1", DROP))) == plan(*outer, ("layers.1", DROP))
    assert consistent(plan(*inner, ("layers.1", KEEP))) == plan(*inner)
    # Without a layer to quantize there is nothing to prepare for it, nor to train after it.
    training = [(NETWORK, Equalize(iterations=1)), (NETWORK, Qat(epochs=1))]
    assert consistent(plan(*inner, *training, ("layers.1", DROP))) == drops("layers.1")
    assert consistent(plan(*inner, *training)).of("qat")
    assert consistent(plan(*inner, ("layers.1.heads", HALF), ("layers.1", DROP))) == drops(
        "layers.1"
    )


@pytest.mark.parametrize("name", ["residual", "stacked"])
def test_void_steps_make_no_difference_to_a_stitched_network(name: str) -> None:
    bank, block = bank_of(name), graph_of(name).blocks[0]
    layer = block.layers[0]
    wanted = plan(
        (block.name, DROP), (layer, HALF), (layer, LowRank(rank_ratio=0.5)), (layer, INT8)
    )
    assert consistent(wanted) != wanted
    one, other = (assemble(bank, p).network for p in (wanted, consistent(wanted)))
    inputs = make_case(name).inputs
    assert all(map(torch.equal, run(one, inputs), run(other, inputs)))


def test_a_block_that_there_is_not_is_refused() -> None:
    for target in ("layers.3", "plain", "layers.1.up"):
        with pytest.raises(PlanError, match=target) as caught:
            stitch(bank_of("stacked"), drops(target))
        assert "layers.0, layers.1, layers.2" in str(caught.value)


def test_what_is_left_is_equalized() -> None:
    """Channel groups are sought anew, and the outputs stay."""
    case = make_case("residual")
    network = assemble(bank_of("residual"), drops("block1")).network
    before = run(network, case.inputs)[0]
    weight = network.block2.conv2.weight.clone()
    count = equalize(network, graph_of("residual"), case.example_inputs, Equalize(iterations=2))
    assert count > 0 and not torch.equal(network.block2.conv2.weight, weight)
    torch.testing.assert_close(run(network, case.inputs)[0], before, rtol=1e-3, atol=1e-4)


def new_builder(name: str, folder: Path) -> Builder:
    case = make_case(name)

    def split(start: int) -> Split:
        return Split(tuple(x[start : start + 32] for x in case.inputs))

    data = Workload(
        network=case.network,
        example_inputs=case.example_inputs,
        calibration=split(0),
        train=split(0),
        search_split=split(32),
        test_split=split(64),
        metric="agreement",
    )
    settings = CalibrationSettings(statistics_samples=32, repair_samples=16)
    bank = new_bank(name, folder / "bank")
    return Builder(data, exporter_of(name), bank, make_device(), settings, folder)


@pytest.mark.parametrize("name", ["residual", "stacked"])
def test_it_is_trained_quantized_and_built(name: str, tmp_path: Path) -> None:
    """By distillation of outputs and maps, the block's own among them, then with the rounding."""
    builder = new_builder(name, tmp_path)
    block = graph_of(name).blocks[0].name
    layers = [x.name for x in graph_of(name).layers if not x.name.startswith(f"{block}.")]
    mixed = [(n, INT8) for n in layers[:-1]] + [(layers[-1], Codebook(code_bits=4))]
    wanted = plan(
        (block, DROP), *mixed, (NETWORK, Recover(epochs=1, method="response_feature")),
        (NETWORK, Equalize(iterations=1)), (NETWORK, Qat(epochs=1)),
        (NETWORK, TuneCodebooks(epochs=1)),
    )  # fmt: skip
    assert consistent(wanted) == wanted
    network = builder.network(wanted, Stopwatch()).network
    artifact = builder.build("dropped", wanted, network=network)
    assert artifact.details["parity"] <= 1e-4 and len(artifact.details["layers"]) == len(layers)
    untrained = assemble(bank_of(name), drops(block)).network.state_dict()
    trained = network.state_dict()
    assert {k for k in trained if not k.startswith(f"{block}.")} >= set(untrained)
    assert any(not torch.equal(x, trained[k]) for k, x in untrained.items())


def test_norms_are_repaired_after_a_drop(tmp_path: Path) -> None:
    """Their outputs have the moments that they had with the block, on average over channels."""
    case = make_case("residual")
    network = new_builder("residual", tmp_path).network(drops("block1"), Stopwatch()).network

    def moments(of: nn.Module) -> Tensor:
        found: list[Tensor] = []
        handle = of.block2.bn1.register_forward_hook(lambda m, a, output: found.append(output))
        run(of, case.inputs)
        handle.remove()
        return torch.stack([found[0].mean((0, 2, 3)), found[0].std((0, 2, 3))])

    wanted = moments(case.network)
    plain = stitch(bank_of("residual"), drops("block1")).network
    assert float((moments(network) - wanted).norm()) < 0.5 * float((moments(plain) - wanted).norm())


def test_the_blocks_parameters_are_gone() -> None:
    original = make_case("stacked").network
    network = stitch(bank_of("stacked"), drops("layers.1")).network
    gone = sum(p.numel() for p in original.layers[1].parameters())
    counts = [sum(p.numel() for p in n.parameters()) for n in (original, network)]
    assert counts[0] - counts[1] == gone
