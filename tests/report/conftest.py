from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_device import DEVICE

from autocompress.report.columns import COLUMNS

NAN = float("nan")


def row(candidate: str, role: str = "candidate", **changed: Any) -> dict[str, Any]:
    """A row of front.csv that is plausible unless changed."""
    plain = {
        "candidate": candidate, "role": role, "runtime": "onnxruntime", "on_front": True,
        "metric_search": 0.92, "metric_test": NAN, "drop_test_pp": NAN, "metric_unit": "share",
        "latency_ms": 0.4, "speedup": 2.0, "speedup_low": 1.98, "speedup_high": 2.02,
        "energy_mj": NAN, "energy_low_mj": NAN, "energy_high_mj": NAN, "file_bytes": 400_000,
        "download_bytes": 250_000, "peak_memory_bytes": 31_000_000, "gpu_memory_bytes": NAN,
        "trusted": True,
        "artifact": f"artifacts/{candidate}.onnx", "plan_hash": f"hash{candidate}",
    }  # fmt: skip
    assert set(changed) <= set(COLUMNS)
    return {**plain, **changed}


def judged(candidate: str, metric: float, latency: float, role: str = "finalist") -> dict[str, Any]:
    """A row judged on the test split, against an original of 0.92 and 0.8 ms."""
    ratio = 0.8 / latency
    return row(
        candidate, role, metric_search=metric, metric_test=metric, latency_ms=latency,
        drop_test_pp=round(100 * (0.92 - metric), 6), speedup=ratio, speedup_low=ratio * 0.99,
        speedup_high=ratio * 1.01, file_bytes=int(1e6 / ratio),
    )  # fmt: skip


@pytest.fixture
def front() -> pd.DataFrame:
    """Both references, four finalists (`bent` is the knee but for `extreme`), two candidates."""
    return pd.DataFrame(
        [
            {**judged("original", 0.92, 0.8, "original"), "on_front": False, "plan_hash": NAN},
            {**judged("stock_int8", 0.915, 0.34, "stock_int8"), "on_front": False},
            judged("mild", 0.918, 0.30),
            judged("bent", 0.912, 0.14),
            judged("hard", 0.890, 0.12),
            {**judged("extreme", 0.600, 0.10), "trusted": False},
            row("plain", metric_search=0.91, latency_ms=0.2),
            row("worse", on_front=False, metric_search=0.7, latency_ms=0.7),
        ]
    )


@pytest.fixture
def own_front(front: pd.DataFrame) -> pd.DataFrame:
    """`front` as a user's own metric gives it: values in 0 to 1, drops in the metric's unit."""
    return front.assign(metric_unit="metric", drop_test_pp=front["drop_test_pp"] / 100)


@pytest.fixture
def run(tmp_path: Path, front: pd.DataFrame) -> Path:
    """A run folder with a front, artifacts, one plan and the device."""
    folder = tmp_path / "run"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "plans").mkdir()
    for name in front["candidate"]:
        (folder / "artifacts" / f"{name}.onnx").write_bytes(f"model {name}".encode() * 1000)
    front.to_csv(folder / "front.csv", index=False)
    (folder / "device.json").write_text(json.dumps(DEVICE.model_dump(mode="json")))
    plan = [{"target": "conv1", "technique": "filter_prune", "pruning_ratio": 0.5}]
    (folder / "plans" / "hashbent.json").write_text(json.dumps(plan))
    return folder


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    return row


@pytest.fixture
def make_judged() -> Callable[..., dict[str, Any]]:
    return judged
