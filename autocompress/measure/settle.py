"""A profile as its device turns out to be."""

from __future__ import annotations

from pathlib import Path

from autocompress.device import DeviceProfile, MachineFacts
from autocompress.measure.abilities import Abilities, settled
from autocompress.measure.host import host_of
from autocompress.measure.host_interface import Host

# Some runtimes compile for minutes.
_SILENCE_S = 600.0


def settle(
    profile: DeviceProfile, scratch: Path, host: Host | None = None
) -> tuple[DeviceProfile, MachineFacts, tuple[str, ...]]:
    """Ask the device what it can do; see `abilities.settled`.

    Args:
        scratch: a folder for the standard error of the process that tries.
        host: where the device is; None for what the profile says.

    Returns:
        The profile, what the machine says of itself, and notes, one sentence each.

    Raises:
        DeviceError: the device does not answer, or cannot run a runtime that is not optional.
    """
    host = host or host_of(profile)
    facts = host.facts(scratch)
    child = host.start("autocompress.measure.worker", scratch)
    try:
        answer = child.ask({"operation": "abilities"}, _SILENCE_S)
    finally:
        child.stop()
        child.remove_stderr()
    found, notes = settled(profile, Abilities.model_validate(answer))
    return found, facts, notes
