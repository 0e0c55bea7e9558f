"""Short distillation of the front's members in rounds: half of them go on after each.

Without training, a network's rank says little about its rank after: members that lost much are
trained first, for they have most to gain. Each round trains twice as long as the one before it and
goes on from its weights (successive halving, Jamieson & Talwalkar 2016, with warm restarts); a
trained network is quantized in the ways of several members, which costs next to nothing beside its
training. Time that is left after the rounds goes to further ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from autocompress.config import Objective
from autocompress.errors import DeviceError, OutOfTimeError
from autocompress.evaluation import Evaluation
from autocompress.plan import Plan, Step
from autocompress.search.front import front_mask, metric_scale, objective_values
from autocompress.search.promotion import FrontGain
from autocompress.search.ranks import rank_correlation
from autocompress.techniques import NETWORK, Stage, consistent, read_plan, technique_of
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover, cycle_epochs

EPOCHS = 0.5
# On few data half an epoch is next to nothing, and restarts after it do harm.
_FEWEST_STEPS, _MOST_EPOCHS = 120, 4.0
ROUNDS = 3
# As many as a `Recover` has cycles.
MOST_ROUNDS = 8
_FEWEST, _MOST = 4, 16
# Members that lost more of the original's metric than this share are beyond recovery.
_LARGEST_LOSS = 0.25
# Nor are those that lost more than this share of what there is to lose.
_LARGEST_SHARE = 0.5
# What the first round leaves of a loss, and a later one, about.
_LEFT_FIRST, _LEFT_LATER = 0.2, 0.5
# A trained network is quantized as so many members are.
_WAYS = 3
# Weights of fewer bits are trained with their rounding.
_FEW_BITS = 4


@final
@dataclass(frozen=True)
class Shape:
    """What is trained: a plan up to its training, with the ways to quantize it afterwards.

    Attributes:
        steps: pruning, decomposition and sparsity.
        metric: of the best member of that shape, before any training.
        ways: steps of quantization, the member's own first; runtimes beside them.
        epochs: of its first round.
    """

    steps: Plan
    metric: float
    ways: tuple[tuple[Plan, str], ...]
    epochs: float = EPOCHS


@final
@dataclass(frozen=True)
class Trained:
    """A shape after a round, and the figures of its files."""

    shape: Shape
    evaluations: tuple[Evaluation, ...]

    @property
    def metric(self) -> float:
        """The best of its files'."""
        return max(e.metric.value for e in self.evaluations)


@final
@dataclass(frozen=True)
class RoundReport:
    """How a round went.

    Attributes:
        epochs: of the round.
        trained: how many shapes were trained.
        gained: mean gain of the metric over the untrained members.
        rank_correlation: Spearman's, of the metric before the round and after it; NaN for fewer
            than three.
    """

    epochs: float
    trained: int
    gained: float
    rank_correlation: float

    def text(self) -> str:
        """One sentence."""
        ranks = (
            ""
            if np.isnan(self.rank_correlation)
            else (f"; rank correlation of the metric before and after {self.rank_correlation:.2f}")
        )
        return (
            f"trained {self.trained} networks for {self.epochs:g} epochs: the metric is "
            f"{self.gained:+.4f} against the untrained ones{ranks}"
        )


Measure = Callable[[Plan, str], Evaluation]


@final
@dataclass(frozen=True)
class Told:
    """What is called while a round goes on.

    Attributes:
        done: after each shape that was trained.
        failed: with the reason why one of a shape's files could not be made.
    """

    done: Callable[[Trained], None]
    failed: Callable[[Exception], None]


def first_epochs(epoch_steps: int) -> float:
    """Epochs of a first round: half of one, or more where an epoch has few steps."""
    return round(min(max(EPOCHS, _FEWEST_STEPS / epoch_steps), _MOST_EPOCHS), 1)


def choose_shapes(
    evaluations: Sequence[Evaluation],
    original: Evaluation,
    objectives: Sequence[Objective],
    count: int,
    chance: float = -np.inf,
    epochs: float = EPOCHS,
) -> list[Shape]:
    """Shapes of the front to train, those that are expected to add most to it first.

    Fewer shapes are the first ones of more.

    Args:
        evaluations: measured on the search split, untrained.
        original: of the original network.
        count: how many at most.
        chance: what a network that does not look at its inputs scores (see `chance_level`).
        epochs: of the first round.
    """
    level = original.metric.value
    worst = level - _LARGEST_LOSS * metric_scale(original, evaluations)
    if chance < level:
        worst = max(worst, level - _LARGEST_SHARE * (level - chance))
    alive = [e for e in evaluations if e.metric.value >= worst]
    if not alive:
        return []
    wanted = _with_metric(objectives)
    costs = wanted[1:]
    best: dict[str, Evaluation] = {}
    for name in costs:
        members = _on_front(alive, ("metric", name))
        for e in sorted(members, key=lambda e: -e.metric.value):
            best.setdefault(_shape_of(e).hash, e)
    members = list(best.values())
    order = by_potential([[e] for e in members], (original, wanted), _LEFT_FIRST, count)
    ways = _ways(_on_front(alive, objectives))
    return [_shape(members[i], ways, epochs) for i in order]


def by_potential(
    groups: Sequence[Sequence[Evaluation]],
    goal: tuple[Evaluation, Sequence[Objective]],
    left: float,
    count: int,
) -> list[int]:
    """Indices of groups of files in the order in which training them is expected to pay.

    Next comes the group that would add most to the front of all files and of those chosen before,
    if training left a share of what its files lose of the metric. Who loses nothing comes last.

    Args:
        goal: the original network's figures, and what the front is of, the metric among it.
        left: the share.
        count: how many at most.
    """
    original, objectives = goal
    known = [e for group in groups for e in group]
    hoped = [[_trained_to(e, original, left) for e in group] for group in groups]
    rest, order = list(range(len(groups))), list[int]()
    while rest and len(order) < count:
        gain = FrontGain(known, original, objectives)
        gains = [max(gain.of(objective_values(e, objectives)) for e in hoped[i]) for i in rest]
        best = rest.pop(int(np.argmax(gains)))
        known += hoped[best]
        order.append(best)
    return order


def _with_metric(objectives: Sequence[Objective]) -> list[Objective]:
    """The metric, which training changes, and the costs; the latency where there are none."""
    costs: list[Objective] = [name for name in objectives if name != "metric"]
    return ["metric", *(costs or ["latency"])]


def _trained_to(evaluation: Evaluation, original: Evaluation, left: float) -> Evaluation:
    """The figures if training left a share of what is lost of the metric."""
    lost = max(original.metric.value - evaluation.metric.value, 0.0)
    value = evaluation.metric.value + (1 - left) * lost
    return replace(evaluation, metric=replace(evaluation.metric, value=value))


def run_round(
    shapes: Sequence[Shape], number: int, measure: Measure, told: Told
) -> tuple[list[Trained], bool]:
    """Train shapes, one after another, and measure their files.

    Args:
        number: of the round, from 0.
        measure: trains, builds and measures a plan in a runtime.
        told: called in between.

    Returns:
        Those that were trained, and whether time was left for all.

    Raises:
        DeviceError: the device is not there any more.
        OSError: this machine fails.
    """
    trained: list[Trained] = []
    for shape in shapes:
        found: list[Evaluation] = []
        for way, runtime in shape.ways:
            try:
                found.append(measure(plan_of(shape, way, number), runtime))
            except OutOfTimeError:
                return trained, False
            except (DeviceError, OSError):
                # The machine's fault, not the plan's.
                raise
            except Exception as reason:
                # Whatever one training does to PyTorch must not end all, on every further call.
                told.failed(reason)
        if found:
            trained.append(Trained(shape, tuple(found)))
            told.done(trained[-1])
    return trained, True


def plan_of(shape: Shape, way: Plan, number: int) -> Plan:
    """The plan of a shape after a round, from 0, quantized in one of its ways."""
    steps = [*shape.steps.steps, Step(NETWORK, Recover(epochs=shape.epochs, cycles=number + 1))]
    steps += way.steps
    if number >= ROUNDS - 1 and _has_few_bits(way):
        steps.append(Step(NETWORK, Qat(epochs=shape.epochs)))
    return consistent(Plan(tuple(steps)))


def retrains(plan: Plan) -> bool:
    """Whether a plan trains anew after its recovery."""
    return bool(plan.of(Qat.technique))


def halve(
    trained: Sequence[Trained], original: Evaluation, objectives: Sequence[Objective]
) -> list[Shape]:
    """The half that goes on: those that are expected to add most to the front."""
    wanted = _with_metric(objectives)
    groups = [t.evaluations for t in trained]
    order = by_potential(groups, (original, wanted), _LEFT_LATER, (len(trained) + 1) // 2)
    return [trained[i].shape for i in order]


def report_round(trained: Sequence[Trained], before: Sequence[float], number: int) -> RoundReport:
    """What a round did to the metric and to the ranks.

    Args:
        before: the metric of each before the round.
    """
    after = [t.metric for t in trained]
    gained = float(np.mean([t.metric - t.shape.metric for t in trained])) if trained else 0.0
    distinct = len(set(before)) > 1 and len(set(after)) > 1
    correlation = rank_correlation(before, after) if len(after) > 2 and distinct else np.nan
    first = trained[0].shape.epochs if trained else EPOCHS
    epochs = cycle_epochs(Recover(epochs=first), number)
    return RoundReport(epochs, len(trained), gained, correlation)


def shapes_for(seconds: float, pace_s: float | None, measuring_s: float = 0.0) -> int:
    """How many shapes all rounds have time for.

    Args:
        seconds: for all rounds.
        pace_s: about what the first round's training of a shape takes; None if not known.
        measuring_s: about what building and measuring a shape's files takes after it.
    """
    if pace_s is None:
        return _MOST
    # Each round trains half as many twice as long.
    measured = sum(0.5**number for number in range(ROUNDS))
    return int(np.clip(seconds / (ROUNDS * pace_s + measured * measuring_s), _FEWEST, _MOST))


def _shape(evaluation: Evaluation, ways: Sequence[tuple[Plan, str]], epochs: float) -> Shape:
    own = (_quantization_of(evaluation), evaluation.runtime)
    others = [way for way in ways if way != own]
    chosen = (own, *others[: _WAYS - 1])
    return Shape(_shape_of(evaluation), evaluation.metric.value, chosen, epochs)


def _ways(members: Sequence[Evaluation]) -> list[tuple[Plan, str]]:
    """How the front's members are quantized, the most common ways first."""
    counts: dict[tuple[str, str], int] = {}
    plans: dict[str, Plan] = {}
    for e in members:
        plan = _quantization_of(e)
        plans[plan.hash] = plan
        counts[plan.hash, e.runtime] = counts.get((plan.hash, e.runtime), 0) + 1
    order = sorted(counts, key=lambda key: (-counts[key], key))
    return [(plans[name], runtime) for name, runtime in order]


def _shape_of(evaluation: Evaluation) -> Plan:
    plan = read_plan(evaluation.plan)
    return Plan(tuple(s for s in plan.steps if technique_of(s.decision).stage < Stage.RECOVER))


def _quantization_of(evaluation: Evaluation) -> Plan:
    plan = read_plan(evaluation.plan)
    kept = (Stage.EQUALIZE, Stage.QUANTIZE)
    return Plan(tuple(s for s in plan.steps if technique_of(s.decision).stage in kept))


def _has_few_bits(way: Plan) -> bool:
    quantized = [s.decision.model_dump() for s in way.steps]
    return any(values.get("weight_bits", 32) <= _FEW_BITS for values in quantized)


def _on_front(
    evaluations: Sequence[Evaluation], objectives: Sequence[Objective]
) -> list[Evaluation]:
    mask = front_mask(evaluations, objectives)
    return [e for e, on in zip(evaluations, mask, strict=True) if on]
