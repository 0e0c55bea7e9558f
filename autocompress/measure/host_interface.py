"""The interface of a machine that measures: starting its children, bringing files to and fro."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from autocompress.device import MachineFacts
from autocompress.measure.process import ChildProcess


class Host(ABC):
    """A machine that measures. Paths of files there are texts, for they mean nothing here."""

    @abstractmethod
    def start(
        self, module: str, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> ChildProcess:
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
