"""TensorRT, through ONNX Runtime's provider."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import numpy as np

from autocompress.device import RuntimeSettings, TensorRtSettings
from autocompress.files import user_cache
from autocompress.measure.runtimes.by_shape import ByShape, Compiled
from autocompress.measure.runtimes.onnx_files import has_operators, trivial_model
from autocompress.measure.runtimes.onnxruntime_cuda import PROVIDER as CUDA
from autocompress.measure.runtimes.onnxruntime_cuda import no_profile
from autocompress.measure.runtimes.onnxruntime_gpu import (
    BoundSession,
    FixedSession,
    check_gpu_provider,
    file_inputs,
    load_libraries,
    open_fixed,
    outputs_like,
)
from autocompress.measure.session import Array, NodeTime, Placement, Runtime, Session

PROVIDER = "TensorrtExecutionProvider"
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
# Engines kept on disk; a search makes two or three per candidate.
_KEPT_ENGINES = 128


@final
class TensorRt(Runtime):
    """TensorRT: engines are built for the shapes of the inputs, and kept in a cache.

    Nodes that TensorRT does not take run in the CUDA provider or on the CPU. Integer kernels are
    used where the file rounds with QuantizeLinear and DequantizeLinear: TensorRT takes signed
    integers with a zero point of 0 only. `fp32` may use TensorFloat-32, TensorRT's default.
    """

    @property
    def name(self) -> str:
        """`tensorrt`."""
        return "tensorrt"

    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that ONNX Runtime is installed with its TensorRT provider."""
        check_gpu_provider(settings, PROVIDER)

    def load(self, path: Path, settings: RuntimeSettings, placement: Placement) -> Session:
        """Read a file's inputs; its engine is built once shapes are known, which takes a while."""
        assert isinstance(settings, TensorRtSettings)
        check_gpu_provider(settings, PROVIDER)
        _load_libraries(settings)
        found = file_inputs(path, settings)
        quantized, content = has_operators(path, _ROUNDING), _content(path)
        root = cache_root()

        def compile_for(inputs: Sequence[Array]) -> Compiled:
            cache = engine_folder(root, content, settings, inputs)
            options = provider_options(settings, placement, cache, quantized)
            providers = [(PROVIDER, options), (CUDA, {"device_id": str(placement.gpu)})]
            cache.mkdir(parents=True, exist_ok=True)
            os.utime(cache)
            keep_newest(root, _KEPT_ENGINES)
            sizes = found.sizes(inputs)
            session = open_fixed(path, settings, placement.threads, sizes, providers)
            if not settings.cuda_graphs:
                return FixedSession(session, found.names).run
            outputs = outputs_like(path, settings, inputs)
            return BoundSession(session, inputs, outputs, "cuda", placement.gpu).run

        return ByShape(found.names, compile_for)

    def start(self, settings: RuntimeSettings, placement: Placement) -> None:
        """Load TensorRT, CUDA and their libraries by running a trivial model."""
        import onnx

        with TemporaryDirectory(prefix="autocompress-tensorrt-") as folder:
            path = Path(folder) / "trivial.onnx"
            onnx.save(trivial_model(), path)
            self.load(path, settings, placement).run([np.zeros((1, 4, 4, 4), np.float32)])

    def profile(
        self,
        path: Path,
        settings: RuntimeSettings,
        placement: Placement,
        inputs: Sequence[Array],
        runs: int,
    ) -> tuple[NodeTime, ...]:
        """An engine is one node to ONNX Runtime, which only times its launch.

        Raises:
            MeasurementError: always.
        """
        raise no_profile(settings)


def provider_options(
    settings: TensorRtSettings, placement: Placement, cache: Path, quantized: bool
) -> dict[str, str]:
    """What the provider is told; the names are those of ONNX Runtime's documentation.

    Args:
        cache: the folder of this file's engines.
        quantized: whether the file rounds values; TensorRT refuses it without its integer flag,
            and asks for calibration if other files have the flag.
    """
    return {
        "device_id": str(placement.gpu),
        "trt_fp16_enable": str(int(settings.precision == "fp16")),
        "trt_bf16_enable": str(int(settings.precision == "bf16")),
        "trt_int8_enable": str(int(quantized)),
        "trt_cuda_graph_enable": str(int(settings.cuda_graphs)),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        # Times of kernels, which all files share.
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache.parent),
    }


def cache_root() -> Path:
    """Where engines are kept: `autocompress/tensorrt` in the user's cache."""
    return user_cache() / "tensorrt"


def engine_folder(
    root: Path, content: str, settings: TensorRtSettings, inputs: Sequence[Array]
) -> Path:
    """The folder of one file's engine for one combination of settings and input shapes.

    ONNX Runtime names engines after the file's name and its nodes' names: two candidates that
    differ only in weights or shapes would share one.
    """
    shapes = [[array.dtype.str, *array.shape] for array in inputs]
    key = [content, settings.model_dump(mode="json", exclude={"label"}), shapes]
    return root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def keep_newest(root: Path, count: int) -> None:
    """Delete all but the most recently used folders, so that a search does not fill the disk."""
    if not root.is_dir():
        return
    folders = [path for path in root.iterdir() if path.is_dir()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime)[:-count]:
        shutil.rmtree(folder, ignore_errors=True)


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _load_libraries(settings: RuntimeSettings) -> None:
    load_libraries(settings)
    # Its packages load TensorRT's libraries when imported; without them, the system's are found.
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorrt")
