"""Where a device is: starting its children there, and bringing files there and back."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import final

from autocompress.device import DeviceProfile, MachineFacts, local_facts
from autocompress.measure.child import Setup
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


@final
class LocalHost(Host):
    """This machine."""

    def __init__(self, profile: DeviceProfile) -> None:
        self._profile = profile

    def start(
        self, module: str, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> ChildProcess:
        """Start a child that dies with this process."""
        setup = Setup(os.getpid(), self._profile)
        return ChildProcess.local(module, setup, scratch, environment)

    def put(self, path: Path) -> str:
        """The path itself."""
        return str(path.resolve())

    def result(self, path: Path) -> str:
        """The path itself."""
        return str(path.resolve())

    def fetch(self, path: Path) -> None:
        """Nothing to do."""

    def facts(self, scratch: Path) -> MachineFacts:
        """See `device.local_facts`; the profile's cores are checked too."""
        facts = local_facts(self._profile)
        self._profile.pinned_cores(facts.cores)
        return facts


def host_of(profile: DeviceProfile) -> Host:
    """The machine that a profile's device is."""
    return LocalHost(profile)
