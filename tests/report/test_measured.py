from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from autocompress.device import (
    DeviceProfile,
    MeasuringSettings,
    OnnxRuntimeCpuSettings,
    OpenVinoSettings,
)
from autocompress.errors import MeasurementError
from autocompress.measure.any_file import model_bytes, random_inputs
from autocompress.report.measured import Wanted, measure_files, measured_table


def profile_of(*runtimes) -> DeviceProfile:
    limits = MeasuringSettings(
        target_half_width=0.3, time_limit_s=0.3, final_target_half_width=0.3,
        final_time_limit_s=0.3, hang_limit_s=20,
    )  # fmt: skip
    return DeviceProfile(
        version=2, name="test", kind="cpu", runtimes=runtimes, kernels={}, measuring=limits
    )


@pytest.fixture
def dense(tmp_path: Path):
    def make(name: str, width: int, *, external: bool = False) -> Path:
        weights = np.ones((4, width), np.float32), np.ones((width, 2), np.float32)
        graph = helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "a"], ["h"]),
                helper.make_node("MatMul", ["h", "b"], ["y"]),
            ],
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(w, n) for w, n in zip(weights, "ab", strict=True)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        path = tmp_path / f"{name}.onnx"
        onnx.save(
            model, path, save_as_external_data=external, location=f"{name}.data", size_threshold=0
        )
        return path

    return make


def test_files_of_any_origin_are_compared_in_every_runtime(dense, tmp_path):
    pytest.importorskip("openvino")
    profile = profile_of(
        OnnxRuntimeCpuSettings(name="onnxruntime"),
        OpenVinoSettings(name="openvino", precision="f32"),
    )
    broken = tmp_path / "broken.onnx"
    model = onnx.load(dense("base", 8))
    model.graph.node[0].input[1] = "b"
    onnx.save(model, broken)
    said: list[str] = []
    wanted = Wanted(
        dense("base", 8), (dense("wide", 64), broken), profile.runtime_names, sizes={"length": 3}
    )
    device, rows = measure_files(profile, wanted, said.append)
    assert [(r.model.stem, r.runtime) for r in rows] == [
        (name, runtime) for name in ("base", "wide", "broken") for runtime in profile.runtime_names
    ]
    assert len(said) == len(rows)
    for row in rows:
        assert bool(row.failure) == (row.model == broken) == (row.latency is None)
    json.dumps([row.to_dict() for row in rows], allow_nan=True)
    console = Console(width=100, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(measured_table(profile, device, rows))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "broken.onnx in onnxruntime failed" in text and "openvino-f32" in text


def test_a_baseline_that_fails_ends_the_measurement(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x09 no model")
    profile = profile_of(OnnxRuntimeCpuSettings(name="onnxruntime"))
    with pytest.raises(MeasurementError, match="ONNX"):
        measure_files(profile, Wanted(broken, (broken,), profile.runtime_names), lambda _: None)


def test_open_axes_need_sizes(dense):
    model = onnx.load(dense("base", 8))
    with pytest.raises(MeasurementError, match="--size length=64"):
        random_inputs(model, 2, {}, seed=0)
    [x] = random_inputs(model, 2, {"length": 5}, seed=0)
    assert x.shape == (2, 5, 4) and x.dtype == np.float32
    np.testing.assert_array_equal(x, random_inputs(model, 2, {"length": 5}, seed=0)[0])


def test_weights_in_other_files_count(dense):
    inside, outside = dense("inside", 64), dense("outside", 64, external=True)
    assert outside.stat().st_size < inside.stat().st_size
    weights = (4 * 64 + 64 * 2) * 4
    assert model_bytes(outside) >= weights
    assert model_bytes(outside) == pytest.approx(model_bytes(inside), rel=0.2)
