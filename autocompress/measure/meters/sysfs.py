"""Boards and machines with sensors in sysfs: the INA chips of Jetson boards, other hwmon meters.

Units are those of the kernel's documents: hwmon (Documentation/hwmon/sysfs-interface) gives
`energy*_input` in microjoules, `power*_input` in microwatts, `in*_input` in millivolts and
`curr*_input` in milliamperes; the older Jetson driver gives `in_power*_input` in milliwatts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from autocompress.device import DeviceProfile
from autocompress.measure.meters.meter import Meter, MeterFacts, Missing

SYSFS = Path("/sys")

_REMEDY = (
    "a board or machine with a power sensor in /sys/class/hwmon or /sys/bus/iio/devices, such as "
    "the INA3221 of Jetson boards, or an INA226 wired into the supply of a Raspberry Pi"
)
# Sensors of what no model runs on, or of a GPU that is not the profile's device.
_NOT_THE_DEVICE = ("amdgpu", "radeon", "nouveau", "i915", "xe", "nvme", "drivetemp")
# Sensors of the whole board, a GPU on it included.
_WHOLE_BOARD = ("ina", "power_meter", "macsmc")
_USUAL_PERIOD_S = 0.1
# A Jetson AGX Orin's memory draws from the rail that is metered beside it.
_FED_BY = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
# A three-channel chip's further numbers are shunt voltages and sums.
_INA3221_CHANNELS = 3


@final
@dataclass(frozen=True)
class Channel:
    """One sensor: the product of its files' numbers, in mJ or mW after the scale."""

    label: str
    files: tuple[Path, ...]
    scale: float

    def read(self) -> float:
        """Millijoules or milliwatts."""
        value = self.scale
        for file in self.files:
            value *= int(file.read_text())
        return value


@final
@dataclass(frozen=True)
class Chip:
    """A chip's sensors of one kind; what it meters is their sum."""

    name: str
    folder: Path
    reads: Literal["counter", "power"]
    channels: tuple[Channel, ...]


@final
class SysfsMeter(Meter):
    """The sum of a chip's channels."""

    def __init__(self, chip: Chip) -> None:
        self._chip = chip
        period_s = _update_interval_s(chip.folder) or _USUAL_PERIOD_S
        labels = " + ".join(channel.label for channel in chip.channels)
        self._facts = MeterFacts(
            name="sysfs",
            scope=f"{chip.name}: {labels}",
            reads=chip.reads,
            update_period_s=period_s,
            poll_s=period_s / (20 if chip.reads == "counter" else 5),
            settle_s=2 * period_s,
            counts_cpu=True,
        )
        self.read()

    @property
    def facts(self) -> MeterFacts:
        """Its update period is the chip's own, else taken to be 100 ms."""
        return self._facts

    def read(self) -> float:
        """The channels' sum."""
        return sum(channel.read() for channel in self._chip.channels)

    def temperature_c(self) -> float | None:
        """Not told."""
        return None

    def other_processes(self) -> int:
        """Not told; what else runs on the machine is seen by its CPU time."""
        return 0

    def close(self) -> None:
        """Nothing is open."""


def find(profile: DeviceProfile, sysfs: Path = SYSFS) -> Meter | Missing:
    """What meters the device: a board's sensors before any other, energy before power.

    Args:
        profile: the device; for a GPU only sensors of a whole board will do.
        sysfs: where sysfs is mounted.
    """
    folders = [*(sysfs / "class/hwmon").glob("*"), *(sysfs / "bus/iio/devices").glob("*")]
    chips = _one_jetson([c for f in sorted(folders) if (c := _chip(f)) is not None])
    boards = [chip for chip in chips if chip.name.startswith(_WHOLE_BOARD)]
    fitting = boards if boards or profile.kind == "cuda" else chips
    fitting = [chip for chip in fitting if chip.reads == "counter"] or fitting
    if not fitting:
        return Missing(f"no power sensor of the device in {sysfs}", _REMEDY)
    if len(fitting) > 1:
        names = ", ".join(f"{chip.name} ({chip.folder})" for chip in fitting)
        return Missing(f"several sensors, and no telling which is the device's: {names}", _REMEDY)
    try:
        return SysfsMeter(fitting[0])
    except (OSError, ValueError) as cause:
        return Missing(f"the sensor {fitting[0].folder} cannot be read: {cause}", _REMEDY)


def _chip(folder: Path) -> Chip | None:
    name = _text(folder / "name")
    if not name or name in _NOT_THE_DEVICE:
        return None
    # The older Jetson driver calls itself by its chip's name and an x.
    name = "ina3221" if name.startswith("ina3221") else name
    counters = _numbered(folder, "energy", 1e-3)
    if counters:
        return Chip(name, folder, "counter", _whole(counters))
    powers = _numbered(folder, "power", 1e-3) or _ina3221(folder) or _old_jetson(folder)
    return Chip(name, folder, "power", _whole(powers)) if powers else None


def _one_jetson(chips: list[Chip]) -> list[Chip]:
    """All INA3221 chips as one: a Jetson board has its rails on up to four of them."""
    parts = [chip for chip in chips if chip.name == "ina3221"]
    if not parts:
        return chips
    rails = {channel.label: channel for chip in parts for channel in chip.channels}
    apart = [rail for label, rail in rails.items() if _FED_BY.get(label) not in rails]
    board = Chip("ina3221", parts[0].folder, "power", _whole(apart))
    return [*(chip for chip in chips if chip.name != "ina3221"), board]


def _numbered(folder: Path, quantity: str, scale: float) -> list[Channel]:
    """Channels such as `energy1_input`, by number."""
    found = []
    for file in folder.glob(f"{quantity}*_*"):
        # ACPI power meters give only an average.
        match = re.fullmatch(rf"{quantity}(\d+)_(input|average)", file.name)
        averaged = match and match[2] == "average"
        if match and not (averaged and (folder / f"{quantity}{match[1]}_input").exists()):
            label = _text(folder / f"{quantity}{match[1]}_label") or f"{quantity}{match[1]}"
            found.append((int(match[1]), Channel(label, (file,), scale)))
    return [channel for _, channel in sorted(found, key=lambda pair: pair[0])]


def _ina3221(folder: Path) -> list[Channel]:
    """Rails with a voltage and a current."""
    channels = []
    for number in range(1, _INA3221_CHANNELS + 1):
        files = (folder / f"in{number}_input", folder / f"curr{number}_input")
        label = _text(folder / f"in{number}_label")
        if label and label != "NC" and all(file.exists() for file in files):
            channels.append(Channel(label, files, 1e-3))
    return channels


def _old_jetson(folder: Path) -> list[Channel]:
    """Rails of the driver in Jetson's kernels before 5.10, an iio device."""
    channels = []
    for number in range(_INA3221_CHANNELS):
        file = folder / f"in_power{number}_input"
        label = _text(folder / f"rail_name_{number}")
        if label and label != "NC" and file.exists():
            channels.append(Channel(label, (file,), 1.0))
    return channels


def _whole(channels: list[Channel]) -> tuple[Channel, ...]:
    """Those channels that hold all others if there are such (`VDD_IN`, `Esocket0`); else all."""
    for channel in channels:
        if re.search(r"_IN$|total|socket", channel.label, re.IGNORECASE):
            same = re.sub(r"\d+", "", channel.label)
            return tuple(c for c in channels if re.sub(r"\d+", "", c.label) == same)
    return tuple(channels)


def _update_interval_s(folder: Path) -> float | None:
    """How often the chip converts anew, where it tells."""
    text = _text(folder / "update_interval")
    return int(text) / 1000 if text.isdigit() and int(text) else None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
