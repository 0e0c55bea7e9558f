"""Pure statistics of paired energy windows, and whether their figures can be trusted.

A window is a stretch in which one model runs back to back. Its energy per run is the mean power
over the window times the time that one run takes. The figure of a model is the mean over its
windows: energy adds up, and a sensor that samples only a part of the time is right on average and
at no single moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np

from autocompress.measure.statistics import RESAMPLES, FloatArray, expanded_tails


@final
@dataclass(frozen=True)
class EnergyStopping:
    """When sampling ends: at the target, once there are enough pairs, or at the time limit.

    Attributes:
        target_half_width: of the ratio's interval, a share of the ratio.
        time_limit_s: of all, idle and warm-up included. One pair is always taken.
        minimum_pairs: window pairs below which nothing is trusted.
        seed: of the bootstrap and of the gaps between windows.
    """

    target_half_width: float
    time_limit_s: float
    minimum_pairs: int
    seed: int


@final
@dataclass(frozen=True)
class Window:
    """A stretch in which one model ran back to back.

    Attributes:
        runs: how often it ran.
        seconds: from the start of the first run to the end of the last.
        power_mw: the meter's mean power meanwhile, all that it covers included.
        start_c: the meter's temperature in degrees Celsius before; None where it is not told.
        end_c: and after.
    """

    runs: int
    seconds: float
    power_mw: float
    start_c: float | None
    end_c: float | None

    @property
    def run_s(self) -> float:
        """Seconds that one run takes."""
        return self.seconds / self.runs

    @property
    def energy_mj(self) -> float:
        """Millijoules per run; a milliwatt for a second is one."""
        return self.power_mw * self.run_s


@final
@dataclass(frozen=True)
class EnergySamples:
    """What was sampled, and the state of the machine meanwhile.

    Attributes:
        meter: the meter's name.
        scope: what its figures cover.
        update_period_s: how often its value changes.
        baseline: windows of the baseline.
        candidate: as many windows; entry i was taken in turn with baseline entry i.
        idle_mw: mean power with both models loaded and none running.
        other_processes: the most other processes seen on what is metered.
        other_cores: mean number of CPU cores that other programs kept busy, for a meter that
            counts them too; NaN if unknown, 0 if they are not counted.
        threads: of the models.
        load_average: one-minute load average of the machine when sampling began.
        elapsed_s: how long all of it took.
    """

    meter: str
    scope: str
    update_period_s: float
    baseline: tuple[Window, ...]
    candidate: tuple[Window, ...]
    idle_mw: float
    other_processes: int
    other_cores: float
    threads: int
    load_average: float
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> EnergySamples:
        """Read back what `to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        windows = {side: _windows(data[side]) for side in ("baseline", "candidate")}
        return EnergySamples(**{**data, **windows})


@final
@dataclass(frozen=True)
class EnergyInterval:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval as a share of the figure."""
        return (self.high - self.low) / (2 * self.value)


@final
@dataclass(frozen=True)
class EnergyRatio:
    """Energy per run of both models in mJ, and how many times less the candidate takes."""

    baseline: EnergyInterval
    candidate: EnergyInterval
    saving: EnergyInterval


def bootstrap_energy(
    baseline: Sequence[float], candidate: Sequence[float], generator: np.random.Generator
) -> EnergyRatio:
    """Bootstrap (Efron 1979) of means and their ratio over jointly resampled window pairs.

    The percentile interval is expanded for few pairs: its levels are those at which a t interval
    of as many observations would end (Hesterberg, "What teachers should know about the bootstrap",
    The American Statistician 69, 2015).

    Args:
        baseline: energy per run in mJ, one per window.
        candidate: as many; entry i was taken in turn with baseline entry i.
        generator: the source of the resamples.

    Raises:
        ValueError: the numbers of windows differ, there is none, or an energy is not positive and
            finite.
    """
    both = [np.asarray(side, dtype=np.float64) for side in (baseline, candidate)]
    pairs = len(both[0])
    if pairs != len(both[1]) or pairs == 0:
        raise ValueError(f"paired windows needed, got {pairs} and {len(both[1])}")
    if not all(np.all(np.isfinite(side) & (side > 0)) for side in both):
        raise ValueError("energies must be positive and finite")
    draws = generator.integers(pairs, size=(RESAMPLES, pairs))
    means = [side[draws].mean(axis=1) for side in both]
    tails = expanded_tails(pairs)
    points = [float(side.mean()) for side in both]
    return EnergyRatio(
        baseline=_interval(points[0], means[0], tails),
        candidate=_interval(points[1], means[1], tails),
        saving=_interval(points[0] / points[1], means[0] / means[1], tails),
    )


def generator_for(seed: int, pairs: int) -> np.random.Generator:
    """The bootstrap's generator: the same windows always give the same interval."""
    return np.random.default_rng((seed, pairs))


def net_of_idle_mj(windows: Sequence[Window], idle_mw: float) -> float:
    """Mean energy per run in mJ beyond what the idle device would have drawn meanwhile."""
    return float(np.mean([(w.power_mw - idle_mw) * w.run_s for w in windows]))


def mean_temperature_c(windows: Sequence[Window]) -> float | None:
    """Mean over the windows' starts and ends; None where it is not told."""
    told = [t for w in windows for t in (w.start_c, w.end_c) if t is not None]
    return float(np.mean(told)) if told else None


def temperature_change_c(samples: EnergySamples) -> float:
    """From the first third of all windows to the last, degrees; 0 where not told or too few."""
    both = [pair for side in (samples.baseline, samples.candidate) for pair in enumerate(side)]
    ordered = [window for _, window in sorted(both, key=lambda pair: pair[0])]
    third = len(ordered) // 3
    if not third:
        return 0.0
    first, last = mean_temperature_c(ordered[:third]), mean_temperature_c(ordered[-third:])
    return last - first if first is not None and last is not None else 0.0


def energies_mj(windows: Sequence[Window]) -> list[float]:
    """Energy per run of each window, in mJ."""
    return [window.energy_mj for window in windows]


def _windows(rows: Sequence[Mapping[str, Any]]) -> tuple[Window, ...]:
    return tuple(Window(**row) for row in rows)


def _interval(point: float, resampled: FloatArray, tails: tuple[float, float]) -> EnergyInterval:
    low, high = np.percentile(resampled, tails)
    return EnergyInterval(point, float(low), float(high))
