"""Small models and device profiles that the measuring tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.device import (
    DeviceProfile,
    MeasuringSettings,
    OnnxRuntimeCpuSettings,
    RuntimeSettings,
)
from autocompress.measure.client import Subject

FEATURES = 16


@dataclass(frozen=True)
class Models:
    """Paths of small ONNX files; `dense(width)` has weights of 16*width + width*16 floats."""

    folder: Path

    def dense(self, width: int) -> Path:
        path = self.folder / f"dense-{width}.onnx"
        draw = np.random.default_rng(width).standard_normal
        weights = [draw((FEATURES, width), np.float32), draw((width, FEATURES), np.float32)]
        nodes = [
            helper.make_node("MatMul", ["x", "w0"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w1"], ["y"]),
        ]
        return self._save(path, nodes, weights, ["y"])

    def two_outputs(self) -> Path:
        nodes = [
            helper.make_node("Neg", ["x"], ["y"]),
            helper.make_node("ReduceSum", ["x"], ["z"], keepdims=0, noop_with_empty_axes=1),
        ]
        return self._save(self.folder / "two.onnx", nodes, [], ["y", "z"])

    def without_batch(self) -> Path:
        nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
        return self._save(self.folder / "scalar.onnx", nodes, [], ["y"])

    def endless(self) -> Path:
        """A loop of 2**62 rounds."""
        value = helper.make_tensor_value_info
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go"], ["go_on"]),
                helper.make_node("Sin", ["s"], ["s_next"]),
            ],
            "body",
            [
                value("i", TensorProto.INT64, []),
                value("go", TensorProto.BOOL, []),
                value("s", TensorProto.FLOAT, None),
            ],
            [value("go_on", TensorProto.BOOL, []), value("s_next", TensorProto.FLOAT, None)],
        )
        nodes = [helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)]
        path = self.folder / "endless.onnx"
        return self._save(path, nodes, [np.array(2**62, np.int64)], ["y"], ["rounds"])

    def greedy(self) -> Path:
        """A loop that doubles its tensor without end."""
        value = helper.make_tensor_value_info
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go"], ["go_on"]),
                helper.make_node("Concat", ["s", "s"], ["s_next"], axis=0),
            ],
            "body",
            [
                value("i", TensorProto.INT64, []),
                value("go", TensorProto.BOOL, []),
                value("s", TensorProto.FLOAT, None),
            ],
            [value("go_on", TensorProto.BOOL, []), value("s_next", TensorProto.FLOAT, None)],
        )
        nodes = [helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)]
        path = self.folder / "greedy.onnx"
        return self._save(path, nodes, [np.array(2**62, np.int64)], ["y"], ["rounds"])

    def corrupt(self) -> Path:
        path = self.folder / "corrupt.onnx"
        path.write_bytes(b"\x08\x09 this is no model")
        return path

    def _save(
        self,
        path: Path,
        nodes: list[onnx.NodeProto],
        weights: list[np.ndarray],
        outputs: list[str],
        names: list[str] | None = None,
    ) -> Path:
        names = names or [f"w{i}" for i in range(len(weights))]
        graph = helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=True)],
        )
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
        return path


def of(model: Path, runtime: str = "onnxruntime") -> Subject:
    return Subject(model, runtime)


def make_profile(
    *runtimes: RuntimeSettings, hang_limit_s: float = 30, memory_limit_bytes: int | None = None
) -> DeviceProfile:
    return DeviceProfile(
        version=2,
        name="test",
        kind="cpu",
        runtimes=runtimes or (OnnxRuntimeCpuSettings(name="onnxruntime"),),
        kernels={},
        measuring=MeasuringSettings(
            target_half_width=0.2,
            time_limit_s=2,
            final_target_half_width=1e-9,
            final_time_limit_s=0.5,
            hang_limit_s=hang_limit_s,
            memory_limit_bytes=memory_limit_bytes,
        ),
    )
