from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.device import usable_cores
from autocompress.measure.energy import WindowPlan, measure_idle_mw
from autocompress.measure.meters import Meter, Missing
from autocompress.measure.meters.rapl import RaplMeter, Zone, find, wrapped_difference

RANGE_UJ = 262_143_328_850


def add_zone(tree: Path, folder: str, name: str, uj: int = 0, range_uj: int = RANGE_UJ) -> Path:
    path = tree / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


def two_sockets(tree: Path) -> None:
    """Two packages with their parts; the platform's counter and a second view of the first."""
    for number in (0, 1):
        add_zone(tree, f"intel-rapl:{number}", f"package-{number}", 1_000_000)
        add_zone(tree, f"intel-rapl:{number}:0", "core", 500_000)
        add_zone(tree, f"intel-rapl:{number}:1", "dram", 200_000)
    add_zone(tree, "intel-rapl:2", "psys", 9_000_000)
    add_zone(tree, "intel-rapl-mmio:0", "package-0", 1_000_000)


def add_topology(cpus: Path, package: int) -> None:
    for core in usable_cores():
        folder = cpus / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")


@given(
    st.integers(0, 999),
    st.lists(st.integers(0, 999), max_size=40),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wrap_arounds_sum_up(
    tmp_path_factory: pytest.TempPathFactory, start: int, steps: list[int]
) -> None:
    folder = add_zone(tmp_path_factory.mktemp("zone"), "zone", "package-0", start, 1000)
    meter = RaplMeter((Zone("package 0", folder, 1000),))
    total = 0
    for step in steps:
        total += step
        (folder / "energy_uj").write_text(str((start + total) % 1000))
        assert meter.read() == pytest.approx(total / 1000)


def test_a_wrap_around_has_a_closed_form() -> None:
    assert wrapped_difference(10, 25, 100) == 15
    assert wrapped_difference(90, 5, 100) == 15
    assert wrapped_difference(7, 7, 100) == 0


def test_power_is_known_across_a_wrap_around(tmp_path: Path) -> None:
    """A package of 5 W whose counter starts again within the window."""
    folder, range_uj, stop = add_zone(tmp_path, "zone", "package-0"), 2_000_000, threading.Event()
    start = time.monotonic()

    def advance() -> None:
        uj = int(1_500_000 + 5e6 * (time.monotonic() - start)) % range_uj
        (tmp_path / "next").write_text(str(uj))
        # A file that is being written must not be read half.
        (tmp_path / "next").replace(folder / "energy_uj")

    def keep_advancing() -> None:
        while not stop.wait(0.002):
            advance()

    advance()
    writer = threading.Thread(target=keep_advancing)
    writer.start()
    try:
        meter = RaplMeter((Zone("package 0", folder, range_uj),))
        plan = WindowPlan(gap_s=0.0, lead_s=0.01, window_s=0.5)
        assert measure_idle_mw(meter, plan, lambda: None) == pytest.approx(5000, rel=0.1)
    finally:
        stop.set()
        writer.join()


def test_the_package_and_dram_of_the_profiles_cores(tmp_path: Path, device_profile) -> None:
    tree, cpus = tmp_path / "powercap", tmp_path / "cpu"
    two_sockets(tree)
    add_topology(cpus, package=1)
    meter = find(device_profile(), tree, cpus)
    assert isinstance(meter, Meter)
    assert meter.facts.scope == "CPU package 1 + package 1 DRAM"
    assert meter.facts.counts_cpu and meter.facts.reads == "counter"
    # None of the other zones is counted.
    for folder, uj in [("0", 5_000_000), ("1:0", 5_000_000), ("2", 5_000_000)]:
        (tree / f"intel-rapl:{folder}" / "energy_uj").write_text(str(uj))
    assert meter.read() == 0
    (tree / "intel-rapl:1" / "energy_uj").write_text("1003000")
    (tree / "intel-rapl:1:1" / "energy_uj").write_text("200500")
    assert meter.read() == pytest.approx(3.5)


def test_all_packages_if_the_cores_are_not_told(tmp_path: Path, device_profile) -> None:
    two_sockets(tmp_path)
    meter = find(device_profile(), tmp_path, tmp_path / "none")
    assert isinstance(meter, Meter)
    scope = "CPU package 0 + package 0 DRAM + package 1 + package 1 DRAM"
    assert meter.facts.scope == scope


def test_what_is_missing_is_told(tmp_path: Path, device_profile, monkeypatch) -> None:
    none = find(device_profile(), tmp_path / "none")
    assert isinstance(none, Missing) and "no intel-rapl zone" in none.what
    assert "virtual machine" in none.remedy
    two_sockets(tmp_path)
    read_text = Path.read_text

    def forbidding(path: Path, *arguments: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments)

    # As root, which the tests may run as, nothing is forbidden.
    monkeypatch.setattr(Path, "read_text", forbidding)
    forbidden = find(device_profile(), tmp_path)
    assert isinstance(forbidden, Missing)
    assert "energy_uj may not be read" in forbidden.what
    assert "chmod a+r" in forbidden.remedy and "udev" in forbidden.remedy
