from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from autocompress.device import DeviceProfile
from autocompress.measure.client import Subject, Worker
from autocompress.measure.probe import float_chain, int8_chain, probe


@pytest.mark.parametrize(
    ("operator", "shape", "kernel"),
    [("Conv", (1, 8, 6, 6), (8, 8, 3, 3)), ("MatMul", (1, 12, 12), (12, 12))],
)
def test_both_precisions_compute_the_same(
    worker: Worker, tmp_path: Path, operator: str, shape: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    draw = np.random.default_rng(0).standard_normal
    scale = np.float32(np.prod(kernel[1:]) ** -0.5)
    weights = [draw(kernel, np.float32) * scale for _ in range(2)]
    inputs, outputs = [draw(shape, np.float32)], []
    for name, build in (("float", float_chain), ("int8", int8_chain)):
        onnx.save(build(operator, shape, weights), tmp_path / f"{name}.onnx")
        outputs.append(
            worker.predict(Subject(tmp_path / f"{name}.onnx", "onnxruntime"), inputs, 1)[0]
        )
    error = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
    assert 0 < error < 0.1


def test_the_report_is_complete(profile: DeviceProfile, tmp_path: Path) -> None:
    report = probe(profile, "onnxruntime", tmp_path, seed=0)
    assert report.noise_floor >= 0
    assert set(report.int8_pays) == {"Conv", "MatMul"}
    assert report.runtime == "onnxruntime"
    assert report.convolution.device == report.matmul.device
    json.dumps(report.to_dict())
