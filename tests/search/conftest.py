from __future__ import annotations

from collections.abc import Callable

import pytest

from autocompress.evaluation import Evaluation
from autocompress.measure.measurement import Measurement
from autocompress.plan import Plan


def _measured(value: float, spread: float = 0.0, unit: str = "") -> Measurement:
    return Measurement(value, value - spread, value + spread, unit, "measured", "device")


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[..., Evaluation]:
    def make(
        candidate: str,
        metric: float,
        speedup: float,
        *,
        split: str = "search",
        plan: Plan | None = None,
        file_bytes: int = 1000,
    ) -> Evaluation:
        return Evaluation(
            candidate=candidate,
            runtime=candidate.partition("@")[2] or "onnxruntime",
            plan=tuple((plan or Plan()).to_rows()),
            split=split,
            metric=_measured(metric, 0.01, "share"),
            latency=_measured(1.0 / speedup, unit="ms"),
            speedup=_measured(speedup, 0.01 * speedup),
            file_bytes=file_bytes,
            download_bytes=900,
            peak_memory_bytes=5000,
            artifact=f"artifacts/{candidate}.onnx",
        )

    return make
