"""`PairedLatency`: a candidate's latency beside its baseline's, and whether it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

from autocompress.measure.measurement import Measurement
from autocompress.measure.sampling import MINIMUM_ROUNDS, Samples, generator_for
from autocompress.measure.statistics import (
    PLACEMENT,
    RatioInterval,
    bootstrap_ratio,
    disturbance,
    percentiles,
    relative_drift,
    widened,
)

# Beyond these the figures may say more of the machine's state than of the models.
_MOST_OTHERS = 0.25
_MOST_DRIFT = 0.10
_MOST_DISTURBANCE = 0.02


@final
@dataclass(frozen=True)
class PairedLatency:
    """A candidate's latency beside its baseline's, sampled in turn, with every raw sample.

    Attributes:
        baseline_ms: the baseline's quiet time (`statistics.quiet_time`).
        candidate_ms: the candidate's; its 95 % interval ends at `candidate_low_ms` and `_high_ms`.
        speedup: their ratio, with its 95 % interval.
        baseline_p50_ms: percentiles are over all runs.
        rounds: how many rounds were taken, each with models loaded anew where that is cheap.
        trusted: whether the figures can be relied on; `reason` says why not, and what to do.
        device: the id of the device's fingerprint.
        load_average: one-minute load average of the machine when sampling began.
        others_share: how much of the measuring cores' time went to other programs; NaN if unknown.
        clock_mhz: mean clock of the measuring cores; None where the system does not tell.
        clock_change: from the first to the last round, as a share; 0 where not told.
        baseline_drift: how much slower the baseline was in the last third than in the first.
        disturbance: how far the ratio depends on the percentile, a share; part of the interval.
        elapsed_s: how long the sampling took.
        baseline_samples_ms: one tuple of runs per round, in order.
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
    rounds: int
    trusted: bool
    reason: str
    device: str
    load_average: float
    others_share: float
    clock_mhz: float | None
    clock_change: float
    baseline_drift: float
    disturbance: float
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
            data[name] = [list(runs) for runs in data[name]]
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PairedLatency:
        """Read back what `to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        samples = {
            name: tuple(tuple(map(float, runs)) for runs in data[name])
            for name in ("baseline_samples_ms", "candidate_samples_ms")
        }
        return PairedLatency(**{**data, **samples})

    def _measurement(self, value: float, ends: tuple[float, float], unit: str) -> Measurement:
        return Measurement(
            value, *ends, unit, "measured", self.device, trusted=self.trusted, reason=self.reason
        )


def paired_latency(
    samples: Samples, device: str, target_half_width: float, seed: int
) -> PairedLatency:
    """Summarise what was sampled.

    Args:
        samples: rounds of both models.
        device: the id of the device's fingerprint.
        target_half_width: the half-width that was asked for, a share of the speed-up.
        seed: of the bootstrap.
    """
    rounds = len(samples.baseline_ms)
    sides = (samples.baseline_ms, samples.candidate_ms)
    sampled = bootstrap_ratio(*sides, generator_for(seed, rounds))
    moved, drift = disturbance(*sides), relative_drift(samples.baseline_ms)
    interval = widened(sampled, math.hypot(moved, PLACEMENT))
    reason = "; ".join(_doubts(sampled, samples, (moved, drift), target_half_width))
    baseline_tail = percentiles(samples.baseline_ms)
    candidate_tail = percentiles(samples.candidate_ms)
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
        rounds=rounds,
        trusted=not reason,
        reason=reason,
        device=device,
        load_average=samples.load_average,
        others_share=samples.others_share,
        clock_mhz=samples.mean_clock_mhz,
        clock_change=samples.clock_change,
        baseline_drift=drift,
        disturbance=moved,
        elapsed_s=samples.elapsed_s,
        baseline_samples_ms=tuple(tuple(map(float, runs)) for runs in samples.baseline_ms),
        candidate_samples_ms=tuple(tuple(map(float, runs)) for runs in samples.candidate_ms),
    )


def _doubts(
    interval: RatioInterval,
    samples: Samples,
    moves: tuple[float, float],
    target_half_width: float,
) -> list[str]:
    """Why the figures cannot be relied on, each with its remedy; empty if they can."""
    disturbed, drift = moves
    doubts, rounds = [], len(samples.baseline_ms)
    if rounds < MINIMUM_ROUNDS:
        needed = samples.elapsed_s * MINIMUM_ROUNDS / rounds
        doubts.append(
            f"only {rounds} of {MINIMUM_ROUNDS} rounds fitted into the time limit; raise the "
            f"profile's measuring time limit to about {needed:.0f} s"
        )
    elif interval.half_width > target_half_width:
        # The half-width falls with the square root of the sampling time.
        needed = samples.elapsed_s * (interval.half_width / target_half_width) ** 2
        doubts.append(
            f"after {rounds} rounds the speed-up is known to ±{interval.half_width:.1%}, the "
            f"target is ±{target_half_width:.1%} (load average {samples.load_average:.1f}); stop "
            f"other programs on the measuring cores or raise the time limit to about {needed:.0f} s"
        )
    if samples.others_share > _MOST_OTHERS:
        doubts.append(
            f"other programs had {samples.others_share:.0%} of the measuring cores' time; stop "
            "them, or give the profile cores of its own"
        )
    if disturbed > _MOST_DISTURBANCE:
        doubts.append(
            f"the speed-up moves by {disturbed:.1%} with how quiet the counted runs are; stop what "
            "else runs on this machine"
        )
    if abs(samples.clock_change) > _MOST_DRIFT:
        doubts.append(
            f"the cores' clock changed by {samples.clock_change:+.0%} meanwhile; fix the clock "
            "(performance governor, no turbo) or let the device cool down"
        )
    if abs(drift) > _MOST_DRIFT:
        doubts.append(
            f"the baseline became {abs(drift):.0%} {'slower' if drift > 0 else 'faster'} "
            "meanwhile; let the device cool down, fix its clock, and stop other programs"
        )
    return doubts
