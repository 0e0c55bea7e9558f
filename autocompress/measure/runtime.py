"""The runtimes that can measure; a new one is one more file and one entry in `RUNTIMES`."""

from __future__ import annotations

from autocompress.device import RuntimeSettings
from autocompress.errors import DeviceError
from autocompress.measure.onnxruntime_cpu import OnnxRuntimeCpu
from autocompress.measure.session import Array, Runtime, Session

__all__ = ["RUNTIMES", "Array", "Runtime", "Session", "runtime_for"]

RUNTIMES: tuple[Runtime, ...] = (OnnxRuntimeCpu(),)


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
        advice="correct `runtime.name` in the device profile",
    )
