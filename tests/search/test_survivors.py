from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autocompress.device import load_profile
from autocompress.errors import DeviceError, ExportError, MeasurementError, OutOfTimeError
from autocompress.evaluation import Evaluation
from autocompress.plan import Decision, Plan, Step
from autocompress.search.progress import Silent
from autocompress.search.space import Parameter, Space
from autocompress.search.study import Sampling, Study
from autocompress.search.survivors import (
    MOST_ROUNDS,
    RoundReport,
    Shape,
    Told,
    Trained,
    choose_shapes,
    first_epochs,
    halve,
    plan_of,
    report_round,
    run_round,
    shapes_for,
)
from autocompress.search.training import SurvivorTraining
from autocompress.techniques import NETWORK, Stage, read_plan
from autocompress.techniques.equalize import Equalize
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.precision import Precision
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover

OBJECTIVES = ("metric", "latency")
INT8 = Precision(weight_bits=8, activation_bits=8)
INT4 = Precision(weight_bits=4, activation_bits=32)
INT2 = Precision(weight_bits=2, activation_bits=32)
Make = Callable[..., Evaluation]
UNTOLD = Told(lambda _: None, lambda _: None)


def prune(ratio: float) -> list[Step]:
    return [Step("conv", FilterPrune(pruning_ratio=ratio))] if ratio else []


def plan(ratio: float, *quantized: Decision) -> Plan:
    steps = [Step("network" if isinstance(d, Equalize) else "conv", d) for d in quantized]
    return Plan((*prune(ratio), *steps))


def member(
    make: Make, ratio: float, metric: float, speedup: float, *quantized: Decision, runtime: str = ""
) -> Evaluation:
    wanted = plan(ratio, *quantized)
    name = wanted.hash + (f"@{runtime}" if runtime else "")
    return make(name, metric, speedup, plan=wanted)


def shape(ratio: float, metric: float = 0.8, *ways: Plan) -> Shape:
    return Shape(Plan(tuple(prune(ratio))), metric, tuple((w, "onnxruntime") for w in ways))


def trained(make: Make, number: int, *figures: tuple[float, float]) -> Trained:
    found = tuple(make(f"{number}-{i}", m, s) for i, (m, s) in enumerate(figures))
    return Trained(shape(number / 100), found)


def test_shapes_come_from_the_front_and_carry_its_ways(make_evaluation: Make) -> None:
    make = make_evaluation
    found = choose_shapes(
        [
            member(make, 0.2, 0.88, 1.5),
            member(make, 0.2, 0.87, 3.0, INT8),
            member(make, 0.5, 0.80, 4.0, INT8),
            member(make, 0.6, 0.79, 2.0, INT8),  # dominated
            member(make, 0.7, 0.60, 9.0, INT8),  # lost more than a quarter
        ],
        make("original", 0.9, 1.0),
        OBJECTIVES,
        count=8,
    )
    assert [len(s.steps.steps) for s in found] == [1, 1]
    by_ratio = {s.steps.steps[0].decision: s for s in found}
    mild, strong = (by_ratio[FilterPrune(pruning_ratio=r)] for r in (0.2, 0.5))
    # The best member of a shape stands for it; its own way comes first, then the common ones.
    assert mild.metric == pytest.approx(0.88)
    assert [w.hash for w, _ in mild.ways] == [Plan().hash, plan(0, INT8).hash]
    assert strong.metric == pytest.approx(0.80)
    assert [w.hash for w, _ in strong.ways] == [plan(0, INT8).hash, Plan().hash]


def test_shapes_come_in_the_order_of_what_training_them_may_add(make_evaluation: Make) -> None:
    """Eleven members, a tenth faster each: fewer shapes are the first ones of more."""
    members = [member(make_evaluation, 0.05 * i + 0.01, 0.9 - 0.01 * i, 1.1**i) for i in range(11)]
    original = make_evaluation("original", 0.9, 1.0)
    every = choose_shapes(members, original, OBJECTIVES, count=20)
    assert len(every) == 11
    for count in (1, 3, 7):
        few = choose_shapes(members, original, OBJECTIVES, count)
        assert [s.steps.hash for s in few] == [s.steps.hash for s in every[:count]]
    # The fastest has most to gain; the one that lost nothing has nothing to gain.
    assert every[0].metric == pytest.approx(0.8)
    assert every[-1].metric == pytest.approx(0.9)
    assert choose_shapes([], original, OBJECTIVES, count=3) == []
    # Half-way to what a network without any knowledge scores.
    able = choose_shapes(members, original, OBJECTIVES, 20, chance=0.81)
    assert min(s.metric for s in able) == pytest.approx(0.86)
    assert len(choose_shapes(members, original, OBJECTIVES, 20, chance=0.95)) == 11
    worthless = [member(make_evaluation, 0.9, 0.1, 50.0)]
    assert choose_shapes(worthless, original, OBJECTIVES, count=3) == []


def test_an_original_that_scores_zero_has_survivors(make_evaluation: Make) -> None:
    """A quarter of what the worst one loses may be lost."""
    lost = (0.01, 0.1, 0.3, 2.0)
    members = [member(make_evaluation, 0.1 + x / 4, -x, 1 + x) for x in lost]
    found = choose_shapes(members, make_evaluation("original", 0.0, 1.0), OBJECTIVES, count=8)
    assert sorted(s.metric for s in found) == [-0.3, -0.1, -0.01]


def test_what_another_one_will_outdo_is_not_trained_first(make_evaluation: Make) -> None:
    """Three that are about alike, and one apart: of two, one of the three and the one apart."""
    alike = [
        member(make_evaluation, 0.5 + 0.01 * i, 0.82 - 1e-3 * i, 8 + 0.01 * i) for i in range(3)
    ]
    apart = member(make_evaluation, 0.2, 0.87, 3.0)
    original = make_evaluation("original", 0.9, 1.0)
    first, second = choose_shapes([*alike, apart], original, OBJECTIVES, count=2)
    assert first.metric == pytest.approx(0.82, abs=3e-3)
    assert second.metric == pytest.approx(0.87)


def test_every_cost_gets_its_share_and_no_shape_comes_twice(make_evaluation: Make) -> None:
    def sized(ratio: float, metric: float, speedup: float, size: int) -> Evaluation:
        steps = Plan(tuple(prune(ratio)))
        return make_evaluation(steps.hash, metric, speedup, plan=steps, file_bytes=size)

    members = [
        sized(0.1, 0.89, 2.0, 900), sized(0.2, 0.85, 8.0, 900),
        sized(0.3, 0.88, 1.0, 400), sized(0.4, 0.84, 1.0, 100),
    ]  # fmt: skip
    original = make_evaluation("original", 0.9, 1.0)
    objectives = ("metric", "latency", "file_bytes")
    found = choose_shapes(members, original, objectives, count=4)
    ratios = {s.steps.steps[0].decision.model_dump()["pruning_ratio"] for s in found}
    assert len(found) == len(ratios) <= 4
    assert {0.2, 0.4} <= ratios


def test_runtimes_are_ways_too(make_evaluation: Make) -> None:
    members = [
        member(make_evaluation, 0.2, 0.88, 2.0, INT8),
        member(make_evaluation, 0.5, 0.85, 4.0, INT8, runtime="openvino"),
        member(make_evaluation, 0.6, 0.84, 5.0, INT8, runtime="openvino"),
    ]
    found = choose_shapes(members, make_evaluation("original", 0.9, 1.0), OBJECTIVES, count=8)
    assert {round(s.metric, 2): [runtime for _, runtime in s.ways] for s in found} == {
        0.84: ["openvino", "onnxruntime"],
        0.85: ["openvino", "onnxruntime"],
        0.88: ["onnxruntime", "openvino"],
    }


def test_plans_of_a_round() -> None:
    shrunk = shape(0.5)
    first = plan_of(shrunk, plan(0, INT8), 0)
    assert [s.decision for s in first.steps if s.target == "conv"] == [
        FilterPrune(pruning_ratio=0.5), INT8
    ]  # fmt: skip
    recover = [s.decision for s in first.steps if s.target == NETWORK]
    assert recover == [Recover(epochs=0.5, cycles=1)]
    third = plan_of(shrunk, plan(0, INT8), 2)
    assert Recover(epochs=0.5, cycles=3) in [s.decision for s in third.steps]
    # Rounding to few bits is trained in the last round only, where there are such weights.
    trains = [
        any(isinstance(s.decision, Qat) for s in plan_of(shrunk, plan(0, way), number).steps)
        for way in (INT8, INT4)
        for number in range(3)
    ]
    assert trains == [False, False, False, False, False, True]
    # Equalization serves quantization only.
    alone = plan_of(shrunk, Plan((Step(NETWORK, Equalize(iterations=2)),)), 0)
    assert not any(isinstance(s.decision, Equalize) for s in alone.steps)


def test_a_round_measures_every_way_of_every_shape(make_evaluation: Make) -> None:
    shapes = [shape(0.2, 0.8, Plan(), plan(0, INT8)), shape(0.5, 0.8, plan(0, INT8))]
    asked: list[str] = []
    done: list[Trained] = []
    reasons: list[Exception] = []

    def measure(wanted: Plan, runtime: str) -> Evaluation:
        asked.append(wanted.hash)
        return make_evaluation(wanted.hash, 0.8 + 0.01 * len(asked), 2.0, plan=wanted)

    found, whole = run_round(shapes, 1, measure, Told(done.append, reasons.append))
    assert whole
    assert asked == [plan_of(s, way, 1).hash for s in shapes for way, _ in s.ways]
    assert found == done
    assert not reasons
    assert [t.shape for t in found] == shapes
    assert [len(t.evaluations) for t in found] == [2, 1]
    assert found[0].metric == pytest.approx(0.82)


def test_a_round_without_time_keeps_what_is_whole(make_evaluation: Make) -> None:
    """A shape whose ways were not all measured is not compared with the others."""
    both = (Plan(), plan(0, INT8))
    shapes = [shape(r, 0.8, *both) for r in (0.2, 0.4, 0.6)]
    asked: list[str] = []

    def measure(wanted: Plan, runtime: str) -> Evaluation:
        asked.append(wanted.hash)
        if len(asked) == 4:
            raise OutOfTimeError("Time is up.")
        return make_evaluation(wanted.hash, 0.8, 2.0, plan=wanted)

    found, whole = run_round(shapes, 0, measure, UNTOLD)
    assert not whole
    assert [t.shape for t in found] == shapes[:1]
    assert len(asked) == 4


@pytest.mark.parametrize(
    "error",
    [ExportError("bad"), MeasurementError("bad"), IndexError("bad"), torch.OutOfMemoryError("bad")],
)
def test_a_file_that_fails_ends_no_round(make_evaluation: Make, error: Exception) -> None:
    shapes = [shape(0.2, 0.8, Plan(), plan(0, INT8)), shape(0.5, 0.8, plan(0, INT8))]

    def measure(wanted: Plan, runtime: str) -> Evaluation:
        if any(s.decision == INT8 for s in wanted.steps):
            raise error
        return make_evaluation(wanted.hash, 0.8, 2.0, plan=wanted)

    reasons: list[Exception] = []
    found, whole = run_round(shapes, 0, measure, Told(lambda _: None, reasons.append))
    assert whole
    assert [t.shape for t in found] == shapes[:1]
    assert len(found[0].evaluations) == 1
    assert reasons == [error, error]


@pytest.mark.parametrize("error", [OSError("It is gone."), DeviceError("It is gone.")])
def test_a_device_that_is_gone_ends_the_round(error: Exception) -> None:
    def measure(wanted: Plan, runtime: str) -> Evaluation:
        raise error

    with pytest.raises(type(error), match="gone"):
        run_round([shape(0.2, 0.8, Plan())], 0, measure, UNTOLD)


def test_those_with_most_to_gain_go_on(make_evaluation: Make) -> None:
    make, original = make_evaluation, make_evaluation("original", 0.9, 1.0)
    some = [
        trained(make, 1, (0.90, 2.0)),  # lost nothing
        trained(make, 2, (0.88, 6.0)),
        trained(make, 3, (0.80, 5.0)),  # far behind 2
        trained(make, 4, (0.86, 9.0)),
    ]
    assert {id(s) for s in halve(some, original, OBJECTIVES)} == {
        id(some[1].shape), id(some[3].shape)
    }  # fmt: skip
    assert len(halve(some[:3], original, OBJECTIVES)) == 2
    assert halve(some[:1], original, OBJECTIVES) == [some[0].shape]
    assert halve([], original, OBJECTIVES) == []


@pytest.mark.parametrize("objectives", [("latency", "metric"), ("latency",), ("metric",)])
def test_halving_in_any_objectives(make_evaluation: Make, objectives: Any) -> None:
    original = make_evaluation("original", 0.95, 1.0)
    some = [
        trained(make_evaluation, 1, (0.90, 4.0), (0.5, 1.0)),
        trained(make_evaluation, 2, (0.60, 2.0)),
    ]
    assert halve(some, original, objectives) == [some[0].shape]
    assert halve(some[::-1], original, objectives) == [some[0].shape]


def test_a_shape_counts_by_its_best_file(make_evaluation: Make) -> None:
    """The second is behind the first one in float, and far ahead in integers."""
    original = make_evaluation("original", 0.9, 1.0)
    some = [
        trained(make_evaluation, 1, (0.80, 2.0)),
        trained(make_evaluation, 2, (0.79, 1.0), (0.78, 8.0)),
        trained(make_evaluation, 3, (0.79, 1.9)),
    ]
    assert halve(some, original, OBJECTIVES)[0] is some[1].shape


def test_a_report_in_closed_form(make_evaluation: Make) -> None:
    some = [trained(make_evaluation, i, (m, 2.0)) for i, m in enumerate((0.85, 0.83, 0.87))]
    report = report_round(some, [0.7, 0.6, 0.65], 1)
    assert (report.epochs, report.trained) == (1.0, 3)
    assert report.gained == pytest.approx(0.05)
    # Ranks 3 1 2 and 2 1 3: rho is 1 - 6 * (1 + 0 + 1) / (3 * 8).
    assert report.rank_correlation == pytest.approx(0.5)
    assert "trained 3 networks for 1 epochs" in report.text()
    assert "+0.0500" in report.text()
    assert "0.50" in report.text()
    few = report_round(some[:2], [0.7, 0.6], 0)
    assert math.isnan(few.rank_correlation)
    assert "rank" not in few.text()
    assert math.isnan(report_round(some, [0.7, 0.7, 0.7], 0).rank_correlation)
    assert report_round([], [], 2) == RoundReport(2.0, 0, 0.0, pytest.approx(math.nan, nan_ok=True))


def test_how_many_shapes_there_is_time_for() -> None:
    assert shapes_for(1.0, None) == 16
    # Three rounds of half an epoch's cost for each shape at first.
    assert shapes_for(90.0, 3.0) == 10
    # Their files take 1 + 1/2 + 1/4 times as long as those of the first round.
    assert shapes_for(90.0, 3.0, 4.0) == 5
    assert shapes_for(1.0, 3.0) == 4
    assert shapes_for(1e6, 3.0) == 16


def test_few_data_are_seen_more_often() -> None:
    assert first_epochs(1000) == first_epochs(240) == 0.5
    assert first_epochs(60) == 2.0
    assert first_epochs(1) == 4.0
    few = replace(shape(0.5), epochs=2.0)
    last = [s.decision for s in plan_of(few, plan(0, INT4), 2).steps if s.target == NETWORK]
    assert len(last) == 2
    assert Recover(epochs=2.0, cycles=3) in last and Qat(epochs=2.0) in last


class Scene:
    """A search's context whose training takes a second a network and always gains a point."""

    def __init__(self, folder: Path, make: Make, pace: float | None = None) -> None:
        space = Space((Parameter(Stage.PRUNE, "conv", (FilterPrune(pruning_ratio=0.5),)),))
        self.study = Study(folder, space, load_profile("cpu"), OBJECTIVES, Sampling("random", 0))
        self.make, self.pace = make, pace
        self.seconds_of: Callable[[Plan], float | None] = lambda p: self.pace
        self.budget = SimpleNamespace(spent_s=0.0)
        self.built: list[Plan] = []
        self.notes: list[str] = []
        self.saved: list[str] = []
        progress = Silent()
        context: Any = SimpleNamespace(
            objectives=OBJECTIVES, chance=-math.inf, epoch_steps=500, runtimes=("onnxruntime",),
            budget=self.budget,
            progress=SimpleNamespace(
                stage=progress.stage, advance=progress.advance, note=self.notes.append
            ),
            folder=SimpleNamespace(
                path=folder, save_plan=lambda p: self.saved.append(p.hash),
                save_seconds_spent=lambda s: None,
            ),
            evaluator=SimpleNamespace(
                artifact=self._artifact,
                builder=SimpleNamespace(training_seconds=lambda p: self.seconds_of(p)),
            ),
            measure=self._measure,
        )  # fmt: skip
        self.training = SurvivorTraining(
            context, self.study, make("original", 0.9, 1.0), lambda: None
        )

    def _artifact(self, plan: Plan, network: None, watch: Any) -> Plan:
        self.budget.spent_s += 1.0
        if watch.stop():
            raise OutOfTimeError("Time is up.")
        self.built.append(plan)
        return plan

    def _measure(self, artifact: Plan, plan: Plan, runtime: str) -> Any:
        ratio = plan.steps[0].decision.model_dump()["pruning_ratio"]
        found = self.make(plan.hash, 0.9 - 0.1 * ratio, 1 + 4 * ratio, plan=plan)
        return SimpleNamespace(result=lambda: found)


def filled(folder: Path, make: Make, pace: float | None = None, count: int = 6) -> Scene:
    scene = Scene(folder, make, pace)
    for i in range(count):
        ratio = 0.1 * (i + 1)
        scene.study._keep(member(make, ratio, 0.9 - 0.12 * ratio, 1 + 4 * ratio))
    return scene


def rounds_of(plans: list[Plan]) -> list[int]:
    recovers = [d for p in plans for d in [s.decision for s in p.steps] if isinstance(d, Recover)]
    return [d.cycles for d in recovers]


def test_survivors_are_trained_in_rounds_and_kept(tmp_path: Path, make_evaluation: Make) -> None:
    scene = filled(tmp_path, make_evaluation)
    scene.training.run(100.0)
    assert rounds_of(scene.built) == [1] * 6 + [2] * 3 + [3] * 2
    assert len(scene.study.trained) == len(scene.saved) == 11
    reports = json.loads((tmp_path / "survivors.json").read_text())
    assert [r["trained"] for r in reports] == [6, 3, 2]
    assert len(scene.notes) == 3
    for evaluation in scene.study.trained.values():
        assert any(s.target == NETWORK for s in read_plan(evaluation.plan).steps)


def test_what_was_trained_is_not_trained_again(tmp_path: Path, make_evaluation: Make) -> None:
    first = filled(tmp_path, make_evaluation)
    first.training.run(8.5)
    assert rounds_of(first.built) == [1] * 6 + [2] * 2
    again = filled(tmp_path, make_evaluation)
    assert len(again.study.trained) == 8
    again.training.run(100.0)
    assert rounds_of(again.built) == [2] + [3] * 2
    assert len(again.study.trained) == 11


def test_after_a_kill_the_pace_is_taken_of_what_is_not_trained_yet(
    tmp_path: Path, make_evaluation: Make
) -> None:
    """What is on disk takes no time, so it tells nothing of how long the others take."""
    first = filled(tmp_path, make_evaluation, count=9)
    first.training.run(2.5)
    on_disk = {p.hash for p in first.built}
    assert len(on_disk) == 2
    again = filled(tmp_path, make_evaluation, count=9)

    def seconds_of(wanted: Plan) -> float | None:
        if wanted.hash in on_disk:
            return 0.0
        return 30.0 if again.built else None

    again.seconds_of = seconds_of
    # 450 s are three rounds of 30 s for five shapes.
    again.training.run(450.0)
    assert rounds_of(again.built).count(1) == 3
    assert not on_disk & {p.hash for p in again.built}


def test_a_further_round_has_to_leave_time_for_rounding(
    tmp_path: Path, make_evaluation: Make
) -> None:
    """Recoveries take a second, the training of rounding to few bits ten more in each round."""
    built = []
    for name, ways, rounding in (
        ("plain", (), 10.0),
        ("free", (INT4,), 0.0),
        ("few", (INT4,), 10.0),
    ):
        (tmp_path / name).mkdir()
        scene = Scene(tmp_path / name, make_evaluation)
        scene.study._keep(member(make_evaluation, 0.3, 0.86, 2.0, *ways))

        def seconds_of(wanted: Plan, rounding: float = rounding) -> float:
            return 1.0 + rounding * any(isinstance(s.decision, Qat) for s in wanted.steps)

        scene.seconds_of = seconds_of
        # Three rounds take three seconds by the scene's clock.
        scene.training.run(12.0)
        built.append(max(rounds_of(scene.built)))
    assert built == [MOST_ROUNDS, MOST_ROUNDS, 3]


def test_what_is_rounded_already_is_not_counted_again(
    tmp_path: Path, make_evaluation: Make
) -> None:
    scene = Scene(tmp_path, make_evaluation)
    ways = tuple((plan(0, way), "onnxruntime") for way in (INT8, INT4, INT2))
    rounded = replace(shape(0.5), ways=ways)
    last = [plan_of(rounded, way, 2) for way, _ in ways]
    seconds = {last[1].hash: 11.0, last[2].hash: 4.0}
    scene.seconds_of = lambda p: seconds.get(p.hash, 1.0)
    # The recovery's second counts once.
    assert scene.training._paces([rounded], 2) == [1.0 + 10.0 + 3.0]
    assert scene.training._paces([rounded], 1) == [1.0]
    scene.study.keep_trained(make_evaluation(last[1].hash, 0.8, 2.0, plan=last[1]), 0.0)
    assert scene.training._paces([rounded], 2) == [1.0 + 3.0]
    scene.seconds_of = lambda p: None if p == last[2] else 1.0
    assert scene.training._paces([rounded], 2) == [None]


def test_a_slow_training_gets_fewer_shapes(tmp_path: Path, make_evaluation: Make) -> None:
    scene = filled(tmp_path, make_evaluation, pace=30.0, count=9)
    # 450 s are three rounds of 30 s for five shapes.
    scene.training.run(450.0)
    assert rounds_of(scene.built).count(1) == 5


def test_who_was_left_out_for_a_bad_start_is_trained_after_all(
    tmp_path: Path, make_evaluation: Make
) -> None:
    """The first training was disturbed: at its pace there was time for four, in truth for five."""
    scene = filled(tmp_path, make_evaluation, pace=100.0, count=9)
    build = scene.training._context.evaluator.artifact

    def artifact(*arguments: Any) -> Plan:
        scene.pace = 30.0
        return build(*arguments)

    scene.training._context.evaluator.artifact = artifact  # type: ignore[method-assign]
    scene.training.run(450.0)
    assert rounds_of(scene.built).count(1) == 5
    reports = json.loads((tmp_path / "survivors.json").read_text())
    assert [r["trained"] for r in reports][:3] == [5, 3, 2]


def test_time_that_is_left_goes_to_further_rounds(tmp_path: Path, make_evaluation: Make) -> None:
    scene = filled(tmp_path, make_evaluation, pace=1.0)
    scene.training.run(10.5)
    # Seven trainings in three rounds, then one in each; no time for a seventh.
    assert rounds_of(scene.built) == [1] * 4 + [2] * 2 + [3, 4, 5, 6]
    for name in ("whole", "slow"):
        (tmp_path / name).mkdir()
    whole = filled(tmp_path / "whole", make_evaluation, pace=1.0)
    whole.training.run(1000.0)
    assert max(rounds_of(whole.built)) == MOST_ROUNDS
    slow = filled(tmp_path / "slow", make_evaluation, pace=10.0)
    slow.training.run(15.0)
    assert max(rounds_of(slow.built)) == 3


def test_reasons_of_failures_are_told_once(tmp_path: Path, make_evaluation: Make) -> None:
    scene = filled(tmp_path, make_evaluation, count=3)

    def artifact(*arguments: Any) -> Plan:
        raise IndexError("Target 7 is out of bounds.")

    scene.training._context.evaluator.artifact = artifact  # type: ignore[method-assign]
    scene.training.run(100.0)
    reason = "IndexError: Target 7 is out of bounds."
    assert scene.notes == [f"a training of survivors failed: {reason}"]


def test_nobody_to_train(tmp_path: Path, make_evaluation: Make) -> None:
    scene = filled(tmp_path, make_evaluation, count=0)
    scene.training.run(10.0)
    assert not scene.built
    assert not scene.notes
