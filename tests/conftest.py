from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_workload import QUICK_PROFILE

HERE = Path(__file__).resolve().parent


@pytest.fixture
def tiny_experiment(tmp_path):
    """A function that writes a tiny experiment and returns its path; arguments replace keys."""

    def write(profile=None, **changes) -> Path:
        (tmp_path / "quick.yaml").write_text(yaml.safe_dump(QUICK_PROFILE | (profile or {})))
        content = {
            "version": 1,
            "name": "tiny",
            "workload": f"{HERE / 'tiny_workload.py'}:workload",
            "device": str(tmp_path / "quick.yaml"),
            "search_space": "cnn",
            "objectives": ["metric", "latency"],
            "search": {"trials": 6, "seed": 0, "finalists": 3},
            "calibration": {"statistics_samples": 64, "repair_samples": 32},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write
