"""The interface that every runtime implements: `Runtime` loads a file into a `Session`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from autocompress.device import RuntimeSettings

Array = npt.NDArray[Any]


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
    """One way of running ONNX files; stateless."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The value of `RuntimeSettings.name` that this runtime serves."""

    @abstractmethod
    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that this machine can run models as the settings ask.

        Raises:
            DeviceError: the runtime or its provider is not installed.
        """

    @abstractmethod
    def load(self, path: Path, settings: RuntimeSettings) -> Session:
        """Load an ONNX file.

        Raises:
            DeviceError: the runtime or its provider is not available.
            Exception: whatever the runtime raises about the file.
        """
