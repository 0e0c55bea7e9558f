from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from autocompress.evaluation import Evaluation
from autocompress.measure.measurement import Measurement
from autocompress.search.costs.corrected import CorrectedCost
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.costs.models import CostModels
from autocompress.search.front import objective_values


def table(constant: float, *values: float) -> FactoredSum:
    return FactoredSum(constant, (Factor("layer", ("p",), np.array(values)),))


def models() -> CostModels:
    return CostModels(
        {"one": CorrectedCost(table(1.0, 9.0, 4.0)), "two": CorrectedCost(table(1.0, 4.0, 2.0))},
        {"file_bytes": CorrectedCost(table(100.0, 900.0, 400.0))},
        original_ms=10.0,
    )


def measured(runtime: str, speedup: float, file_bytes: int, download: int | None) -> Evaluation:
    def exactly(value: float) -> Measurement:
        return Measurement(value, value, value, "", "measured", "device")

    return Evaluation(
        candidate="x", runtime=runtime, plan=(), split="search", metric=exactly(0.9),
        latency=exactly(123.0), speedup=exactly(speedup), file_bytes=file_bytes,
        download_bytes=download, artifact="",
    )  # fmt: skip


def test_predictions_have_the_units_of_the_objectives() -> None:
    found = models()
    one, two = (found.predict({"p": 1}, runtime) for runtime in ("one", "two"))
    assert one["latency"].value == pytest.approx(0.5)
    assert two["latency"].value == pytest.approx(0.3)
    assert one["file_bytes"].value == two["file_bytes"].value == pytest.approx(500)
    mean, deviation = found.latency_ms["one"].predict({"p": 1})
    assert one["latency"].high == pytest.approx((mean + 3 * deviation) / 10)
    assert one["latency"].low < 0.5 < one["latency"].high
    # A runtime without a model tells nothing of latency.
    assert set(found.predict({}, "three")) == {"file_bytes"}


def test_what_is_measured_corrects_the_model_of_its_runtime_only() -> None:
    found = models()
    before = found.predict({"p": 1}, "two")["latency"]
    # 1 / 1.25 of the original's 10 ms, however long it took on that day.
    evaluation = measured("one", 1.25, 700, None)
    for _ in range(50):
        found.observe({"p": 1}, evaluation)
    after = found.predict({"p": 1}, "one")
    wanted = objective_values(evaluation, ("latency", "file_bytes"))
    assert after["latency"].value == pytest.approx(wanted[0], rel=0.02)
    assert after["file_bytes"].value == pytest.approx(wanted[1], rel=0.02)
    assert found.predict({"p": 1}, "two")["latency"] == before
    assert found.latency_ms["two"].observations == 0
    found.observe({"p": 1}, measured("three", 2.0, 700, None))
    assert found.latency_ms["one"].observations == 50


def test_a_size_that_was_not_measured_teaches_nothing() -> None:
    download = CorrectedCost(table(10.0, 90.0, 40.0))
    found = CostModels({}, {"download_bytes": download})
    found.observe({"p": 1}, measured("one", 2.0, 700, None))
    assert download.observations == 0
    found.observe({"p": 1}, measured("one", 2.0, 700, 45))
    assert download.observations == 1


def test_sums_are_corrected_and_in_their_own_units() -> None:
    found = models()

    def value(objective: Any, runtime: str) -> float:
        model = found.sum_of(objective, runtime)
        return math.nan if model is None else model.value({"p": 1})

    assert value("latency", "one") == pytest.approx(5.0)
    assert value("latency", "two") == pytest.approx(3.0)
    assert value("file_bytes", "three") == pytest.approx(500)
    for _ in range(50):
        found.observe({"p": 1}, measured("one", 1.25, 500, None))
        found.observe({"p": 0}, measured("one", 1.0, 1000, None))
    assert value("latency", "one") == pytest.approx(8.0, rel=0.05)
    assert found.sum_of("latency", "three") is None
    assert found.sum_of("energy", "one") is None
    assert found.sum_of("download_bytes", "one") is None
