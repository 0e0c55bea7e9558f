"""Pure statistics of paired latency samples: quiet times, percentiles and bootstrap intervals.

A latency is the *quiet time* of a model: the 2nd percentile of its runs. What disturbs a run on a
shared machine only ever makes it longer, in bursts that last from milliseconds to minutes; low
percentiles hardly see them. On a two-core virtual machine one second of sampling gave ratios with a
standard deviation of 0.18 % by 2nd percentiles and of 0.87 % by medians. No run is thrown away: the
percentiles p50, p95 and p99 are over all of them.

What sampling longer cannot tell is added to the intervals: how far the ratio depends on the
percentile (`disturbance`), and that another process would find other places in memory
(`PLACEMENT`).

The unit of resampling is the *round*: runs within a round share the models' places in memory and
the machine's state and are not independent; the joint resampling of both models keeps what the two
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

FloatArray = npt.NDArray[np.float64]
Rounds = Sequence[Sequence[float]]

QUIET = 0.02
# The half-width of what one process cannot see of its own luck; between idle processes the ratio's
# standard deviation was 0.1 %.
PLACEMENT = 0.0025
_LESS_QUIET = 4 * QUIET
RESAMPLES = 1000
LEVEL = 0.95
# A resample's quiet time lies among the fastest runs, so the rest need not be sorted each time.
_KEPT = 0.5


@final
@dataclass(frozen=True)
class RatioInterval:
    """Quiet times of both models and 95 % intervals of their ratio and of the candidate."""

    baseline_ms: float
    candidate_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    candidate_low_ms: float
    candidate_high_ms: float

    @property
    def half_width(self) -> float:
        """Half the speed-up's interval as a share of the speed-up."""
        return (self.speedup_high - self.speedup_low) / (2 * self.speedup)


def quiet_time(runs: Sequence[float] | FloatArray, share: float = QUIET) -> float:
    """The 2nd percentile of run times, the lower of two neighbours; in the runs' unit."""
    return float(np.quantile(np.asarray(runs, dtype=np.float64), share, method="inverted_cdf"))


def percentiles(rounds: Rounds) -> tuple[float, float, float]:
    """p50, p95 and p99 over all runs of all rounds, in the rounds' unit."""
    p50, p95, p99 = np.percentile(_flat(rounds), (50, 95, 99))
    return float(p50), float(p95), float(p99)


def bootstrap_ratio(
    baseline: Rounds, candidate: Rounds, generator: np.random.Generator
) -> RatioInterval:
    """Bootstrap (Efron 1979) of the ratio of quiet times over jointly resampled rounds.

    The percentile interval is expanded for few rounds: its levels are those at which a t interval
    of as many observations would end (Hesterberg, "What teachers should know about the bootstrap",
    The American Statistician 69, 2015).

    Args:
        baseline: run times in ms, one sequence per round; at least one run each.
        candidate: as many rounds; round i was taken in turn with baseline round i.
        generator: the source of the resamples.

    Raises:
        ValueError: the numbers of rounds differ, there is none, one is empty, or a time is not
            positive and finite.
    """
    count = len(baseline)
    if count != len(candidate) or count == 0:
        raise ValueError(f"paired rounds needed, got {count} and {len(candidate)}")
    for runs in (*baseline, *candidate):
        checked = np.asarray(runs, dtype=np.float64)
        if not checked.size or not np.all(np.isfinite(checked) & (checked > 0)):
            raise ValueError("latencies must be positive and finite, at least one a round")
    draws = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    times = [quiet_time(_flat(side)) for side in (baseline, candidate)]
    resampled = [_resampled_quiet_times(side, draws) for side in (baseline, candidate)]
    tails = expanded_tails(count)
    low, high = np.percentile(resampled[0] / resampled[1], tails)
    candidate_low, candidate_high = np.percentile(resampled[1], tails)
    return RatioInterval(
        baseline_ms=times[0],
        candidate_ms=times[1],
        speedup=times[0] / times[1],
        speedup_low=float(low),
        speedup_high=float(high),
        candidate_low_ms=float(candidate_low),
        candidate_high_ms=float(candidate_high),
    )


def disturbance(baseline: Rounds, candidate: Rounds) -> float:
    """How far the ratio moves from the 2nd to the 8th percentiles, as a share.

    On a quiet machine both are alike; where they differ, the quiet times still hold some of what
    disturbed the runs.
    """
    pair = (_flat(baseline), _flat(candidate))
    ratios = [quiet_time(pair[0], q) / quiet_time(pair[1], q) for q in (QUIET, _LESS_QUIET)]
    return abs(ratios[1] / ratios[0] - 1)


def widened(interval: RatioInterval, share: float) -> RatioInterval:
    """The interval with an independent uncertainty added in quadrature, a share of the values."""

    def ends(value: float, low: float, high: float) -> tuple[float, float]:
        extra = share * value
        below, above = max(value - low, 0.0), max(high - value, 0.0)
        return value - float(np.hypot(below, extra)), value + float(np.hypot(above, extra))

    low, high = ends(interval.speedup, interval.speedup_low, interval.speedup_high)
    candidate = ends(interval.candidate_ms, interval.candidate_low_ms, interval.candidate_high_ms)
    return replace(
        interval,
        speedup_low=low,
        speedup_high=high,
        candidate_low_ms=candidate[0],
        candidate_high_ms=candidate[1],
    )


def relative_drift(rounds: Rounds) -> float:
    """How much slower the last third of the rounds was than the first, as a share; 0 if too few.

    Quiet times are compared, so that a burst of disturbance is no drift.
    """
    third = len(rounds) // 3
    if third < 1:
        return 0.0
    first, last = quiet_time(_flat(rounds[:third])), quiet_time(_flat(rounds[-third:]))
    return last / first - 1


def _flat(rounds: Rounds) -> FloatArray:
    return np.concatenate([np.asarray(runs, dtype=np.float64) for runs in rounds])


def _resampled_quiet_times(rounds: Rounds, draws: npt.NDArray[np.int64]) -> FloatArray:
    """The quiet time of every resample; `draws` says how often it holds each round."""
    runs = _flat(rounds)
    owner = np.repeat(np.arange(len(rounds)), [len(r) for r in rounds])
    order = np.argsort(runs, kind="stable")
    kept = order[: max(1, int(np.ceil(_KEPT * len(order))))]
    wanted = QUIET * (draws @ np.bincount(owner, minlength=len(rounds)))
    reached = np.cumsum(draws[:, owner[kept]], axis=1) >= wanted[:, None]
    first = np.where(reached.any(axis=1), reached.argmax(axis=1), len(kept) - 1)
    return runs[kept[first]]


def expanded_tails(count: int) -> tuple[float, float]:
    """Percentile levels of the interval's ends, in 0 to 100: those of a t interval.

    Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69, 2015.

    Args:
        count: observations that are resampled.
    """
    if count < 2:
        return 0.0, 100.0
    reach = np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 + LEVEL) / 2)
    low = float(100 * ndtr(-reach))
    return low, 100 - low
