"""Figures of a plan for `solve`: predicted or measured, each says which."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, final

from autocompress.evaluation import Evaluation, drop_unit
from autocompress.measure.measurement import CONFIDENCE_SIGMAS, Measurement
from autocompress.search.judge import Interval
from autocompress.search.solve_limits import Limits
from autocompress.techniques import technique_named


@final
@dataclass(frozen=True)
class Figures:
    """What is predicted (`estimated`), or was measured, of one candidate.

    Attributes:
        latency: the quiet latency, in milliseconds.
        speedup: against the original in the device's first runtime.
        drop: how far the metric on the search split is below the original's: percentage points
            for accuracy and agreement, the own unit of a user's metric; without an interval (NaN)
            where it was measured; None while too few candidates are measured to predict it.
        download_bytes: None where it was not made, or no model is known.
    """

    latency: Measurement
    speedup: Measurement
    drop: Measurement | None
    file_bytes: Measurement | None
    download_bytes: Measurement | None

    def keep(self, limits: Limits) -> bool:
        """Whether they are within all limits; what is not known is not."""
        wanted = (
            (self.latency, limits.max_latency_ms),
            (self.file_bytes, limits.max_bytes),
            (self.download_bytes, limits.max_download_bytes),
        )
        upper = all(
            limit is None or (figure is not None and figure.value <= limit)
            for figure, limit in wanted
        )
        return upper and self.speedup.value >= (limits.min_speedup or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; an end of an interval that is not known is None."""
        return {
            name: None if figure is None else {k: _finite(v) for k, v in figure.items()}
            for name, figure in asdict(self).items()
        }


@final
@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate of the run.

    Attributes:
        candidate: see `plan.candidate_name`.
        trained: whether its weights were trained; plans are solved for without training.
    """

    candidate: str
    runtime: str
    figures: Figures
    trained: bool


def figures_of(evaluation: Evaluation, original_metric: float) -> Figures:
    """The measured figures of a candidate; the original's metric is of the same split."""
    metric = evaluation.metric

    def size(value: int | None) -> Measurement | None:
        if value is None:
            return None
        return Measurement(value, value, value, "bytes", "measured", evaluation.latency.device)

    unit, points = drop_unit(metric.unit)
    drop = points * (original_metric - metric.value)
    return Figures(
        latency=evaluation.latency,
        speedup=evaluation.speedup,
        # Both networks see the same samples: the metric's interval is not the difference's.
        drop=Measurement(drop, math.nan, math.nan, unit, "measured", metric.device),
        file_bytes=size(evaluation.file_bytes),
        download_bytes=size(evaluation.download_bytes),
    )


def estimated(interval: Interval, factor: float, unit: str, device: str) -> Measurement:
    """A prediction as a figure, times a factor, with the 95 % interval of its deviation."""
    spread = CONFIDENCE_SIGMAS * interval.deviation
    ends = (interval.value, interval.value - spread, interval.value + spread)
    value, low, high = (factor * end for end in ends)
    return Measurement(value, low, high, unit, "estimated", device)


def speedup_at(latency: Measurement, original_ms: float) -> Measurement:
    """The speed-up against the original of a predicted latency, in ms as the original's."""
    fastest = original_ms / latency.ci_low if latency.ci_low > 0 else math.inf
    return Measurement(
        original_ms / latency.value, original_ms / latency.ci_high, fastest,
        "ratio", "estimated", latency.device,
    )  # fmt: skip


def trains(evaluation: Evaluation) -> bool:
    """Whether a candidate's weights were trained."""
    return any(technique_named(str(row["technique"])).stage.trains for row in evaluation.plan)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
