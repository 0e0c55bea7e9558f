"""ONNX Runtime. The library is imported on first use, after the worker has pinned itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from autocompress.device import RuntimeSettings
from autocompress.errors import DeviceError
from autocompress.measure.session import Array, Runtime, Session

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
_ERRORS_ONLY = 3


@final
class OnnxRuntimeSession(Session):
    """A loaded ONNX Runtime session."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = tuple(item.name for item in session.get_inputs())

    @property
    def input_names(self) -> tuple[str, ...]:
        """The model's inputs, in the file's order."""
        return self._names

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once; raises ONNX Runtime's own errors, ValueError for a wrong number of inputs."""
        feed = dict(zip(self._names, inputs, strict=True))
        return tuple(self._session.run(None, feed))


@final
class OnnxRuntimeCpu(Runtime):
    """ONNX Runtime with one provider; sequential execution, `threads` within an operator."""

    @property
    def name(self) -> str:
        """`onnxruntime`."""
        return "onnxruntime"

    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that the installed ONNX Runtime has the provider.

        Raises:
            DeviceError: it is not installed, or lacks the provider.
        """
        onnxruntime = _import()
        available = tuple(onnxruntime.get_available_providers())
        if settings.provider not in available:
            raise DeviceError(
                "The installed ONNX Runtime lacks the profile's provider.",
                given=settings.provider,
                allowed=", ".join(available),
                advice="correct `runtime.provider` in the device profile, or install the "
                "onnxruntime package that holds it (onnxruntime-gpu, onnxruntime-openvino, ...)",
            )

    def load(self, path: Path, settings: RuntimeSettings) -> Session:
        """Load a file with the settings' provider, threads and graph optimization.

        Raises:
            DeviceError: the provider is missing or refuses to start.
            Exception: ONNX Runtime's own errors about the file.
        """
        self.check_available(settings)
        onnxruntime = _import()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        level = _LEVELS[settings.graph_optimization]
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.log_severity_level = _ERRORS_ONLY
        session = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=[settings.provider]
        )
        # ONNX Runtime falls back to the CPU with no more than a warning.
        if session.get_providers()[0] != settings.provider:
            raise DeviceError(
                "ONNX Runtime did not start the profile's provider and fell back to another.",
                given=settings.provider,
                allowed=", ".join(session.get_providers()),
                advice="check the provider's drivers and libraries",
            )
        return OnnxRuntimeSession(session)


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as cause:
        raise DeviceError(
            "The runtime of the device profile cannot be imported.",
            given=f"onnxruntime: {cause}",
            advice="pip install onnxruntime",
        ) from cause
    return onnxruntime
