"""The interface that every runtime implements: `Runtime` loads a file into a `Session`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy.typing as npt

from autocompress.device import RuntimeSettings

Array = npt.NDArray[Any]


@final
@dataclass(frozen=True)
class Placement:
    """Where on the device a runtime runs: threads on the pinned cores, and the GPU's index."""

    threads: int
    gpu: int = 0


@final
@dataclass(frozen=True)
class NodeTime:
    """What a runtime's own profile says of one node that it ran, after its own optimizations.

    Attributes:
        name: the runtime's name of the node; it often holds the name from the ONNX file.
        operator: the runtime's operator, such as `Conv`, `QLinearConv` or `Reorder`.
        kernel: the implementation that ran it, as far as the runtime tells; else empty.
        milliseconds: a robust mean over the profiled runs; each runtime says which.
        inputs: types and shapes of its inputs, such as `float32[1,3,8,8]`; empty if not told.
        outputs: likewise.
        origins: names of the ONNX file's nodes that it stands for; empty if not told.
    """

    name: str
    operator: str
    kernel: str
    milliseconds: float
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> NodeTime:
        """Read back what `dataclasses.asdict` and JSON made of it."""
        lists = {name: tuple(data[name]) for name in ("inputs", "outputs", "origins")}
        return NodeTime(**{**data, **lists})


class Session(ABC):
    """A loaded model, ready to run; not shared between threads."""

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """The model's inputs, in the order in which `run` takes them."""

    @abstractmethod
    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run the model once.

        Args:
            inputs: one array per input, in the order of `input_names`; first axis is the batch.

        Returns:
            All outputs, in the model's order, in host memory and finished.

        Raises:
            Exception: whatever the runtime raises; the worker turns it into MeasurementError.
        """


class Runtime(ABC):
    """One way of running ONNX files; stateless. Its library is imported on first use.

    Every method takes the settings that name this runtime (`DeviceProfile.runtimes`).
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The value of `RuntimeSettings.name` that this runtime serves."""

    @abstractmethod
    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that this machine can run models as the settings ask.

        Raises:
            DeviceError: the runtime or what the settings ask for is not there; the error names
                what to install.
        """

    @abstractmethod
    def load(self, path: Path, settings: RuntimeSettings, placement: Placement) -> Session:
        """Load an ONNX file.

        Raises:
            DeviceError: the runtime is not available as the settings ask.
            Exception: whatever the runtime raises about the file.
        """

    @abstractmethod
    def start(self, settings: RuntimeSettings, placement: Placement) -> None:
        """Do what any first model would make the runtime do: import it, load its plugins.

        A model's memory is counted from here.
        """

    @abstractmethod
    def profile(
        self,
        path: Path,
        settings: RuntimeSettings,
        placement: Placement,
        inputs: Sequence[Array],
        runs: int,
    ) -> tuple[NodeTime, ...]:
        """The runtime's own profile of a file: its nodes in the order in which they ran.

        Args:
            inputs: one array per model input.
            runs: how often to run; the times are robust means over these.

        Raises:
            MeasurementError: the runtime has no profile with these settings.
            Exception: whatever the runtime raises about the file.
        """
