"""NVIDIA GPUs: NVML's energy counter, else its power reading."""

from __future__ import annotations

import os
from typing import Literal, final

from autocompress.device import DeviceProfile
from autocompress.device.nvml_gpu import NvmlGpu, others
from autocompress.errors import DeviceError
from autocompress.measure.meters.meter import Meter, MeterFacts, Missing
from autocompress.measure.meters.trace import poll, update_period_s

_REMEDY = "an NVIDIA GPU with its driver (libnvidia-ml)"
# Both move about every 100 ms (Yang et al., SC24, arXiv 2312.02741, section 4).
_USUAL_PERIOD_S = 0.1
_WATCHED_S = 0.5
_WATCH_EVERY_S = 0.001
# From Ampere on the power reading is the mean of the last second (NVML's manual).
_POWER_SETTLES_S = 1.0


@final
class NvmlMeter(Meter):
    """The whole board of one GPU.

    The sensors of A100 and H100 see only a quarter of the time (Yang et al.): one window of a model
    whose run takes about as long as the sensor's period may be far off, so windows begin at random
    offsets and many are taken; see `energy.sample_energy`.
    """

    def __init__(self, gpu: NvmlGpu, reads: Literal["counter", "power"]) -> None:
        self._gpu = gpu
        self._reads = reads
        watched = poll(self.read, _WATCHED_S, _WATCH_EVERY_S)
        period_s = update_period_s(watched) or _USUAL_PERIOD_S
        self._facts = MeterFacts(
            name="nvml",
            scope=f"GPU {gpu.index} ({gpu.name}), whole board",
            reads=reads,
            update_period_s=period_s,
            poll_s=period_s / 20,
            settle_s=2 * period_s if reads == "counter" else _POWER_SETTLES_S,
            counts_cpu=False,
        )

    @property
    def facts(self) -> MeterFacts:
        """Its update period has been watched when it was opened."""
        return self._facts

    def read(self) -> float:
        """NVML's total energy in mJ, or its power in mW."""
        if self._reads == "counter":
            return float(self._gpu.nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu.handle))
        return float(self._gpu.nvml.nvmlDeviceGetPowerUsage(self._gpu.handle))

    def temperature_c(self) -> float | None:
        """The GPU's core temperature."""
        nvml = self._gpu.nvml
        try:
            return float(nvml.nvmlDeviceGetTemperature(self._gpu.handle, nvml.NVML_TEMPERATURE_GPU))
        except nvml.NVMLError:
            return None

    def other_processes(self) -> int:
        """Processes with memory on the GPU, but for this one."""
        return len(others(self._gpu.process_bytes(), os.getpid()))

    def close(self) -> None:
        """Give the driver's library back."""
        self._gpu.close()


def find(profile: DeviceProfile) -> Meter | Missing:
    """The meter of the profile's GPU."""
    try:
        gpu = NvmlGpu(profile.gpu)
    except DeviceError as cause:
        return Missing(cause.what, _REMEDY)
    reads = _reads(gpu)
    if reads is None:
        gpu.close()
        return Missing(f"GPU {gpu.index} ({gpu.name}) tells neither energy nor power", _REMEDY)
    return NvmlMeter(gpu, reads)


def _reads(gpu: NvmlGpu) -> Literal["counter", "power"] | None:
    """What the GPU tells: energy from Volta on, power on most."""
    nvml = gpu.nvml
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)
        return "counter"
    except nvml.NVMLError:
        pass
    try:
        nvml.nvmlDeviceGetPowerUsage(gpu.handle)
        return "power"
    except nvml.NVMLError:
        return None
