"""Short distillation of the front's members in rounds: half of them go on after each.

Without training, a network's rank says little about its rank after: members that lost much are
trained too. Each round trains twice as long as the one before it and goes on from its weights
(successive halving, Jamieson & Talwalkar 2016, with warm restarts); a trained network is quantized
in the ways of several members, which costs next to nothing beside its training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.stats import spearmanr

from autocompress.config import Objective
from autocompress.errors import (
    ExportError,
    MeasurementError,
    OutOfTimeError,
    PlanError,
    WorkloadError,
)
from autocompress.evaluate import Evaluation
from autocompress.plan import Plan, Step
from autocompress.search.front import front_mask, objective_values
from autocompress.techniques import NETWORK, Stage, consistent, read_plan, technique_of
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover, cycle_epochs

EPOCHS = 0.5
ROUNDS = 3
_FEWEST, _MOST = 4, 16
# Members that lost more of the original's metric than this share are beyond recovery.
_LARGEST_LOSS = 0.25
# A trained network is quantized as so many members are.
_WAYS = 3
# Weights of fewer bits are trained with their rounding.
_FEW_BITS = 4
_QAT_EPOCHS = 0.5


@final
@dataclass(frozen=True)
class Shape:
    """What is trained: a plan up to its training, with the ways to quantize it afterwards.

    Attributes:
        steps: pruning, decomposition and sparsity.
        metric: of the best member of that shape, before any training.
        ways: steps of quantization, the member's own first; runtimes beside them.
    """

    steps: Plan
    metric: float
    ways: tuple[tuple[Plan, str], ...]


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


def choose_shapes(
    evaluations: Sequence[Evaluation],
    original: Evaluation,
    objectives: Sequence[Objective],
    count: int,
) -> list[Shape]:
    """Shapes to train, spread evenly over the costs of the front.

    Args:
        evaluations: measured on the search split, untrained.
        original: of the original network.
        count: how many at most.
    """
    worst = original.metric.value - _LARGEST_LOSS * abs(original.metric.value)
    alive = [e for e in evaluations if e.metric.value >= worst]
    if not alive:
        return []
    costs = [name for name in objectives if name != "metric"] or ["latency"]
    best: dict[str, Evaluation] = {}
    for name in costs:
        members = _on_front(alive, ("metric", name))
        for e in sorted(members, key=lambda e: -e.metric.value):
            best.setdefault(_shape_of(e).hash, e)
    chosen: list[Evaluation] = []
    for name in costs:
        members = sorted(best.values(), key=lambda e: objective_values(e, (name,))[0])
        places = max(1, count // len(costs))
        picks = _spread([objective_values(e, (name,))[0] for e in members], places)
        chosen += [members[i] for i in picks if members[i] not in chosen]
    ways = _ways(_on_front(alive, objectives))
    return [_shape(e, ways) for e in chosen[:count]]


def run_round(
    shapes: Sequence[Shape], number: int, measure: Measure, done: Callable[[Trained], None]
) -> tuple[list[Trained], bool]:
    """Train shapes, one after another, and measure their files.

    Args:
        number: of the round, from 0.
        measure: trains, builds and measures a plan in a runtime.
        done: called after each shape.

    Returns:
        Those that were trained, and whether time was left for all.
    """
    trained: list[Trained] = []
    for shape in shapes:
        found: list[Evaluation] = []
        for way, runtime in shape.ways:
            try:
                found.append(measure(plan_of(shape, way, number), runtime))
            except OutOfTimeError:
                return trained, False
            except (ExportError, MeasurementError, PlanError, WorkloadError):
                # One file that fails must not end the training of all.
                continue
        if found:
            trained.append(Trained(shape, tuple(found)))
            done(trained[-1])
    return trained, True


def plan_of(shape: Shape, way: Plan, number: int) -> Plan:
    """The plan of a shape after a round, from 0, quantized in one of its ways."""
    steps = [*shape.steps.steps, Step(NETWORK, Recover(epochs=EPOCHS, cycles=number + 1))]
    steps += way.steps
    if number == ROUNDS - 1 and _has_few_bits(way):
        steps.append(Step(NETWORK, Qat(epochs=_QAT_EPOCHS)))
    return consistent(Plan(tuple(steps)))


def halve(trained: Sequence[Trained], objectives: Sequence[Objective]) -> list[Shape]:
    """The half that goes on: shapes with a file on the trained front, then those next to it."""
    count = (len(trained) + 1) // 2
    left = list(trained)
    chosen: list[Trained] = []
    while left and len(chosen) < count:
        files = [(i, e) for i, t in enumerate(left) for e in t.evaluations]
        mask = front_mask([e for _, e in files], objectives)
        on = {i for (i, _), best in zip(files, mask, strict=True) if best}
        layer = [t for i, t in enumerate(left) if i in on]
        # Of a layer that does not fit as a whole, the most accurate: they are what users take.
        layer.sort(key=lambda t: -t.metric)
        chosen += layer[: count - len(chosen)]
        left = [t for t in left if t not in chosen]
    return [t.shape for t in chosen]


def report_round(trained: Sequence[Trained], before: Sequence[float], number: int) -> RoundReport:
    """What a round did to the metric and to the ranks.

    Args:
        before: the metric of each before the round.
    """
    after = [t.metric for t in trained]
    gained = float(np.mean([t.metric - t.shape.metric for t in trained])) if trained else 0.0
    distinct = len(set(before)) > 1 and len(set(after)) > 1
    correlation = (
        float(spearmanr(before, after).statistic) if len(after) > 2 and distinct else np.nan
    )
    epochs = cycle_epochs(Recover(epochs=EPOCHS), number)
    return RoundReport(epochs, len(trained), gained, correlation)


def shapes_for(seconds: float, epoch_s: float | None) -> int:
    """How many shapes all rounds have time for.

    Args:
        seconds: for all rounds.
        epoch_s: about what an epoch of a shape takes; None if not known.
    """
    if epoch_s is None:
        return _MOST
    # Each round trains half as many twice as long.
    return int(np.clip(seconds / (EPOCHS * ROUNDS * epoch_s), _FEWEST, _MOST))


def _shape(evaluation: Evaluation, ways: Sequence[tuple[Plan, str]]) -> Shape:
    own = (_quantization_of(evaluation), evaluation.runtime)
    others = [way for way in ways if way != own]
    return Shape(_shape_of(evaluation), evaluation.metric.value, (own, *others[: _WAYS - 1]))


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


def _spread(costs: Sequence[float], count: int) -> list[int]:
    """Indices of sorted costs that are spread evenly over their logarithm; all if few."""
    if len(costs) <= count:
        return list(range(len(costs)))
    logs = np.log(np.maximum(costs, 1e-12))
    wanted = np.linspace(logs[0], logs[-1], count)
    found: list[int] = []
    for target in wanted:
        order = np.argsort(np.abs(logs - target), kind="stable")
        found.append(next(int(i) for i in order if int(i) not in found))
    return sorted(found)
