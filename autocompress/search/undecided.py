"""Points of the front that cannot be told apart yet: which to measure again, and when to stop.

Two points are told apart once their 95 % intervals no longer overlap. That asks for more than an
interval of their difference would, which pays for looking at many pairs, and again after every
measurement. Each further measurement is of another process, and all of one point are joined.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from autocompress.config import Objective
from autocompress.device import DeviceProfile
from autocompress.evaluation import Evaluation, Repeat
from autocompress.measure.measurement import CONFIDENCE_SIGMAS, Measurement
from autocompress.measure.statistics import PLACEMENT
from autocompress.pareto import undecided_pairs
from autocompress.search.front import MAXIMISE, objective_ends, objective_values

# What is measured with an interval; all other objectives count as exact.
UNCERTAIN: tuple[Objective, ...] = ("latency", "energy")
_MOST_MEASUREMENTS = 8


@final
@dataclass(frozen=True)
class Precision:
    """When measuring a point again ends, though it is not told apart from another one.

    Attributes:
        floors: by objective, the half-width below which a joined interval shrinks no further, as a
            share of the value: what all processes have in common does not average out.
        most_measurements: of one point, the first one included.
    """

    floors: Mapping[Objective, float]
    most_measurements: int = _MOST_MEASUREMENTS

    @staticmethod
    def of(profile: DeviceProfile) -> Precision:
        """Half of what a final measurement aims at, or of the luck of one process if that is more.

        At the least this is what four processes without any other uncertainty come to.
        """
        latency = max(profile.measuring.final_target_half_width, PLACEMENT) / 2
        energy = max(profile.energy.target_half_width, PLACEMENT) / 2
        return Precision({"latency": latency, "energy": energy})


@final
@dataclass(frozen=True)
class Pair:
    """Two points of which it is not known whether one dominates the other.

    Attributes:
        first: index of a point.
        second: index of another point, larger than `first`.
        overlaps: by objective whose intervals overlap, for how long, as a share of the value.
    """

    first: int
    second: int
    overlaps: Mapping[Objective, float] = field(default_factory=dict)

    @property
    def overlap(self) -> float:
        """The longest overlap."""
        return max(self.overlaps.values(), default=0.0)


def find_pairs(points: Sequence[Evaluation], objectives: Sequence[Objective]) -> list[Pair]:
    """Pairs of the front whose order is not decided, the most undecided ones first.

    Args:
        points: judged points with the metric that decides, the search split's.
        objectives: what the search goes by.
    """
    if not points:
        return []
    ends = [objective_ends(p, objectives) for p in points]
    low, high = np.array([e[0] for e in ends]), np.array([e[1] for e in ends])
    found = undecided_pairs(low, high, maximise=[MAXIMISE[name] for name in objectives])
    pairs = []
    for first, second in found.tolist():
        overlaps = {}
        for column, name in enumerate(objectives):
            length = min(high[[first, second], column]) - max(low[[first, second], column])
            if name in UNCERTAIN and length >= 0:
                value = min(objective_values(points[i], [name])[0] for i in (first, second))
                overlaps[name] = float(length / value)
        pairs.append(Pair(first, second, overlaps))
    return sorted(pairs, key=lambda pair: -pair.overlap)


def next_point(
    points: Sequence[Evaluation],
    objectives: Sequence[Objective],
    precision: Precision,
    failed: Collection[str] = (),
) -> int | None:
    """Index of the point to measure again; None if all is decided or as precise as it gets.

    Of the most undecided pair that can still be decided it is the point whose variance falls the
    most per second of measuring.

    Args:
        points: judged points with the metric that decides.
        objectives: what the search goes by.
        precision: when to stop.
        failed: names of candidates that are not measured again.
    """
    for pair in find_pairs(points, objectives):
        able = [
            i
            for i in (pair.first, pair.second)
            if points[i].candidate not in failed and _improves(points[i], pair, precision)
        ]
        if able:
            return max(able, key=lambda i: _gain(points[i], pair, precision))
    return None


def repeat_s(point: Evaluation) -> float:
    """About how many seconds measuring a point again takes: as the slowest time before."""
    return max(single.seconds for single in point.single_measurements)


def join(evaluation: Evaluation, again: Repeat) -> Evaluation:
    """An evaluation with one more measurement of its latency and energy."""
    singles = (*evaluation.single_measurements, again)
    energies = [single.energy for single in singles if single.energy is not None]
    return replace(
        evaluation,
        latency=joined([single.latency for single in singles]),
        speedup=joined([single.speedup for single in singles]),
        energy=joined(energies) if energies else None,
        repeats=singles,
    )


def joined(singles: Sequence[Measurement]) -> Measurement:
    """The mean of one figure's measurements in several processes, with its 95 % interval.

    Logarithms are averaged by inverse variances. No measurement counts as more precise than one
    process can be. Where measurements differ by more than their intervals explain, the mean's is
    widened by the Birge ratio (R. T. Birge, "The calculation of errors by the method of least
    squares", Physical Review 40, 1932). Untrusted measurements count only if all are.

    Args:
        singles: at least one; positive, of one unit and device.
    """
    used = [single for single in singles if single.trusted] or list(singles)
    if len(used) == 1:
        return used[0]
    logs = np.log([single.value for single in used])
    reaches = np.array([max(single.half_width, PLACEMENT) for single in used])
    deviations = reaches / CONFIDENCE_SIGMAS
    weights = deviations**-2.0
    mean = float((weights * logs).sum() / weights.sum())
    scatter = math.sqrt(float((weights * (logs - mean) ** 2).sum()) / (len(used) - 1))
    reach = CONFIDENCE_SIGMAS * max(1.0, scatter) / math.sqrt(float(weights.sum()))
    ends = (math.exp(mean - reach), math.exp(mean + reach))
    return replace(used[-1], value=math.exp(mean), ci_low=ends[0], ci_high=ends[1])


def describe_pairs(
    points: Sequence[Evaluation], objectives: Sequence[Objective], precision: Precision
) -> str:
    """One sentence on the pairs that are still undecided; empty if there are none."""
    pairs = find_pairs(points, objectives)
    if not pairs:
        return ""
    names = [name for name in UNCERTAIN if any(name in pair.overlaps for pair in pairs)]
    widths = []
    for name in names:
        of_pairs = [pair for pair in pairs if name in pair.overlaps]
        widest = max(_width(points[i], name) for p in of_pairs for i in (p.first, p.second))
        widths.append(f"{name} (±{widest:.2%}, floor ±{precision.floors[name]:.2%})")
    unfinished = sum(
        any(_improves(points[i], pair, precision) for i in (pair.first, pair.second))
        for pair in pairs
    )
    count = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of the front's points"
    early = f"; measuring {unfinished} of them again ended early" if unfinished else ""
    return f"{count} cannot be told apart in {' or '.join(widths)}: both are kept{early}"


def _improves(point: Evaluation, pair: Pair, precision: Precision) -> bool:
    """Whether measuring a point again may still narrow what decides a pair."""
    if len(point.single_measurements) >= precision.most_measurements:
        return False
    return any(_width(point, name) > precision.floors[name] for name in pair.overlaps)


def _gain(point: Evaluation, pair: Pair, precision: Precision) -> float:
    """By how much the variance falls per second, in units of the floors'.

    One more of n equal measurements takes the share 1 / (n + 1) off the mean's variance.
    """
    variance = sum((_width(point, name) / precision.floors[name]) ** 2 for name in pair.overlaps)
    count = len(point.single_measurements)
    return variance / ((count + 1) * max(repeat_s(point), 1e-3))


def _width(point: Evaluation, name: Objective) -> float:
    figure = point.speedup if name == "latency" else point.energy
    return math.inf if figure is None else figure.half_width
