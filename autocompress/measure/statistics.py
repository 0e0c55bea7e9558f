"""Pure statistics of paired latency samples: medians, percentiles and bootstrap intervals.

The unit of resampling is the *block pair*: runs within a block share the machine's state and are
not independent, and the two blocks of a pair share slow drifts, which the joint resampling keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import numpy as np
import numpy.typing as npt

from autocompress.measure.measurement import Measurement

FloatArray = npt.NDArray[np.float64]
Blocks = Sequence[Sequence[float]]

RESAMPLES = 1000
LEVEL = 0.95
MINIMUM_PAIRS = 20


@final
@dataclass(frozen=True)
class RatioInterval:
    """Medians of both models and 95 % intervals of their ratio and of the candidate."""

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


def block_medians(blocks: Blocks) -> FloatArray:
    """The median of each block, shape (blocks,); blocks may differ in length."""
    return np.array([np.median(np.asarray(block, dtype=np.float64)) for block in blocks])


def percentiles(blocks: Blocks) -> tuple[float, float, float]:
    """p50, p95 and p99 over all runs of all blocks, in the blocks' unit."""
    runs = np.concatenate([np.asarray(block, dtype=np.float64) for block in blocks])
    p50, p95, p99 = np.percentile(runs, (50, 95, 99))
    return float(p50), float(p95), float(p99)


def bootstrap_ratio(
    baseline: FloatArray, candidate: FloatArray, generator: np.random.Generator
) -> RatioInterval:
    """Percentile bootstrap (Efron 1979) of the ratio of medians over jointly resampled pairs.

    Args:
        baseline: block medians in ms, shape (pairs,).
        candidate: block medians in ms, shape (pairs,); entry i was taken beside `baseline[i]`.
        generator: the source of the resamples.

    Raises:
        ValueError: the shapes differ, there is no pair, or a time is not positive and finite.
    """
    if baseline.shape != candidate.shape or baseline.ndim != 1 or baseline.size == 0:
        raise ValueError(f"paired medians needed, got shapes {baseline.shape}, {candidate.shape}")
    both = np.stack((baseline, candidate))
    if not np.all(np.isfinite(both) & (both > 0)):
        raise ValueError("latencies must be positive and finite")
    pairs = baseline.size
    draw = generator.integers(pairs, size=(RESAMPLES, pairs))
    resampled = np.median(both[:, draw], axis=2)
    tails = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
    low, high = np.percentile(resampled[0] / resampled[1], tails)
    candidate_low, candidate_high = np.percentile(resampled[1], tails)
    baseline_ms, candidate_ms = np.median(both, axis=1)
    return RatioInterval(
        baseline_ms=float(baseline_ms),
        candidate_ms=float(candidate_ms),
        speedup=float(baseline_ms / candidate_ms),
        speedup_low=float(low),
        speedup_high=float(high),
        candidate_low_ms=float(candidate_low),
        candidate_high_ms=float(candidate_high),
    )


@final
@dataclass(frozen=True)
class Circumstances:
    """Where and how samples were taken.

    Attributes:
        device: the id of the device's fingerprint.
        load_average: one-minute load average of the machine when sampling began.
        clock_mhz: mean clock of the pinned cores when sampling ended; None where not told.
        elapsed_s: how long the sampling took.
        target_half_width: the half-width that was asked for, a share of the speed-up.
    """

    device: str
    load_average: float
    clock_mhz: float | None
    elapsed_s: float
    target_half_width: float


@final
@dataclass(frozen=True)
class PairedLatency:
    """A candidate's latency beside its baseline's, sampled in turn, with every raw sample.

    `baseline_ms` and `candidate_ms` are medians of block medians; `speedup` is their ratio and
    its interval is the 95 % bootstrap interval. The percentiles are taken over all runs.
    """

    baseline_ms: float
    candidate_ms: float
    candidate_low_ms: float
    candidate_high_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    baseline_p50_ms: float
    baseline_p95_ms: float
    baseline_p99_ms: float
    candidate_p50_ms: float
    candidate_p95_ms: float
    candidate_p99_ms: float
    blocks: int
    trusted: bool
    reason: str
    device: str
    load_average: float
    clock_mhz: float | None
    elapsed_s: float
    baseline_samples_ms: tuple[tuple[float, ...], ...]
    candidate_samples_ms: tuple[tuple[float, ...], ...]

    @property
    def half_width(self) -> float:
        """Half the speed-up's interval as a share of the speed-up."""
        return (self.speedup_high - self.speedup_low) / (2 * self.speedup)

    def latency(self) -> Measurement:
        """The candidate's latency in ms as a `Measurement`."""
        ends = (self.candidate_low_ms, self.candidate_high_ms)
        return self._measurement(self.candidate_ms, ends, "ms")

    def ratio(self) -> Measurement:
        """The speed-up over the baseline as a `Measurement`."""
        return self._measurement(self.speedup, (self.speedup_low, self.speedup_high), "ratio")

    def to_dict(self) -> dict[str, Any]:
        """The fields with samples as lists, ready for JSON."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("baseline_samples_ms", "candidate_samples_ms"):
            data[name] = [list(block) for block in data[name]]
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PairedLatency:
        """Read back what `to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        samples = {
            name: tuple(tuple(map(float, block)) for block in data[name])
            for name in ("baseline_samples_ms", "candidate_samples_ms")
        }
        return PairedLatency(**{**data, **samples})

    def _measurement(self, value: float, ends: tuple[float, float], unit: str) -> Measurement:
        return Measurement(
            value, *ends, unit, "measured", self.device, trusted=self.trusted, reason=self.reason
        )


def paired_latency(
    baseline: Blocks, candidate: Blocks, generator: np.random.Generator, where: Circumstances
) -> PairedLatency:
    """Summarise interleaved blocks.

    Args:
        baseline: one sequence of run times in ms per block.
        candidate: as many blocks; block i was taken beside baseline block i.
        generator: the source of the bootstrap's resamples.
        where: device, load and clock, kept beside the figures.

    Raises:
        ValueError: the numbers of blocks differ, or there is none.
    """
    interval = bootstrap_ratio(block_medians(baseline), block_medians(candidate), generator)
    reason = _distrust(interval, len(baseline), where)
    baseline_tail, candidate_tail = percentiles(baseline), percentiles(candidate)
    return PairedLatency(
        baseline_ms=interval.baseline_ms,
        candidate_ms=interval.candidate_ms,
        candidate_low_ms=interval.candidate_low_ms,
        candidate_high_ms=interval.candidate_high_ms,
        speedup=interval.speedup,
        speedup_low=interval.speedup_low,
        speedup_high=interval.speedup_high,
        baseline_p50_ms=baseline_tail[0],
        baseline_p95_ms=baseline_tail[1],
        baseline_p99_ms=baseline_tail[2],
        candidate_p50_ms=candidate_tail[0],
        candidate_p95_ms=candidate_tail[1],
        candidate_p99_ms=candidate_tail[2],
        blocks=len(baseline),
        trusted=not reason,
        reason=reason,
        device=where.device,
        load_average=where.load_average,
        clock_mhz=where.clock_mhz,
        elapsed_s=where.elapsed_s,
        baseline_samples_ms=tuple(tuple(map(float, block)) for block in baseline),
        candidate_samples_ms=tuple(tuple(map(float, block)) for block in candidate),
    )


def _distrust(interval: RatioInterval, pairs: int, where: Circumstances) -> str:
    if pairs < MINIMUM_PAIRS:
        needed = where.elapsed_s * MINIMUM_PAIRS / pairs
        return (
            f"only {pairs} of {MINIMUM_PAIRS} block pairs fitted into the time limit; raise the "
            f"profile's measuring time limit to about {needed:.0f} s"
        )
    if interval.half_width <= where.target_half_width:
        return ""
    # The half-width falls with the square root of the sampling time.
    needed = where.elapsed_s * (interval.half_width / where.target_half_width) ** 2
    return (
        f"after {pairs} block pairs the speed-up is known to ±{interval.half_width:.1%}, the "
        f"target is ±{where.target_half_width:.1%} (load average {where.load_average:.1f}); stop "
        f"other programs on the measuring cores or raise the time limit to about {needed:.0f} s"
    )
