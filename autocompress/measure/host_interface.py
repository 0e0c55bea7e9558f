"""The interface of a machine that measures: starting its children, bringing files to and fro."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from autocompress.device import MachineFacts


class Child(Protocol):
    """A process on the device that answers one request after another."""

    @property
    def pid(self) -> int:
        """The child's process id on the device."""

    @property
    def running(self) -> bool:
        """Whether the child has not ended yet."""

    def ask(self, request: Mapping[str, Any], silence_s: float) -> dict[str, Any]:
        """Send a request and wait for its answer; see `process.ChildProcess.ask`."""

    def stop(self) -> None:
        """End the child."""

    def remove_stderr(self) -> None:
        """Delete what was kept of the child's standard error."""


class Host(ABC):
    """A machine that measures. Paths of files there are texts, for they mean nothing here.

    Attributes:
        here: whether it is this machine, where what else runs takes the device's cores.
    """

    here: bool

    @abstractmethod
    def start(
        self, module: str, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Start a child there.

        Args:
            module: the module that the child runs.
            scratch: a folder here for the file that keeps the child's standard error.
            environment: variables set for the child on top of those it has.
        """

    @abstractmethod
    def put(self, path: Path) -> str:
        """Make a file of this machine readable there; its path there."""

    @abstractmethod
    def result(self, path: Path) -> str:
        """Where a child there may write what is to become the file `path` here."""

    @abstractmethod
    def fetch(self, path: Path) -> None:
        """Bring what was written to `result(path)` here, and delete it there."""

    @abstractmethod
    def facts(self, scratch: Path) -> MachineFacts:
        """What the machine says of itself.

        Raises:
            DeviceError: it lacks what the profile asks for, or does not answer.
        """
