"""What came of building the latency table of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from autocompress.device import Fingerprint
from autocompress.measure.measurement import Measurement
from autocompress.measure.table.survey import Fill
from autocompress.measure.table.table import Prediction
from autocompress.search.levels import GroupRow, LayerRow
from autocompress.search.ranks import rank_correlation


@final
@dataclass(frozen=True)
class PlanLatency:
    """One plan: what the table predicts and what was measured, in turn with the original.

    Attributes:
        predicted: by the table as it is.
        measured: with its interval, and whether it can be relied on.
        speedup: over the original, measured.
        guess_ms: what the table predicts if it knows a quarter of the plans' blocks only; None if
            that quarter has nothing like one of the blocks.
    """

    plan: str
    predicted: Prediction
    measured: Measurement
    speedup: float
    guess_ms: float | None

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted.latency_ms / self.measured.value - 1


@final
@dataclass(frozen=True)
class Agreement:
    """How well predictions agree with what was measured; NaN without plans.

    Attributes:
        mean_absolute_error: as a share of what was measured; so is `largest_error`.
        rank_correlation: Spearman's; NaN for fewer than two plans.
    """

    plans: int
    mean_absolute_error: float
    largest_error: float
    rank_correlation: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain values, ready for JSON; what is not known is None."""
        return {key: None if np.isnan(value) else value for key, value in asdict(self).items()}


@final
@dataclass(frozen=True)
class Miss:
    """A kind of meeting where the sum of two blocks misses what both take together."""

    kind: str
    tensor: str
    apart_ms: float
    together_ms: float


@final
@dataclass(frozen=True)
class NetworkReport:
    """The latency table of a network, checked on random plans.

    Attributes:
        cache: the file that holds the table.
        entries: of the table, other networks' among them.
        blocks: how many blocks of plans and levels were measured and reused.
        meetings: likewise of meetings of two blocks.
        misses: meetings where sums of single blocks miss by more than 10 %.
        failures: why blocks or plans are missing.
        layers: what each layer takes, the slowest first.
        groups: what each level of each channel group takes.
        slow_levels: levels that do not pay, each with its reason.
    """

    experiment: str
    device: Fingerprint
    runtime: str
    cache: Path
    entries: int
    blocks: Fill
    meetings: Fill
    misses: tuple[Miss, ...]
    failures: tuple[str, ...]
    original: PlanLatency
    plans: tuple[PlanLatency, ...]
    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    slow_levels: tuple[str, ...]

    @property
    def agreement(self) -> Agreement:
        """Of the table as it is."""
        return agreement([(p.predicted.latency_ms, p.measured.value) for p in self.plans])

    @property
    def interpolated_agreement(self) -> Agreement:
        """Of a table that knows a quarter of the plans' blocks and guesses the others."""
        known = [(p.guess_ms, p.measured.value) for p in self.plans]
        return agreement([(guess, found) for guess, found in known if guess is not None])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **asdict(self),
            "device": self.device.model_dump(mode="json"),
            "cache": str(self.cache),
            "agreement": self.agreement.to_dict(),
            "interpolated_agreement": self.interpolated_agreement.to_dict(),
        }


def agreement(pairs: Sequence[tuple[float, float]]) -> Agreement:
    """How well the first of each pair agrees with the second."""
    if not pairs:
        return Agreement(0, np.nan, np.nan, np.nan)
    predicted, measured = np.array(pairs, dtype=np.float64).T
    errors = np.abs(predicted / measured - 1)
    # Ranks that are all equal have no correlation.
    ranked = len(pairs) > 1 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    correlation = rank_correlation(predicted, measured) if ranked else np.nan
    return Agreement(len(pairs), float(errors.mean()), float(errors.max()), correlation)
