"""What a machine is, and the fingerprint that tells which figures may be compared."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

from autocompress.config import Strict
from autocompress.device.nvml_gpu import NvmlGpu
from autocompress.device.profile import DeviceProfile
from autocompress.device.runtimes import RuntimeSettings
from autocompress.errors import DeviceError

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


class MachineFacts(Strict):
    """What the machine says of itself that changes figures.

    Attributes:
        cores: those that a process may run on, in order.
        accelerator: the GPU's name and driver; empty for a CPU.
        versions: of each of the profile's runtimes that is installed, by full name.
    """

    cpu_model: str
    instruction_sets: tuple[str, ...]
    cores: tuple[int, ...]
    accelerator: str
    versions: dict[str, str]


class RuntimeFacts(Strict):
    """A runtime as it stood when it was measured: its version and all its settings."""

    name: str
    version: str
    settings: dict[str, Any]


class Fingerprint(Strict):
    """What must be equal for two measurements to be comparable.

    Runtimes of one device do share a front; all else must be equal.
    """

    profile: str
    kind: str
    cpu_model: str
    instruction_sets: tuple[str, ...]
    accelerator: str
    threads: int
    batch_size: int
    runtimes: tuple[RuntimeFacts, ...]

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the device, whatever its runtimes."""
        return _digest(self.model_dump(mode="json", exclude={"runtimes"}))

    def runtime(self, name: str) -> RuntimeFacts:
        """The runtime of a full name."""
        return next(r for r in self.runtimes if r.name == name)

    def runtime_id(self, name: str) -> str:
        """Twelve hexadecimal digits that stand for the device and one of its runtimes."""
        return _digest([self.id, self.runtime(name).model_dump(mode="json")])


def differences(first: Fingerprint, second: Fingerprint) -> tuple[str, ...]:
    """What keeps figures of two devices apart, as `field: one, other`; empty if nothing does."""
    fields = [name for name in Fingerprint.model_fields if name != "runtimes"]
    return tuple(
        f"{name}: {getattr(first, name)}, {getattr(second, name)}"
        for name in fields
        if getattr(first, name) != getattr(second, name)
    )


def make_fingerprint(profile: DeviceProfile, facts: MachineFacts) -> Fingerprint:
    """The fingerprint of a machine under a profile."""
    return Fingerprint(
        profile=profile.name,
        kind=profile.kind,
        cpu_model=facts.cpu_model,
        instruction_sets=facts.instruction_sets,
        accelerator=facts.accelerator,
        threads=profile.threads,
        batch_size=profile.batch_size,
        runtimes=tuple(
            RuntimeFacts(
                name=r.full_name,
                version=facts.versions[r.full_name],
                settings=r.model_dump(mode="json", exclude={"label", "optional"}),
            )
            for r in profile.runtimes
            if r.full_name in facts.versions
        ),
    )


def local_facts(profile: DeviceProfile) -> MachineFacts:
    """What this machine is, as far as the profile's figures depend on it.

    Raises:
        DeviceError: a runtime that is not optional is not installed, or there is no such GPU.
    """
    model, flags = cpu_facts()
    versions = {}
    for settings in profile.runtimes:
        try:
            versions[settings.full_name] = installed_version(settings)
        except DeviceError:
            if not settings.optional:
                raise
    return MachineFacts(
        cpu_model=model,
        instruction_sets=flags,
        cores=usable_cores(),
        accelerator=gpu_facts(profile.gpu) if profile.kind == "cuda" else "",
        versions=versions,
    )


def installed_version(settings: RuntimeSettings) -> str:
    """The version of the installed package that brings a runtime.

    Raises:
        DeviceError: none is installed; the error names what to install.
    """
    for distribution in settings.distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise DeviceError(
        "A runtime of the device profile is not installed.",
        given=settings.name,
        allowed=f"an installed package {' or '.join(settings.distributions)}",
        advice=how_to_install(settings),
    )


def how_to_install(settings: RuntimeSettings) -> str:
    """The command that installs a runtime."""
    if settings.extra:
        return f"pip install 'autocompress[{settings.extra}]'"
    return f"pip install {settings.distributions[0]}"


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


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


def gpu_facts(index: int) -> str:
    """Name and driver of an NVIDIA GPU.

    Raises:
        DeviceError: there is no NVIDIA driver, or no GPU of that index.
    """
    with closing(NvmlGpu(index)) as gpu:
        return f"{gpu.name}, driver {gpu.nvml.nvmlSystemGetDriverVersion()}"


def _digest(data: Sequence[Any] | dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
