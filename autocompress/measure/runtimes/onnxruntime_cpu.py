"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from autocompress.device import OnnxRuntimeCpuSettings, RuntimeSettings
from autocompress.measure.runtimes.onnxruntime_profile import profile_file
from autocompress.measure.runtimes.onnxruntime_session import (
    OnnxRuntimeSession,
    check_provider,
    import_onnxruntime,
    open_session,
    session_options,
)
from autocompress.measure.session import Array, NodeTime, Placement, Runtime, Session

_PROVIDER = "CPUExecutionProvider"
_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}


@final
class OnnxRuntimeCpu(Runtime):
    """ONNX Runtime's CPU provider; sequential execution, `threads` within an operator."""

    @property
    def name(self) -> str:
        """`onnxruntime`."""
        return "onnxruntime"

    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that ONNX Runtime is installed."""
        check_provider(settings, _PROVIDER)

    def load(self, path: Path, settings: RuntimeSettings, placement: Placement) -> Session:
        """Load a file with the settings' graph optimization."""
        options = _options(settings, placement)
        return OnnxRuntimeSession(open_session(path, settings, options, [_PROVIDER]))

    def start(self, settings: RuntimeSettings, placement: Placement) -> None:
        """Import the library."""
        import_onnxruntime(settings)

    def profile(
        self,
        path: Path,
        settings: RuntimeSettings,
        placement: Placement,
        inputs: Sequence[Array],
        runs: int,
    ) -> tuple[NodeTime, ...]:
        """ONNX Runtime's profile: the nodes of the optimized graph."""
        options = _options(settings, placement)
        return profile_file(path, settings, options, [_PROVIDER], inputs, runs)


def _options(settings: RuntimeSettings, placement: Placement) -> Any:
    assert isinstance(settings, OnnxRuntimeCpuSettings)
    options = session_options(settings, placement.threads)
    level = _LEVELS[settings.graph_optimization]
    levels = import_onnxruntime(settings).GraphOptimizationLevel
    options.graph_optimization_level = getattr(levels, level)
    return options
