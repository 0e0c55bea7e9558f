"""The runtimes that can measure; a new one is one more file and one entry in `RUNTIMES`."""

from __future__ import annotations

from autocompress.device import RuntimeSettings
from autocompress.errors import DeviceError
from autocompress.measure.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from autocompress.measure.runtimes.onnxruntime_cuda import OnnxRuntimeCuda
from autocompress.measure.runtimes.openvino import OpenVino
from autocompress.measure.runtimes.pytorch import PyTorch
from autocompress.measure.runtimes.tensorrt import TensorRt
from autocompress.measure.session import Runtime

__all__ = ["RUNTIMES", "runtime_for"]

RUNTIMES: tuple[Runtime, ...] = (
    OnnxRuntimeCpu(),
    OpenVino(),
    OnnxRuntimeCuda(),
    TensorRt(),
    PyTorch(),
)


def runtime_for(settings: RuntimeSettings) -> Runtime:
    """The runtime that the settings name.

    Raises:
        DeviceError: there is no such runtime.
    """
    for runtime in RUNTIMES:
        if runtime.name == settings.name:
            return runtime
    raise DeviceError(
        "There is no such runtime.",
        given=settings.name,
        allowed=", ".join(runtime.name for runtime in RUNTIMES),
        advice="correct `runtimes` in the device profile",
    )
