"""One measured or estimated number with its interval, unit and origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

# Of a normal distribution, what a 95 % interval reaches to either side.
CONFIDENCE_SIGMAS = 1.96


@final
@dataclass(frozen=True)
class Measurement:
    """A value with its 95 % interval.

    Attributes:
        value: the figure itself, in `unit`.
        ci_low: lower end of the interval, in `unit`; equal to `value` for exact figures.
        ci_high: upper end of the interval, in `unit`.
        unit: `ms`, `bytes`, `ratio`, ...
        source: `measured` on the device, or `estimated` from a table.
        device: the id of the device's fingerprint.
        trusted: False when the interval stayed wider than the target.
        reason: why it is not trusted and what to do; empty otherwise.
    """

    value: float
    ci_low: float
    ci_high: float
    unit: str
    source: Literal["measured", "estimated"]
    device: str
    trusted: bool = True
    reason: str = ""

    @property
    def half_width(self) -> float:
        """Half the interval as a share of the value: to first order, of its logarithm."""
        return (self.ci_high - self.ci_low) / (2 * self.value)

    @property
    def standard_error(self) -> float:
        """Of a normal distribution with this interval, in `unit`; NaN without an interval."""
        return (self.ci_high - self.ci_low) / (2 * CONFIDENCE_SIGMAS)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Measurement:
        """Read back what `to_dict` wrote.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return Measurement(**data)
