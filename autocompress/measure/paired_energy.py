"""`PairedEnergy`: a candidate's energy beside its baseline's, and whether it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from autocompress.device import EnergySettings
from autocompress.measure.energy_statistics import (
    EnergyRatio,
    EnergySamples,
    EnergyStopping,
    bootstrap_energy,
    energies_mj,
    generator_for,
    mean_temperature_c,
    net_of_idle_mj,
    temperature_change_c,
)
from autocompress.measure.measurement import Measurement

MINIMUM_PAIRS = 4
FINAL_MINIMUM_PAIRS = 8
# Beyond these the figures may say more of the machine's state than of the models.
_MOST_OTHER_CORES = 0.2
_MOST_SIDE_DIFFERENCE_C = 3.0
_MOST_CHANGE_C = 10.0


@final
@dataclass(frozen=True)
class PairedEnergy:
    """A candidate's energy per run beside its baseline's, with every window kept.

    A run is one batch of the profile's `batch_size`, as it is for latencies. Energies are all that
    the meter counts while the model runs, the idle device's own part included; the `net` ones,
    beside them, are what is beyond that part.

    Attributes:
        baseline_mj: mean over its windows, with its 95 % interval.
        candidate_mj: likewise.
        saving: the baseline's energy over the candidate's, with its 95 % interval.
        baseline_net_mj: beyond the idle device; it may be below zero if that is lost in noise.
        candidate_net_mj: likewise.
        idle_mw: mean power with both models loaded and none running.
        pairs: how many pairs of windows were taken.
        trusted: whether the figures can be relied on; `reason` says why not, and what to do.
        device: the id of the device's fingerprint.
        baseline_c: mean temperature in degrees Celsius during its windows; None if not told.
        candidate_c: likewise.
        change_c: how much warmer the last third of the windows was than the first.
        samples: all windows, the meter, and the state of the machine.
    """

    baseline_mj: float
    baseline_low_mj: float
    baseline_high_mj: float
    candidate_mj: float
    candidate_low_mj: float
    candidate_high_mj: float
    saving: float
    saving_low: float
    saving_high: float
    baseline_net_mj: float
    candidate_net_mj: float
    idle_mw: float
    pairs: int
    trusted: bool
    reason: str
    device: str
    baseline_c: float | None
    candidate_c: float | None
    change_c: float
    samples: EnergySamples

    @property
    def half_width(self) -> float:
        """Half the saving's interval as a share of the saving."""
        return (self.saving_high - self.saving_low) / (2 * self.saving)

    def energy(self) -> Measurement:
        """The candidate's energy per run in mJ as a `Measurement`."""
        ends = (self.candidate_low_mj, self.candidate_high_mj)
        return self._measurement(self.candidate_mj, ends, "mJ")

    def ratio(self) -> Measurement:
        """The saving over the baseline as a `Measurement`."""
        return self._measurement(self.saving, (self.saving_low, self.saving_high), "ratio")

    def to_dict(self) -> dict[str, Any]:
        """The fields with all windows, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PairedEnergy:
        """Read back what `to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return PairedEnergy(**{**data, "samples": EnergySamples.from_dict(data["samples"])})

    def _measurement(self, value: float, ends: tuple[float, float], unit: str) -> Measurement:
        return Measurement(
            value, *ends, unit, "measured", self.device, trusted=self.trusted, reason=self.reason
        )


def energy_stopping(settings: EnergySettings, final: bool, seed: int) -> EnergyStopping:
    """When sampling ends under a profile's settings.

    Args:
        settings: of the profile.
        final: whether for final results.
        seed: of the bootstrap and of the gaps between windows.
    """
    return EnergyStopping(
        target_half_width=settings.target_half_width,
        time_limit_s=settings.final_time_limit_s if final else settings.time_limit_s,
        minimum_pairs=FINAL_MINIMUM_PAIRS if final else MINIMUM_PAIRS,
        seed=seed,
    )


def paired_energy(samples: EnergySamples, device: str, stopping: EnergyStopping) -> PairedEnergy:
    """Summarise what was sampled.

    Args:
        samples: windows of both models.
        device: the id of the device's fingerprint.
        stopping: what was asked for.
    """
    pairs = len(samples.baseline)
    figures = bootstrap_energy(
        energies_mj(samples.baseline),
        energies_mj(samples.candidate),
        generator_for(stopping.seed, pairs),
    )
    reason = "; ".join(_doubts(figures, samples, stopping))
    return PairedEnergy(
        baseline_mj=figures.baseline.value,
        baseline_low_mj=figures.baseline.low,
        baseline_high_mj=figures.baseline.high,
        candidate_mj=figures.candidate.value,
        candidate_low_mj=figures.candidate.low,
        candidate_high_mj=figures.candidate.high,
        saving=figures.saving.value,
        saving_low=figures.saving.low,
        saving_high=figures.saving.high,
        baseline_net_mj=net_of_idle_mj(samples.baseline, samples.idle_mw),
        candidate_net_mj=net_of_idle_mj(samples.candidate, samples.idle_mw),
        idle_mw=samples.idle_mw,
        pairs=pairs,
        trusted=not reason,
        reason=reason,
        device=device,
        baseline_c=mean_temperature_c(samples.baseline),
        candidate_c=mean_temperature_c(samples.candidate),
        change_c=temperature_change_c(samples),
        samples=samples,
    )


def _doubts(figures: EnergyRatio, samples: EnergySamples, stopping: EnergyStopping) -> list[str]:
    """Why the figures cannot be relied on, each with its remedy; empty if they can."""
    return [
        doubt
        for doubt in (
            _too_few(samples, stopping) or _too_wide(figures, samples, stopping),
            _warming(samples),
            _company(samples),
        )
        if doubt
    ]


def _too_few(samples: EnergySamples, stopping: EnergyStopping) -> str:
    pairs = len(samples.baseline)
    if pairs >= stopping.minimum_pairs:
        return ""
    needed = samples.elapsed_s * stopping.minimum_pairs / pairs
    return (
        f"only {pairs} of {stopping.minimum_pairs} window pairs fitted into the time limit; raise "
        f"the profile's energy time limit to about {needed:.0f} s"
    )


def _too_wide(figures: EnergyRatio, samples: EnergySamples, stopping: EnergyStopping) -> str:
    half_width = figures.saving.half_width
    if half_width <= stopping.target_half_width:
        return ""
    # The half-width falls with the square root of the sampling time.
    needed = samples.elapsed_s * (half_width / stopping.target_half_width) ** 2
    return (
        f"after {len(samples.baseline)} window pairs the ratio of energies is known to "
        f"±{half_width:.1%}, the target is ±{stopping.target_half_width:.1%}; stop other programs "
        f"on the device or raise the profile's energy time limit to about {needed:.0f} s"
    )


def _warming(samples: EnergySamples) -> str:
    sides = [mean_temperature_c(side) for side in (samples.baseline, samples.candidate)]
    difference = sides[1] - sides[0] if sides[0] is not None and sides[1] is not None else 0.0
    change = temperature_change_c(samples)
    if abs(difference) > _MOST_SIDE_DIFFERENCE_C:
        return (
            f"the device was {abs(difference):.0f} °C {'warmer' if difference > 0 else 'cooler'} "
            "under the candidate than under the baseline, and a hot device draws more; let it cool "
            "down, improve its cooling or raise the profile's energy time limit"
        )
    if abs(change) > _MOST_CHANGE_C:
        return (
            f"the device's temperature changed by {change:+.0f} °C meanwhile, and a hot device "
            "draws more; measure again now that it is near its working temperature, or raise the "
            "profile's energy time limit"
        )
    return ""


def _company(samples: EnergySamples) -> str:
    """Other programs whose energy is in the figures."""
    if samples.other_processes:
        plural = "process was" if samples.other_processes == 1 else "processes were"
        return (
            f"{samples.other_processes} other {plural} on what the meter counts ({samples.scope}); "
            "stop them and measure again"
        )
    unknown = math.isnan(samples.other_cores)
    busy = samples.load_average if unknown else samples.other_cores
    if busy <= _MOST_OTHER_CORES * samples.threads:
        return ""
    return (
        f"other programs kept {busy:.1f} CPU cores busy, and the meter counts them too "
        f"({samples.scope}); stop them and measure again"
    )
