"""The figures of one candidate, as they are kept and shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

from autocompress.measure.measurement import Measurement

# The units of a metric: that of accuracy and agreement, and a user's own.
SHARE, OWN_UNIT = "share", "metric"
# The unit of a share's drop.
POINTS = "points"
SplitName = Literal["search", "test"]
# In the details of what was measured on the search split: how far the outputs are from the
# original's (see `workload.output_loss`), the share of decisions that changed, and of how many
# samples.
OUTPUT_LOSS, CHANGED, SAMPLES = "output_loss", "changed_share", "samples"


@final
@dataclass(frozen=True)
class Repeat:
    """Latency and energy of a candidate as one process measured them.

    Attributes:
        latency: as in `Evaluation`; so are `speedup` and `energy`.
        seconds: what it took.
    """

    latency: Measurement
    speedup: Measurement
    energy: Measurement | None
    seconds: float

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Repeat:
        """Read back what `dataclasses.asdict` wrote."""
        return Repeat(
            latency=Measurement.from_dict(data["latency"]),
            speedup=Measurement.from_dict(data["speedup"]),
            energy=None if data["energy"] is None else Measurement.from_dict(data["energy"]),
            seconds=data["seconds"],
        )


@final
@dataclass(frozen=True)
class Evaluation:
    """The figures of one candidate on one split.

    Attributes:
        candidate: see `plan.candidate_name`.
        runtime: full name of the runtime that all figures were taken in.
        plan: rows of `Plan.to_rows`.
        split: which split the metric was taken on.
        metric: the user's metric through the same runtime and settings.
        latency: milliseconds per run at the profile's batch size.
        speedup: baseline over candidate, measured in turn; the baseline is the original network in
            the profile's first runtime.
        file_bytes: size of the ONNX file.
        download_bytes: size of the coded container; None where it was not made.
        peak_memory_bytes: peak resident bytes of a fresh process, net of the runtime itself; None
            where it was not measured.
        gpu_memory_bytes: likewise on the GPU; None for a CPU.
        energy: millijoules per inference; None where it was not metered.
        artifact: path of the ONNX file relative to the run folder.
        details: parity, how each quantized layer runs, whether the skeleton fitted, the load and
            clock.
        seconds: what each step took, the first time if it was repeated.
        repeats: all single measurements, the first one included, if latency and energy were taken
            more than once; `latency`, `speedup` and `energy` join them.
    """

    candidate: str
    runtime: str
    plan: tuple[Mapping[str, Any], ...]
    split: SplitName
    metric: Measurement
    latency: Measurement
    speedup: Measurement
    file_bytes: int
    artifact: str
    peak_memory_bytes: int | None = None
    download_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    energy: Measurement | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    repeats: tuple[Repeat, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Evaluation:
        """Read back what `to_dict` wrote."""
        fields = dict(data)
        for name in ("metric", "latency", "speedup"):
            fields[name] = Measurement.from_dict(fields[name])
        if fields["energy"] is not None:
            fields["energy"] = Measurement.from_dict(fields["energy"])
        fields["plan"] = tuple(fields["plan"])
        fields["repeats"] = tuple(map(Repeat.from_dict, fields.get("repeats", ())))
        return Evaluation(**fields)

    @property
    def single_measurements(self) -> tuple[Repeat, ...]:
        """What each process measured of latency and energy, the first one first; at least one."""
        seconds = sum(self.seconds.get(step, 0.0) for step in ("latency", "energy"))
        return self.repeats or (Repeat(self.latency, self.speedup, self.energy, seconds),)

    @property
    def trusted(self) -> bool:
        """Whether latency and energy can be relied on."""
        return self.latency.trusted and (self.energy is None or self.energy.trusted)


def drop_unit(metric_unit: str) -> tuple[str, float]:
    """The unit of a drop, and how many of it are one of the metric's."""
    return (POINTS, 100.0) if metric_unit == SHARE else (metric_unit, 1.0)
