from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from types import ModuleType

import pytest

from autocompress.measure.meters import Meter, Missing
from autocompress.measure.meters.zeus_meter import find


@dataclass
class Gpus:
    """As `zeus.device.gpu.GPUs` answers for an AMD GPU."""

    counts: bool

    def supports_get_total_energy_consumption(self, index: int) -> bool:
        return self.counts

    def get_total_energy_consumption(self, index: int) -> int:
        return 1000 + index

    def get_instant_power_usage(self, index: int) -> int:
        return 200_000 + index

    def get_gpu_temperature(self, index: int) -> int:
        return 50 + index

    def get_name(self, index: int) -> str:
        return "AMD Instinct"


@dataclass
class Energies:
    """As zeus's measurements of a Jetson and of an Apple chip, in one."""

    total_energy_mj: float | None = None
    cpu_energy_mj: float | None = None
    gpu_energy_mj: float | None = None
    cpu_total_mj: int | None = None
    efficiency_cores_mj: tuple[int, ...] | None = None
    dram_mj: int | None = None


@dataclass
class Chip:
    energies: Energies

    def get_available_metrics(self) -> set[str]:
        values = {f.name: getattr(self.energies, f.name) for f in fields(self.energies)}
        return {name for name, value in values.items() if value is not None}

    def get_total_energy_consumption(self) -> Energies:
        return self.energies


def install(monkeypatch: pytest.MonkeyPatch, gpus: Gpus | None, chip: Chip | None) -> None:
    """Put a stand-in for the library in place; None is a device that is not there."""

    def give(device: object) -> object:
        if device is None:
            raise RuntimeError("no such device")
        return device

    names = ("zeus", "zeus.device", "zeus.device.gpu", "zeus.device.soc")
    modules = {name: ModuleType(name) for name in names}
    modules["zeus.device.gpu"].get_gpus = lambda: give(gpus)  # type: ignore[attr-defined]
    modules["zeus.device.soc"].get_soc = lambda: give(chip)  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("counts", "reads", "value"), [(True, "counter", 1001), (False, "power", 200_001)]
)
def test_a_gpu(monkeypatch, device_profile, counts: bool, reads: str, value: int) -> None:
    install(monkeypatch, Gpus(counts), None)
    meter = find(device_profile(kind="cuda", gpu=1))
    assert isinstance(meter, Meter)
    assert (meter.facts.reads, meter.read(), meter.temperature_c()) == (reads, value, 51)
    assert meter.facts.scope == "GPU 1 (AMD Instinct), whole board" and not meter.facts.counts_cpu


@pytest.mark.parametrize(
    ("energies", "value", "parts"),
    [
        (Energies(total_energy_mj=70.0, cpu_energy_mj=30.0), 70, "total"),
        (Energies(cpu_energy_mj=30.0, gpu_energy_mj=5.0), 35, "cpu + gpu"),
        (Energies(cpu_total_mj=40, efficiency_cores_mj=(9, 9), dram_mj=2), 42, "cpu_total + dram"),
    ],
)
def test_a_chip(monkeypatch, device_profile, energies: Energies, value: float, parts: str) -> None:
    install(monkeypatch, None, Chip(energies))
    meter = find(device_profile())
    assert isinstance(meter, Meter)
    assert (meter.read(), meter.facts.scope) == (value, f"Chip: {parts}")
    assert meter.facts.counts_cpu and meter.temperature_c() is None


def test_a_gpu_is_no_meter_of_the_cpu(monkeypatch, device_profile) -> None:
    install(monkeypatch, Gpus(True), None)
    found = find(device_profile())
    assert isinstance(found, Missing) and "no such device" in found.what


def test_the_extra_is_named(monkeypatch, device_profile) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    found = find(device_profile())
    assert isinstance(found, Missing)
    assert "not installed" in found.what and "autocompress[zeus]" in found.remedy


def test_the_library_has_what_is_used() -> None:
    common = pytest.importorskip("zeus.device.gpu.common", reason="zeus is not installed")
    apple = pytest.importorskip("zeus.device.soc.apple").AppleSiliconMeasurement
    jetson = pytest.importorskip("zeus.device.soc.jetson").JetsonMeasurement
    for name in vars(Gpus):
        if not name.startswith("_") and name != "counts":
            assert hasattr(common.GPUs, name)
    told = {field.name for measurement in (apple, jetson) for field in fields(measurement)}
    parts = {"cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj"}
    assert parts | {field.name for field in fields(Energies)} <= told
