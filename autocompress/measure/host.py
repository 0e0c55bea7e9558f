"""Where a device is: this machine, or one that `ssh` reaches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import final

from autocompress.device import DeviceProfile, MachineFacts, local_facts
from autocompress.measure.child import Setup
from autocompress.measure.host_interface import Host
from autocompress.measure.process import ChildProcess
from autocompress.measure.ssh_host import SshHost


@final
class LocalHost(Host):
    """This machine."""

    here = True

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
    return LocalHost(profile) if profile.remote is None else SshHost(profile, profile.remote)
