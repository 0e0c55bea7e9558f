"""Device profiles (`hw_profiles/*.yaml`) and the fingerprint that every result carries."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field

from autocompress.config import Strict, find_named, read_yaml, validate
from autocompress.errors import ConfigError, DeviceError

# Instruction sets that change which kernels a runtime picks.
_KERNEL_FLAGS = [
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
]


class RuntimeSettings(Strict):
    """The runtime that will run the models, and how it is set up."""

    name: Literal["onnxruntime"]
    provider: str
    threads: int = Field(ge=1)
    graph_optimization: Literal["all", "extended", "basic", "none"] = "all"


class MeasuringSettings(Strict):
    """When a latency measurement may stop; half-widths are shares of the ratio."""

    target_half_width: float = Field(gt=0, lt=1)
    time_limit_s: float = Field(gt=0)
    final_target_half_width: float = Field(gt=0, lt=1)
    final_time_limit_s: float = Field(gt=0)
    hang_limit_s: float = Field(gt=0)


class DeviceProfile(Strict):
    """What models are compressed for: a device, its runtime and what they reward."""

    version: Literal[1]
    name: str
    kind: Literal["cpu"]
    runtime: RuntimeSettings
    cores: Literal["auto"] | tuple[int, ...] = "auto"
    batch_size: int = Field(default=1, ge=1)
    channel_multiple: int = Field(default=1, ge=1)
    kernels: dict[str, tuple[int, ...]]
    measuring: MeasuringSettings

    def pinned_cores(self) -> tuple[int, ...]:
        """The cores that the measuring worker runs on.

        Raises:
            DeviceError: the machine has no such core, or fewer cores than threads.
        """
        available = usable_cores()
        threads = self.runtime.threads
        wanted = tuple(available[-threads:]) if self.cores == "auto" else self.cores
        if not set(wanted) <= set(available) or len(wanted) < threads:
            raise DeviceError(
                f"Device '{self.name}' asks for cores that this machine does not give.",
                given=f"cores {self.cores}, {threads} threads",
                allowed=f"cores {available}",
                advice="correct `cores` or `threads` in the device profile",
            )
        return wanted


class Fingerprint(Strict):
    """What must be equal for two measurements to be comparable."""

    profile: str
    cpu_model: str
    instruction_sets: tuple[str, ...]
    runtime: str
    runtime_version: str
    provider: str
    threads: int
    batch_size: int
    graph_optimization: str

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the whole fingerprint."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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


def usable_cores() -> list[int]:
    """The cores that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_facts() -> tuple[str, tuple[str, ...]]:
    """The CPU's model, and those of its instruction sets that change which kernels are picked."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return model, ()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return model, tuple(flag for flag in _KERNEL_FLAGS if flag in flags)


def fingerprint(profile: DeviceProfile) -> Fingerprint:
    """The fingerprint of this machine under a profile.

    Raises:
        DeviceError: the profile's runtime is not installed.
    """
    runtime = profile.runtime
    try:
        version = metadata.version(runtime.name)
    except metadata.PackageNotFoundError as cause:
        raise DeviceError(
            "The runtime of the device profile is not installed.",
            given=runtime.name,
            advice=f"pip install {runtime.name}",
        ) from cause
    model, flags = cpu_facts()
    return Fingerprint(
        profile=profile.name,
        cpu_model=model,
        instruction_sets=flags,
        runtime=runtime.name,
        runtime_version=version,
        provider=runtime.provider,
        threads=runtime.threads,
        batch_size=profile.batch_size,
        graph_optimization=runtime.graph_optimization,
    )


def all_cores(profile: DeviceProfile) -> DeviceProfile:
    """The same device with a thread on every core: for accuracy, where time does not matter."""
    cores = tuple(usable_cores())
    runtime = profile.runtime.model_copy(update={"threads": len(cores)})
    return profile.model_copy(update={"runtime": runtime, "cores": cores})
