"""Hard limits on a candidate's figures, such as `drop <= 1.0`, and by how much they are missed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, final, get_args

from autocompress.errors import ConfigError
from autocompress.evaluation import Evaluation, drop_unit

Figure = Literal[
    "metric", "drop", "latency_ms", "speedup", "energy_mj", "file_bytes", "download_bytes",
    "peak_memory_bytes", "gpu_memory_bytes",
]  # fmt: skip
Sense = Literal["<=", ">="]
FIGURES: tuple[Figure, ...] = get_args(Figure)

_AT_LEAST = frozenset({"metric", "speedup"})
# These may be limited at zero or below: a drop below zero asks for a better metric.
_ANY_BOUND = frozenset({"metric", "drop"})
_BYTES = {
    "": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_UNITS: Mapping[str, Mapping[str, float]] = {
    "latency_ms": {"": 1, "ms": 1},
    "energy_mj": {"": 1, "mJ": 1},
    "speedup": {"": 1, "x": 1},
    "file_bytes": _BYTES,
    "download_bytes": _BYTES,
    "peak_memory_bytes": _BYTES,
    "gpu_memory_bytes": _BYTES,
}
_LIMIT = re.compile(
    r"(?P<figure>\w+)\s*(?P<sense><=|>=)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-z]*)"
)
_EXAMPLES = "drop <= 1.0, latency_ms <= 0.5, download_bytes <= 50kB"


@final
@dataclass(frozen=True)
class Limit:
    """A bound that every candidate should keep.

    Attributes:
        figure: what is bounded, by the name of its column; `drop` is how far the metric is below
            the original's: percentage points for accuracy and agreement, and the own unit of a
            user's metric.
        bound: in the figure's unit, bytes for all sizes.
    """

    figure: Figure
    sense: Sense
    bound: float

    @property
    def text(self) -> str:
        """As `parse_limit` reads it."""
        return f"{self.figure} {self.sense} {self.bound:.12g}"

    def excess(self, value: float) -> float:
        """How far a value is past the bound, as a share of the bound; zero or less if it is not.

        A bound of zero is measured in the figure's unit.
        """
        beyond = value - self.bound if self.sense == "<=" else self.bound - value
        return beyond / (abs(self.bound) or 1.0)


def parse_limit(text: str) -> Limit:
    """Read a limit such as `metric >= 0.9`, `speedup >= 3x` or `peak_memory_bytes <= 5MB`.

    Raises:
        ConfigError: it cannot be read, names no figure, or bounds a figure from the wrong side.
    """
    match = _LIMIT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            "A limit cannot be read.",
            given=text,
            allowed=f"FIGURE <= NUMBER or FIGURE >= NUMBER, such as {_EXAMPLES}",
        )
    name, sense, number, unit = match.group("figure", "sense", "number", "unit")
    if name not in FIGURES:
        raise ConfigError(
            "A limit is put on no known figure.", given=text, allowed=", ".join(FIGURES)
        )
    wanted = ">=" if name in _AT_LEAST else "<="
    if sense != wanted:
        raise ConfigError(
            "A limit holds a figure back from getting better.",
            given=text,
            allowed=f"{name} {wanted} {number}{unit}",
        )
    units = _UNITS.get(name, {"": 1})
    if unit not in units:
        named = ", ".join(filter(None, units))
        raise ConfigError(
            "A limit has an unknown unit.",
            given=text,
            allowed=f"a number of {named}" if named else "a number without a unit",
        )
    bound = float(number) * units[unit]
    if not math.isfinite(bound) or (bound <= 0 and name not in _ANY_BOUND):
        raise ConfigError("A limit must be above zero.", given=text, allowed="a number above zero")
    return Limit(cast(Figure, name), cast(Sense, sense), bound)


def parse_limits(texts: Sequence[str]) -> tuple[Limit, ...]:
    """Read limits, one at most on each figure.

    Raises:
        ConfigError: one is not valid, or two are put on one figure.
    """
    limits = tuple(parse_limit(text) for text in texts)
    names = [limit.figure for limit in limits]
    twice = [limit.text for limit in limits if names.count(limit.figure) > 1]
    if twice:
        raise ConfigError(
            "Two limits are put on one figure.",
            given="; ".join(twice),
            allowed="one limit on each figure",
        )
    return limits


def figures_of(evaluation: Evaluation, original: Evaluation) -> dict[Figure, float]:
    """The figures that limits are put on; those that were not taken, or are NaN, are left out.

    Latency is the original's over the speed-up, measured in turn with it: milliseconds of different
    minutes are not comparable on a shared machine.

    Args:
        original: of the original network in the device's first runtime, on the same split.
    """
    _, points = drop_unit(original.metric.unit)
    speedup = evaluation.speedup.value
    found: dict[Figure, float | None] = {
        "metric": evaluation.metric.value,
        "drop": points * (original.metric.value - evaluation.metric.value),
        "latency_ms": original.latency.value / speedup if speedup > 0 else None,
        "speedup": speedup,
        "energy_mj": None if evaluation.energy is None else evaluation.energy.value,
        "file_bytes": evaluation.file_bytes,
        "download_bytes": evaluation.download_bytes,
        "peak_memory_bytes": evaluation.peak_memory_bytes,
        "gpu_memory_bytes": evaluation.gpu_memory_bytes,
    }
    return {k: float(v) for k, v in found.items() if v is not None and not math.isnan(v)}


def violations(
    limits: Sequence[Limit], evaluation: Evaluation, original: Evaluation
) -> tuple[float, ...]:
    """For every limit its excess (see `Limit.excess`), zero or less where it holds.

    A figure that was not taken is infinitely far off: what is not known to hold does not. So a
    search must take the figures that its limits name (see `Limit.figure`).

    Args:
        original: see `figures_of`.
    """
    return _excesses(limits, figures_of(evaluation, original), unknown=math.inf)


def satisfied(limits: Sequence[Limit], evaluation: Evaluation, original: Evaluation) -> bool:
    """Whether all limits hold by the figures that were taken."""
    return all(v <= 0 for v in violations(limits, evaluation, original))


def estimated_violations(
    limits: Sequence[Limit], figures: Mapping[Figure, float]
) -> tuple[float, ...]:
    """As `violations`, of estimates for a candidate that was not built.

    A figure that is missing or NaN counts as 0: nothing speaks against the candidate yet.
    """
    return _excesses(limits, figures, unknown=0.0)


def _excesses(
    limits: Sequence[Limit], figures: Mapping[Figure, float], *, unknown: float
) -> tuple[float, ...]:
    found = [limit.excess(figures.get(limit.figure, math.nan)) for limit in limits]
    return tuple(unknown if math.isnan(value) else value for value in found)
