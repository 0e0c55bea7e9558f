"""CPUs: the RAPL counters of Intel and AMD through Linux's powercap (Documentation/power/powercap).

A package counts its cores and all that is on the chip; DRAM is counted beside it, where there is
such a zone. The zones `core` and `uncore` are inside the package, `psys` around it: adding them
would count twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

from autocompress.device import DeviceProfile, usable_cores
from autocompress.measure.meters.meter import Meter, MeterFacts, Missing

POWERCAP = Path("/sys/class/powercap")
CPUS = Path("/sys/devices/system/cpu")

# The counters are updated about every millisecond (Intel SDM, volume 3, section 15.10).
_PERIOD_S = 0.001
# Often enough for a counter that wraps around after a minute, rarely enough to cost nothing.
_POLL_S = 0.05
_REMEDY = (
    "Linux on an Intel or AMD CPU with a readable /sys/class/powercap/intel-rapl:*/energy_uj "
    "(not in a virtual machine)"
)
_PERMIT = (
    "only root may read the CPU's energy counters since CVE-2020-8694; permit it with `sudo chmod "
    "a+r /sys/class/powercap/intel-rapl:*/energy_uj`, or for good with the udev rule "
    'SUBSYSTEM=="powercap", ACTION=="add", RUN+="/bin/chmod a+r /sys%p/energy_uj"'
)


@final
@dataclass(frozen=True)
class Zone:
    """One counter.

    Attributes:
        label: such as `package 0` or `package 0 DRAM`.
        folder: its folder in the powercap tree.
        range_uj: the counter goes back to zero when it reaches this.
    """

    label: str
    folder: Path
    range_uj: int

    def read_uj(self) -> int:
        """The counter, in microjoules."""
        return int((self.folder / "energy_uj").read_text())


@final
class RaplMeter(Meter):
    """The sum of some zones, whatever their counters' wrap-arounds.

    It must be read at least once per wrap-around: 65 kJ or more, so some minutes at full load.
    """

    def __init__(self, zones: tuple[Zone, ...]) -> None:
        self._zones = zones
        self._last = [zone.read_uj() for zone in zones]
        self._total_uj = 0

    @property
    def facts(self) -> MeterFacts:
        """It counts whatever runs on its packages."""
        return MeterFacts(
            name="rapl",
            scope="CPU " + " + ".join(zone.label for zone in self._zones),
            reads="counter",
            update_period_s=_PERIOD_S,
            poll_s=_POLL_S,
            settle_s=0.0,
            counts_cpu=True,
        )

    def read(self) -> float:
        """Millijoules since the meter was made."""
        for index, zone in enumerate(self._zones):
            now = zone.read_uj()
            self._total_uj += wrapped_difference(self._last[index], now, zone.range_uj)
            self._last[index] = now
        return self._total_uj / 1000

    def temperature_c(self) -> float | None:
        """Not told."""
        return None

    def other_processes(self) -> int:
        """Not told; what else runs on the CPU is seen by its time."""
        return 0

    def close(self) -> None:
        """Nothing is open."""


def wrapped_difference(before: int, after: int, range_uj: int) -> int:
    """How far a counter went that starts again from zero at `range_uj`, at most once."""
    return after - before if after >= before else after - before + range_uj


def find(profile: DeviceProfile, powercap: Path = POWERCAP, cpus: Path = CPUS) -> Meter | Missing:
    """The packages that the profile's cores are on, or all if that is not told.

    Args:
        profile: the device.
        powercap: the powercap tree.
        cpus: the tree that tells which core is on which package.
    """
    packages = [zone for zone in _top_zones(powercap) if _name(zone).startswith("package")]
    if not packages:
        return Missing(f"no intel-rapl zone in {powercap}", _REMEDY)
    used = _packages_of(profile.pinned_cores(usable_cores()), cpus)
    chosen = [p for p in packages if used is None or _number(p) in used] or packages
    try:
        return RaplMeter(tuple(zone for package in chosen for zone in _zones(package)))
    except PermissionError as cause:
        return Missing(f"{cause.filename} may not be read", _PERMIT)
    except (OSError, ValueError) as cause:
        return Missing(f"{chosen[0]} cannot be read: {cause}", _REMEDY)


def _top_zones(powercap: Path) -> list[Path]:
    # `intel-rapl-mmio:*` shows the same counters a second time.
    found = [p for p in powercap.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.partition(":")[2]))


def _zones(package: Path) -> list[Zone]:
    """A package and its DRAM."""
    # A die of a package with several keeps its number: `package-0-die-1`.
    label = _name(package).replace("-", " ")
    zones = [_zone(label, package)]
    # In /sys/class/powercap the inner zones stand beside their package, and inside it too.
    for inner in sorted(package.parent.glob(f"{package.name}:*")):
        if _name(inner) == "dram":
            zones.append(_zone(f"{label} DRAM", inner))
    return zones


def _zone(label: str, folder: Path) -> Zone:
    return Zone(label, folder, int((folder / "max_energy_range_uj").read_text()))


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def _number(package: Path) -> int | None:
    match = re.match(r"package-(\d+)", _name(package))
    return int(match[1]) if match else None


def _packages_of(cores: tuple[int, ...], cpus: Path) -> set[int] | None:
    """The packages that hold some cores; None where it is not told."""
    try:
        return {
            int((cpus / f"cpu{core}" / "topology" / "physical_package_id").read_text())
            for core in cores
        }
    except (OSError, ValueError):
        return None
