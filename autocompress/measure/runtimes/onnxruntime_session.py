"""What all of ONNX Runtime's providers share. The library is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from autocompress.device import RuntimeSettings
from autocompress.device.facts import how_to_install
from autocompress.errors import DeviceError
from autocompress.measure.session import Array, Session

Providers = Sequence[str | tuple[str, Mapping[str, Any]]]
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


def import_onnxruntime(settings: RuntimeSettings) -> Any:
    """The library.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as cause:
        raise DeviceError(
            "The runtime of the device profile cannot be imported.",
            given=f"{settings.name}: {cause}",
            advice=how_to_install(settings),
        ) from cause
    return onnxruntime


def check_provider(settings: RuntimeSettings, provider: str) -> None:
    """Check that the installed ONNX Runtime has a provider.

    Raises:
        DeviceError: it is not installed, or lacks the provider.
    """
    available = tuple(import_onnxruntime(settings).get_available_providers())
    if provider not in available:
        raise DeviceError(
            "The installed ONNX Runtime lacks the provider that the device profile needs.",
            given=f"{provider} for runtime {settings.name}",
            allowed=", ".join(available),
            advice=how_to_install(settings),
        )


def session_options(settings: RuntimeSettings, threads: int) -> Any:
    """Sequential execution, `threads` within an operator, errors only in the log."""
    onnxruntime = import_onnxruntime(settings)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    return options


def open_session(path: Path, settings: RuntimeSettings, options: Any, providers: Providers) -> Any:
    """ONNX Runtime's own session of a file, on the first of the providers.

    Raises:
        DeviceError: the provider refuses to start.
        Exception: ONNX Runtime's own errors about the file.
    """
    session = import_onnxruntime(settings).InferenceSession(
        str(path), sess_options=options, providers=list(providers)
    )
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    # ONNX Runtime falls back to the CPU with no more than a warning.
    if session.get_providers()[0] != wanted:
        raise DeviceError(
            "ONNX Runtime did not start the profile's provider and fell back to another.",
            given=wanted,
            allowed=", ".join(session.get_providers()),
            advice="check the provider's drivers and libraries",
        )
    return session
