from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.measure.meters import Meter, Missing
from autocompress.measure.meters.sysfs import find


def add_chip(sysfs: Path, folder: str, **files: object) -> Path:
    path = sysfs / folder
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(f"{content}\n")
    return path


def add_rail(chip: Path, number: int, label: str, millivolts: int, milliamperes: int) -> None:
    (chip / f"in{number}_label").write_text(f"{label}\n")
    (chip / f"in{number}_input").write_text(f"{millivolts}\n")
    (chip / f"curr{number}_input").write_text(f"{milliamperes}\n")


def opened(found: Meter | Missing) -> Meter:
    assert isinstance(found, Meter), found
    return found


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_jetsons_input_rail_holds_the_others(tmp_path: Path, device_profile, kind: str) -> None:
    chip = add_chip(tmp_path, "class/hwmon/hwmon1", name="ina3221", update_interval=20)
    add_rail(chip, 1, "VDD_IN", 5000, 1200)
    add_rail(chip, 2, "VDD_CPU_GPU_CV", 5000, 400)
    # Shunt voltages and sums follow.
    (chip / "in4_input").write_text("99")
    (chip / "curr4_input").write_text("9999")
    meter = opened(find(device_profile(kind=kind), tmp_path))
    assert meter.read() == pytest.approx(6000)
    assert meter.facts.scope == "ina3221: VDD_IN"
    assert meter.facts.reads == "power" and meter.facts.update_period_s == pytest.approx(0.02)


def test_rails_on_two_chips_are_added_once(tmp_path: Path, device_profile) -> None:
    first = add_chip(tmp_path, "class/hwmon/hwmon3", name="ina3221")
    add_rail(first, 1, "VDD_GPU_SOC", 800, 5000)
    add_rail(first, 2, "VDD_CPU_CV", 800, 2500)
    add_rail(first, 3, "VIN_SYS_5V0", 5000, 1000)
    second = add_chip(tmp_path, "class/hwmon/hwmon4", name="ina3221")
    add_rail(second, 1, "NC", 1, 1)
    add_rail(second, 2, "VDDQ_VDD2_1V8AO", 1800, 300)
    meter = opened(find(device_profile(), tmp_path))
    # The memory's rail hangs on VIN_SYS_5V0.
    assert meter.read() == pytest.approx(4000 + 2000 + 5000)
    assert meter.facts.scope == "ina3221: VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"


def test_the_older_jetson_driver(tmp_path: Path, device_profile) -> None:
    add_chip(
        tmp_path,
        "bus/iio/devices/iio:device0",
        name="ina3221x",
        rail_name_0="POM_5V_IN",
        in_power0_input=4300,
        rail_name_1="POM_5V_GPU",
        in_power1_input=900,
    )
    meter = opened(find(device_profile(), tmp_path))
    assert (meter.read(), meter.facts.scope) == (4300.0, "ina3221: POM_5V_IN")


def test_energy_of_all_sockets_in_microjoules(tmp_path: Path, device_profile) -> None:
    add_chip(
        tmp_path,
        "class/hwmon/hwmon0",
        name="amd_energy",
        energy1_label="Ecore000",
        energy1_input=7,
        energy17_label="Esocket0",
        energy17_input=5_000_000,
        energy18_label="Esocket1",
        energy18_input=2_000_000,
    )
    add_chip(tmp_path, "class/hwmon/hwmon1", name="amdgpu", power1_average=90_000_000)
    meter = opened(find(device_profile(), tmp_path))
    assert meter.read() == pytest.approx(7000)
    assert meter.facts.reads == "counter" and meter.facts.scope == "amd_energy: Esocket0 + Esocket1"


def test_a_board_sensor_goes_before_a_chips(tmp_path: Path, device_profile) -> None:
    add_chip(tmp_path, "class/hwmon/hwmon0", name="fam15h_power", power1_input=30_000_000)
    add_chip(tmp_path, "class/hwmon/hwmon1", name="ina226", power1_input=3_500_000)
    assert opened(find(device_profile(), tmp_path)).read() == pytest.approx(3500)


def test_what_is_missing_is_told(tmp_path: Path, device_profile) -> None:
    none = find(device_profile(), tmp_path)
    assert isinstance(none, Missing) and "no power sensor" in none.what
    add_chip(tmp_path, "class/hwmon/hwmon0", name="fam15h_power", power1_input=30_000_000)
    # A CPU's sensor says nothing of a GPU.
    assert isinstance(find(device_profile(kind="cuda"), tmp_path), Missing)
    add_chip(tmp_path, "class/hwmon/hwmon1", name="corsairpsu", power1_input=99_000_000)
    several = find(device_profile(), tmp_path)
    assert isinstance(several, Missing)
    assert "fam15h_power" in several.what and "corsairpsu" in several.what


def test_an_unreadable_sensor_is_told(tmp_path: Path, device_profile) -> None:
    add_chip(tmp_path, "class/hwmon/hwmon0", name="ina226", power1_input="unavailable")
    found = find(device_profile(), tmp_path)
    assert isinstance(found, Missing) and "hwmon0 cannot be read" in found.what
