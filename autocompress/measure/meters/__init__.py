"""The energy meters; a new one is one more file and one entry in `METERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, final

from autocompress.device import DeviceProfile
from autocompress.errors import DeviceError
from autocompress.measure.meters import nvml, rapl, sysfs, zeus_meter
from autocompress.measure.meters.meter import Meter, MeterFacts, Missing

__all__ = ["METERS", "Meter", "MeterFacts", "MeterKind", "Missing", "meter_for"]


@final
@dataclass(frozen=True)
class MeterKind:
    """A way of metering.

    Attributes:
        name: the value of `energy.meter` in a device profile that asks for it.
        covers: kinds of device for which `auto` tries it. RAPL counts no GPU, NVML no CPU.
        find: the device's meter, or why there is none.
    """

    name: str
    covers: tuple[Literal["cpu", "cuda"], ...]
    find: Callable[[DeviceProfile], Meter | Missing]


METERS: Final[tuple[MeterKind, ...]] = (
    MeterKind("nvml", ("cuda",), nvml.find),
    MeterKind("rapl", ("cpu",), rapl.find),
    MeterKind("sysfs", ("cpu", "cuda"), sysfs.find),
    MeterKind("zeus", ("cpu", "cuda"), zeus_meter.find),
)


def meter_for(profile: DeviceProfile) -> Meter:
    """Open the meter that the profile asks for, or the first that this machine has for its kind.

    Raises:
        DeviceError: there is none; the error names what was looked for, what is missing and what
            would provide it.
    """
    wanted = profile.energy.meter
    tried = [m for m in METERS if m.name == wanted or (wanted, profile.kind) in _auto(m)]
    missing: list[tuple[str, Missing]] = []
    for kind in tried:
        found = kind.find(profile)
        if isinstance(found, Meter):
            return found
        missing.append((kind.name, found))
    raise DeviceError(
        "Energy cannot be measured: this device has no energy meter that can be read. "
        + "; ".join(f"{name}: {why.what}" for name, why in missing),
        given=f"energy.meter {wanted}, a device of kind {profile.kind}",
        allowed="; ".join(f"{name}: {why.remedy}" for name, why in missing),
        advice="provide one of these, or leave energy out of the objectives and limits",
    )


def _auto(kind: MeterKind) -> list[tuple[str, str]]:
    return [("auto", covered) for covered in kind.covers]
