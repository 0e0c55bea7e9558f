"""ONNX Runtime on an NVIDIA GPU, through its CUDA provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import numpy as np

from autocompress.device import OnnxRuntimeCudaSettings, RuntimeSettings
from autocompress.errors import MeasurementError
from autocompress.measure.runtimes.by_shape import ByShape, Compiled
from autocompress.measure.runtimes.onnx_files import trivial_model
from autocompress.measure.runtimes.onnxruntime_gpu import (
    BoundSession,
    check_gpu_provider,
    file_inputs,
    load_libraries,
    open_fixed,
    outputs_like,
)
from autocompress.measure.runtimes.onnxruntime_session import (
    OnnxRuntimeSession,
    open_session,
    session_options,
)
from autocompress.measure.session import Array, NodeTime, Placement, Runtime, Session

PROVIDER = "CUDAExecutionProvider"


@final
class OnnxRuntimeCuda(Runtime):
    """ONNX Runtime's CUDA provider; nodes without a CUDA kernel run on the CPU.

    Inputs and outputs are copied to and from the GPU in each run. With CUDA graphs a model is
    loaded for each combination of input shapes; a model with nodes that run on the CPU is then
    refused by ONNX Runtime.
    """

    @property
    def name(self) -> str:
        """`onnxruntime_cuda`."""
        return "onnxruntime_cuda"

    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that ONNX Runtime is installed with its CUDA provider."""
        check_gpu_provider(settings, PROVIDER)

    def load(self, path: Path, settings: RuntimeSettings, placement: Placement) -> Session:
        """Load a file; with CUDA graphs, once shapes are known."""
        assert isinstance(settings, OnnxRuntimeCudaSettings)
        check_gpu_provider(settings, PROVIDER)
        load_libraries(settings)
        providers = [(PROVIDER, provider_options(settings, placement))]
        if not settings.cuda_graphs:
            options = session_options(settings, placement.threads)
            return OnnxRuntimeSession(open_session(path, settings, options, providers))
        found = file_inputs(path, settings)

        def compile_for(inputs: Sequence[Array]) -> Compiled:
            sizes = found.sizes(inputs)
            session = open_fixed(path, settings, placement.threads, sizes, providers)
            outputs = outputs_like(path, settings, inputs)
            return BoundSession(session, inputs, outputs, "cuda", placement.gpu).run

        return ByShape(found.names, compile_for)

    def start(self, settings: RuntimeSettings, placement: Placement) -> None:
        """Load CUDA and its libraries by running a trivial model."""
        import onnx

        with TemporaryDirectory(prefix="autocompress-cuda-") as folder:
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
        """ONNX Runtime times how long the host takes to launch a node, not the node.

        Raises:
            MeasurementError: always.
        """
        raise no_profile(settings)


def provider_options(settings: OnnxRuntimeCudaSettings, placement: Placement) -> dict[str, str]:
    """What the provider is told; the names are those of ONNX Runtime's documentation."""
    return {
        "device_id": str(placement.gpu),
        "use_tf32": str(int(settings.tf32)),
        # cuDNN's algorithms are tried out when a shape is new, not guessed.
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "enable_cuda_graph": str(int(settings.cuda_graphs)),
    }


def no_profile(settings: RuntimeSettings) -> MeasurementError:
    """The error that says that ONNX Runtime has no times of nodes on a GPU."""
    return MeasurementError(
        "ONNX Runtime has no times of single nodes on a GPU: it times their launch by the host.",
        given=settings.full_name,
        advice="profile the model in the runtime `pytorch`, or with NVIDIA Nsight Systems",
    )
