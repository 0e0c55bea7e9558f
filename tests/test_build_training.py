"""Training inside a builder: in cycles, stopped and resumed, with shared teacher outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import make_device
from tiny_workload import workload
from torch import Tensor, nn

from autocompress import Split
from autocompress.bank import Bank
from autocompress.build import Builder, Stopwatch
from autocompress.config import CalibrationSettings
from autocompress.errors import OutOfTimeError, PlanError
from autocompress.export.exporter import Exporter
from autocompress.graph import trace
from autocompress.plan import Decision, Plan, Step
from autocompress.recover import Watch
from autocompress.recover.teacher import TeacherOutputs
from autocompress.techniques import NETWORK
from autocompress.techniques.codebook import Codebook
from autocompress.techniques.codebook_tuning import TuneCodebooks
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.precision import Precision
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover, cycle_epochs
from autocompress.techniques.weight_prune import WeightPrune

INT8 = Precision(weight_bits=8, activation_bits=8)
HALF = Step("0", FilterPrune(pruning_ratio=0.5))
SPARSE = Step("3", WeightPrune(sparsity=0.5))
# Two steps an epoch: 270 samples are left to train on.
SAMPLES = 300


def new_builder(folder: Path, *, trains: bool = True) -> Builder:
    inputs = torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    data = replace(workload(), train=Split(inputs) if trains else None)
    graph = trace(data.network, data.example_inputs)
    settings = CalibrationSettings(statistics_samples=64, repair_samples=32)
    bank = Bank(data.network, graph, 1, folder / "bank")
    bank.calibrate(data.calibration.inputs, settings)
    exporter = Exporter(data.network, graph, data.example_inputs, data.example_inputs)
    return Builder(data, exporter, bank, make_device(), settings, folder)


def plan(recovery: Decision, *steps: Step) -> Plan:
    return Plan((*steps, Step(NETWORK, recovery)))


class Counter:
    """Counts steps, and says stop at one of them."""

    def __init__(self, stop_at: int = 0) -> None:
        self.steps = 0
        self.watch = Watch(lambda: self.steps == stop_at, self._advance)

    def _advance(self) -> None:
        self.steps += 1


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, others = tensors(one), tensors(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[k], others[k]) for k in mine)


def train(builder: Builder, wanted: Plan) -> tuple[nn.Module, int]:
    """The trained network, and how many steps were done for it."""
    counter = Counter()
    return builder.network(wanted, Stopwatch(), counter.watch).network, counter.steps


def test_every_cycle_is_twice_as_long_as_the_one_before_it() -> None:
    decision = Recover(epochs=0.5, cycles=4)
    assert [cycle_epochs(decision, number) for number in range(4)] == [0.5, 1, 2, 4]


@pytest.mark.parametrize(
    ("steps", "rounds"),
    [
        ((HALF,), 1),
        pytest.param((HALF, SPARSE), 1, marks=pytest.mark.slow),
        pytest.param((HALF, SPARSE), 2, marks=pytest.mark.slow),
    ],
)
def test_cycles_go_on_from_disk_and_end_as_those_in_one_go(
    steps: tuple[Step, ...], rounds: int, tmp_path: Path
) -> None:
    def wanted(cycles: int) -> Plan:
        return plan(Recover(epochs=0.5, pruning_rounds=rounds, cycles=cycles), *steps)

    whole, count = train(new_builder(tmp_path / "whole"), wanted(3))
    # A round has at least one step.
    assert count == rounds + 2 + 4
    first, count = train(new_builder(tmp_path / "parts"), wanted(1))
    assert count == rounds
    builder = new_builder(tmp_path / "parts")
    _, count = train(builder, wanted(2))
    assert count == 2
    parts, count = train(builder, wanted(3))
    assert count == 4
    assert equal(whole, parts) and not equal(whole, first)
    for cycles in (1, 2, 3):
        _, count = train(new_builder(tmp_path / "whole"), wanted(cycles))
        assert count == 0
    assert equal(first, train(new_builder(tmp_path / "whole"), wanted(1))[0])
    assert not list((tmp_path / "whole").glob("recovered/*.checkpoint"))
    weight = whole.get_submodule("3").weight
    share = 0.5 if SPARSE in steps else 0.0
    assert float((weight == 0).float().mean()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("wanted", "stops"),
    [
        (plan(Recover(epochs=1, cycles=2), HALF), [1, 4]),
        pytest.param(
            plan(Recover(epochs=2, pruning_rounds=2), SPARSE), [1, 3], marks=pytest.mark.slow
        ),
        (Plan((Step("0", INT8), Step(NETWORK, Qat(epochs=1)))), [1]),
        pytest.param(
            Plan((Step("0", Codebook(code_bits=4)), Step(NETWORK, TuneCodebooks(epochs=1)))),
            [1],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cycles", "rounds", "qat", "codebooks"],
)
def test_a_stopped_build_goes_on_and_makes_the_same_file(
    wanted: Plan, stops: list[int], tmp_path: Path
) -> None:
    whole = new_builder(tmp_path / "whole").build("a", wanted)
    for stop in stops:
        with pytest.raises(OutOfTimeError):
            new_builder(tmp_path / "parts").build("a", wanted, Counter(stop).watch)
        assert not (tmp_path / "parts" / "artifacts" / "a.onnx").exists()
    parts = new_builder(tmp_path / "parts").build("a", wanted)
    assert whole.path.read_bytes() == parts.path.read_bytes()


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many chunks the teacher was run on since the last call."""
    calls = [0]
    compute = TeacherOutputs._compute

    def count(self: TeacherOutputs, number: int) -> None:
        calls[0] += 1
        compute(self, number)

    def since() -> int:
        found, calls[0] = calls[0], 0
        return found

    monkeypatch.setattr(TeacherOutputs, "_compute", count)
    return since


def test_all_trainings_share_the_teachers_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = counted(monkeypatch)
    builder = new_builder(tmp_path)
    train(builder, plan(Recover(epochs=0.5), HALF))
    # Those held out and one batch.
    assert since() == 2
    train(builder, plan(Recover(epochs=2)))
    assert since() == 2
    for again in (builder, new_builder(tmp_path)):
        train(again, plan(Recover(epochs=2, temperature=3), HALF))
        train(again, Plan((Step("0", INT8), Step(NETWORK, Qat(epochs=1)))))
        assert since() == 0
    assert len(list(tmp_path.glob("recovered/teacher-*.safetensors"))) == 1


def test_outputs_are_kept_however_a_training_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = counted(monkeypatch)
    wanted = plan(Recover(epochs=1), HALF)
    with pytest.raises(OutOfTimeError):
        new_builder(tmp_path).build("a", wanted, Counter(1).watch)
    assert since() == 2
    new_builder(tmp_path).build("a", wanted)
    assert since() == 1


def test_seconds_are_known_after_a_training_and_grow_with_its_length(tmp_path: Path) -> None:
    builder = new_builder(tmp_path)
    first, longer = (plan(Recover(epochs=1, cycles=c), HALF) for c in (1, 3))
    assert builder.training_seconds(Plan((HALF,))) == 0
    assert builder.training_seconds(first) is None
    train(builder, first)
    assert builder.training_seconds(first) == 0
    one = builder.training_seconds(plan(Recover(epochs=1, temperature=3), HALF))
    assert one is not None and one > 0
    # The first cycle is there.
    assert builder.training_seconds(longer) == pytest.approx(6 * one)
    dense = builder.training_seconds(plan(Recover(epochs=1)))
    assert dense is not None and dense > one
    both = Plan((*longer.steps, Step("0", INT8)))
    retrained = Plan(
        (*[s for s in both.steps if s.target != NETWORK], Step(NETWORK, Qat(epochs=1)))
    )
    assert builder.training_seconds(retrained) == pytest.approx(one)


def test_without_a_train_split_nothing_can_be_estimated(tmp_path: Path) -> None:
    builder = new_builder(tmp_path, trains=False)
    assert builder.training_seconds(Plan((HALF,))) == 0
    with pytest.raises(PlanError, match="no train split"):
        builder.training_seconds(plan(Recover(epochs=1), HALF))
