"""`DeviceProfile`: what models are compressed for, read from `hw_profiles/*.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from autocompress.config import Strict, find_named, read_yaml, validate
from autocompress.device.runtimes import RuntimeSettings
from autocompress.errors import ConfigError, DeviceError


class MeasuringSettings(Strict):
    """When a measurement may stop; half-widths are shares of the ratio."""

    target_half_width: float = Field(gt=0, lt=1)
    time_limit_s: float = Field(gt=0)
    final_target_half_width: float = Field(gt=0, lt=1)
    final_time_limit_s: float = Field(gt=0)
    hang_limit_s: float = Field(gt=0)
    memory_limit_bytes: int | None = Field(default=None, gt=0)


class EnergySettings(Strict):
    """How energy is metered: `auto` takes the first meter that this device has."""

    meter: Literal["auto", "nvml", "rapl", "sysfs", "zeus"] = "auto"
    target_half_width: float = Field(default=0.02, gt=0, lt=1)
    time_limit_s: float = Field(default=20.0, gt=0)
    final_time_limit_s: float = Field(default=60.0, gt=0)


class RemoteSettings(Strict):
    """Where a device is, if it is not this machine: any host that `ssh` reaches without a password.

    Attributes:
        host: as `ssh` takes it, such as `pi@raspberrypi.local`.
        python: the interpreter there that has autocompress.
        folder: where models and inputs are kept there.
    """

    host: str = Field(min_length=1, pattern=r"^[^-\s]\S*$")
    python: str = "python3"
    folder: str = ".cache/autocompress/remote"


class DeviceProfile(Strict):
    """What models are compressed for: a device, its runtimes and what they reward.

    Attributes:
        runtimes: those that a candidate may run in; the first is the baseline's.
        threads: of every runtime; figures of different thread counts are never compared.
        cores: what the measuring worker is pinned to; `auto` is the last `threads` cores.
        gpu: index of the GPU, for devices of kind `cuda`.
        kernels: bits per value that have real kernels, by ONNX operator.
        integer_sums: whether kernels of 8 bits add two products in 16 bits, and cut what is too
            large; weights for them then take 7 bits. `auto` is tried on the device.
    """

    version: Literal[2]
    name: str
    kind: Literal["cpu", "cuda"]
    runtimes: tuple[RuntimeSettings, ...] = Field(min_length=1)
    threads: int = Field(default=1, ge=1)
    cores: Literal["auto"] | tuple[int, ...] = "auto"
    gpu: int = Field(default=0, ge=0)
    remote: RemoteSettings | None = None
    batch_size: int = Field(default=1, ge=1)
    channel_multiple: int = Field(default=1, ge=1)
    kernels: dict[str, tuple[int, ...]]
    integer_sums: Literal["auto", "exact", "saturating"] = "auto"
    measuring: MeasuringSettings
    energy: EnergySettings = EnergySettings()

    @field_validator("runtimes")
    @classmethod
    def _distinct(cls, value: tuple[RuntimeSettings, ...]) -> tuple[RuntimeSettings, ...]:
        names = [r.full_name for r in value]
        if len(set(names)) != len(names):
            raise ValueError(f"two runtimes are called alike, give them a label: {names}")
        if value[0].optional:
            raise ValueError("the first runtime is the baseline's, and cannot be optional")
        return value

    @property
    def runtime_names(self) -> tuple[str, ...]:
        """The runtimes' full names; the first is the baseline's."""
        return tuple(r.full_name for r in self.runtimes)

    @property
    def integer_weight_bits(self) -> int:
        """Bits of weights for integer kernels: two products of such fit into their sums."""
        return 7 if self.integer_sums == "saturating" else 8

    def runtime(self, full_name: str) -> RuntimeSettings:
        """The settings of one of the runtimes.

        Raises:
            DeviceError: the profile lists no such runtime.
        """
        for settings in self.runtimes:
            if settings.full_name == full_name:
                return settings
        raise DeviceError(
            f"The device profile '{self.name}' lists no such runtime.",
            given=full_name,
            allowed=", ".join(self.runtime_names),
        )

    def pinned_cores(self, available: tuple[int, ...]) -> tuple[int, ...]:
        """The cores that the measuring worker runs on.

        Args:
            available: the cores that the device gives (`usable_cores`).

        Raises:
            DeviceError: the device has no such core, or fewer cores than threads.
        """
        wanted = available[-self.threads :] if self.cores == "auto" else self.cores
        if not set(wanted) <= set(available) or len(wanted) < self.threads:
            raise DeviceError(
                f"Device '{self.name}' asks for cores that this machine does not give.",
                given=f"cores {self.cores}, {self.threads} threads",
                allowed=f"cores {list(available)}",
                advice="correct `cores` or `threads` in the device profile",
            )
        return wanted


def load_profile(name: str, near: Path | None = None) -> DeviceProfile:
    """Read a device profile by short name or path.

    Raises:
        DeviceError: the file is missing, malformed or has unknown keys.
    """
    try:
        path = find_named(name, "hw_profiles", near)
    except ConfigError as cause:
        raise DeviceError(cause.what, given=cause.given, allowed=cause.allowed) from cause
    return validate(DeviceProfile, read_yaml(path, DeviceError), path, DeviceError)
