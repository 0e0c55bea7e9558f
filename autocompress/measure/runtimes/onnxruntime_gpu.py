"""What ONNX Runtime's providers for NVIDIA GPUs share: libraries, fixed shapes, fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

import numpy as np

from autocompress.device import RuntimeSettings
from autocompress.device.facts import how_to_install
from autocompress.errors import DeviceError
from autocompress.measure.runtimes.onnxruntime_session import (
    Providers,
    import_onnxruntime,
    open_session,
    session_options,
)
from autocompress.measure.session import Array

_CPU_PACKAGE, _GPU_PACKAGE = "onnxruntime", "onnxruntime-gpu"


@final
@dataclass(frozen=True)
class FileInputs:
    """A file's inputs, in order: their names, and per axis a size, a free size's name, or None."""

    names: tuple[str, ...]
    axes: tuple[tuple[int | str | None, ...], ...]

    def sizes(self, inputs: Sequence[Array]) -> dict[str, int]:
        """The free sizes, by name, as they are in inputs; names that mean two sizes left out."""
        found: dict[str, set[int]] = {}
        for axes, array in zip(self.axes, inputs, strict=True):
            for axis, size in zip(axes, array.shape, strict=False):
                if isinstance(axis, str):
                    found.setdefault(axis, set()).add(size)
        return {name: sizes.pop() for name, sizes in found.items() if len(sizes) == 1}


@final
class FixedSession:
    """A session for one combination of input shapes, fed with ordinary arrays."""

    def __init__(self, session: Any, names: Sequence[str]) -> None:
        self._session = session
        self._names = tuple(names)

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once."""
        feed = dict(zip(self._names, inputs, strict=True))
        return tuple(self._session.run(None, feed))


@final
class BoundSession:
    """A session whose inputs and outputs stay at fixed addresses, as a CUDA graph needs.

    The first run is made at once, so that the graph is captured before anything is timed.

    Args:
        session: ONNX Runtime's session, for one combination of input shapes.
        inputs: of these shapes.
        outputs: of the shapes and types of the outputs.
        device: ONNX Runtime's name of the memory: `cuda` or `cpu`.
        index: of the GPU.
    """

    def __init__(
        self,
        session: Any,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        device: str,
        index: int,
    ) -> None:
        from onnxruntime import OrtValue

        self._session = session
        self._binding = session.io_binding()
        # Copies, for values in host memory are the arrays that they are made of.
        self._inputs = [OrtValue.ortvalue_from_numpy(np.array(x), device, index) for x in inputs]
        self._outputs = [OrtValue.ortvalue_from_numpy(np.array(y), device, index) for y in outputs]
        for item, value in zip(session.get_inputs(), self._inputs, strict=True):
            self._binding.bind_ortvalue_input(item.name, value)
        for item, value in zip(session.get_outputs(), self._outputs, strict=True):
            self._binding.bind_ortvalue_output(item.name, value)
        self._session.run_with_iobinding(self._binding)

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once; the outputs are copies."""
        for value, array in zip(self._inputs, inputs, strict=True):
            value.update_inplace(np.ascontiguousarray(array))
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return tuple(np.array(value.numpy()) for value in self._outputs)


def check_gpu_provider(settings: RuntimeSettings, provider: str) -> None:
    """Check that the installed ONNX Runtime has a provider for GPUs.

    Raises:
        DeviceError: it is not installed, or is the package for CPUs.
    """
    available = tuple(import_onnxruntime(settings).get_available_providers())
    if provider in available:
        return
    advice = how_to_install(settings)
    if _installed(_CPU_PACKAGE) and _installed(_GPU_PACKAGE):
        # Both bring the module `onnxruntime`, and the one that was installed last wins.
        advice = (
            f"pip uninstall {_CPU_PACKAGE} {_GPU_PACKAGE}, then {advice} "
            f"and pip install --force-reinstall --no-deps {_GPU_PACKAGE}"
        )
    raise DeviceError(
        "The installed ONNX Runtime lacks the provider that the device profile needs.",
        given=f"{provider} for runtime {settings.name}",
        allowed=", ".join(available),
        advice=advice,
    )


def load_libraries(settings: RuntimeSettings) -> None:
    """Load CUDA's and cuDNN's libraries from the packages that bring them, if there are any.

    Where there are none, the system's are found by the provider itself.
    """
    preload = getattr(import_onnxruntime(settings), "preload_dlls", None)
    if preload is not None:
        preload()


def file_inputs(path: Path, settings: RuntimeSettings) -> FileInputs:
    """A file's inputs.

    Raises:
        Exception: ONNX Runtime's own errors about the file.
    """
    items = _plain_session(path, settings).get_inputs()
    return FileInputs(tuple(i.name for i in items), tuple(tuple(i.shape) for i in items))


def outputs_like(path: Path, settings: RuntimeSettings, inputs: Sequence[Array]) -> list[Array]:
    """Arrays of the shapes and types of a file's outputs, from a run on the CPU."""
    session = _plain_session(path, settings)
    names = [item.name for item in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def open_fixed(
    path: Path,
    settings: RuntimeSettings,
    threads: int,
    sizes: Mapping[str, int],
    providers: Providers,
) -> Any:
    """ONNX Runtime's session of a file whose free sizes are fixed, on the first of the providers.

    Raises:
        DeviceError: the first provider does not start.
        Exception: ONNX Runtime's own errors about the file.
    """
    options = session_options(settings, threads)
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    return open_session(path, settings, options, providers)


def _plain_session(path: Path, settings: RuntimeSettings) -> Any:
    onnxruntime = import_onnxruntime(settings)
    options = session_options(settings, 1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
