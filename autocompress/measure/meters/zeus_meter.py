"""AMD GPUs, Jetson boards and Apple chips through the library `zeus` (ml.energy/zeus)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

from autocompress.device import DeviceProfile
from autocompress.measure.meters.meter import Meter, MeterFacts, Missing

_INSTALL = "pip install 'autocompress[zeus]', for AMD GPUs, Jetson boards and Apple chips"
# AMD's counters move faster; zeus reads a Jetson's sensors, and Apple's chips answer, this often.
_PERIOD_S = 0.1
_POWER_SETTLES_S = 1.0
# Parts of an Apple chip that do not hold each other.
_APPLE_PARTS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")
_JETSON_PARTS = ("cpu_energy_mj", "gpu_energy_mj")
_JETSON_WHOLE = "total_energy_mj"


@final
@dataclass(frozen=True)
class _Source:
    """One of zeus's devices, as functions."""

    scope: str
    reads: Literal["counter", "power"]
    read: Callable[[], float]
    temperature_c: Callable[[], float | None]
    counts_cpu: bool


@final
class ZeusMeter(Meter):
    """One of zeus's devices."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._facts = MeterFacts(
            name="zeus",
            scope=source.scope,
            reads=source.reads,
            update_period_s=_PERIOD_S,
            poll_s=_PERIOD_S / 10,
            settle_s=2 * _PERIOD_S if source.reads == "counter" else _POWER_SETTLES_S,
            counts_cpu=source.counts_cpu,
        )

    @property
    def facts(self) -> MeterFacts:
        """Its update period is taken to be 100 ms."""
        return self._facts

    def read(self) -> float:
        """What zeus tells, in mJ or mW."""
        return self._source.read()

    def temperature_c(self) -> float | None:
        """A GPU's; not told for a chip."""
        return self._source.temperature_c()

    def other_processes(self) -> int:
        """Not told."""
        return 0

    def close(self) -> None:
        """Zeus keeps its devices until the process ends."""


def find(profile: DeviceProfile) -> Meter | Missing:
    """A GPU for profiles of kind `cuda`, else a chip that holds the CPU."""
    try:
        gpus, chips = (importlib.import_module(f"zeus.device.{part}") for part in ("gpu", "soc"))
    except ImportError as cause:
        return Missing(f"the library zeus is not installed ({cause})", _INSTALL)
    reasons = []
    finders: list[Callable[[], _Source]] = [lambda: _chip(chips)]
    if profile.kind == "cuda":
        finders.insert(0, lambda: _gpu(gpus, profile.gpu))
    for finder in finders:
        try:
            return ZeusMeter(finder())
        # Each of its back ends raises errors of its own where there is no such device.
        except Exception as cause:
            reasons.append(str(cause) or type(cause).__name__)
    return Missing("zeus finds no device: " + "; ".join(reasons), _INSTALL)


def _gpu(module: Any, index: int) -> _Source:
    gpus = module.get_gpus()
    counts = bool(gpus.supports_get_total_energy_consumption(index))

    def counter_mj() -> float:
        return float(gpus.get_total_energy_consumption(index))

    def power_mw() -> float:
        return float(gpus.get_instant_power_usage(index))

    def temperature_c() -> float | None:
        return float(gpus.get_gpu_temperature(index))

    read = counter_mj if counts else power_mw
    read()
    scope = f"GPU {index} ({gpus.get_name(index)}), whole board"
    return _Source(scope, "counter" if counts else "power", read, temperature_c, counts_cpu=False)


def _chip(module: Any) -> _Source:
    chip = module.get_soc()
    told = set(chip.get_available_metrics())
    if _JETSON_WHOLE in told:
        parts: tuple[str, ...] = (_JETSON_WHOLE,)
    else:
        parts = tuple(part for part in (*_JETSON_PARTS, *_APPLE_PARTS) if part in told)
    if not parts:
        raise ValueError(f"{type(chip).__name__} tells no energy")

    def counter_mj() -> float:
        now = chip.get_total_energy_consumption()
        return float(sum(getattr(now, part) for part in parts))

    labels = " + ".join(part.removesuffix("_mj").removesuffix("_energy") for part in parts)
    scope = f"{type(chip).__name__}: {labels}"
    return _Source(scope, "counter", counter_mj, lambda: None, counts_cpu=True)
