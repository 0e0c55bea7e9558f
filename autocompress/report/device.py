"""What `autocompress profile` shows of a device."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from autocompress.device import DeviceProfile, Fingerprint
from autocompress.measure.energy import MeterReport
from autocompress.measure.latency import PairedLatency
from autocompress.measure.probe import ProbeReport


def device_table(
    profile: DeviceProfile,
    device: Fingerprint,
    reports: Mapping[str, ProbeReport],
    meter: MeterReport,
) -> Table:
    """The device, and for each runtime its measured speed-ups and noise floor; fits 100 columns."""
    table = Table(
        title=f"Device '{profile.name}'", title_justify="left", show_header=False, width=100
    )
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("")
    rows = {
        "CPU": device.cpu_model,
        "instruction sets": ", ".join(device.instruction_sets),
        **({"GPU": device.accelerator} if device.accelerator else {}),
        "threads": f"{device.threads}; batch {device.batch_size}",
        "channel multiple": str(profile.channel_multiple),
        "integer kernels": _integers(profile),
        "fingerprint": device.id,
        "energy meter": _meter(meter),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    for runtime, report in reports.items():
        facts = device.runtime(runtime)
        settings = ", ".join(f"{k} {v}" for k, v in facts.settings.items() if k != "name")
        pays = {name: "pays" if yes else "does not pay" for name, yes in report.int8_pays.items()}
        table.add_section()
        table.add_row("runtime", f"{runtime}: version {facts.version}, {settings}")
        table.add_row("int8 convolution", f"{_ratio(report.convolution)} of fp32: {pays['Conv']}")
        table.add_row("int8 matrix product", f"{_ratio(report.matmul)} of fp32: {pays['MatMul']}")
        noise = f"±{100 * report.noise_floor:.2f} % (a model against itself)"
        table.add_row("noise floor", noise)
    return table


def where(device: Fingerprint) -> str:
    """The device in a few words."""
    first = device.runtimes[0]
    runtimes = f"{first.name} {first.version}"
    if len(device.runtimes) > 1:
        runtimes = f"{len(device.runtimes)} runtimes"
    threads = f"{device.threads} thread{'s' if device.threads > 1 else ''}"
    return f"{device.accelerator or device.cpu_model}, {runtimes}, {threads}"


def _integers(profile: DeviceProfile) -> str:
    if profile.integer_sums == "saturating":
        return "cut large sums of two products: weights for them take 7 bits"
    return "exact sums"


def _meter(meter: MeterReport) -> str:
    if meter.name is None or meter.update_period_s is None or meter.idle_mw is None:
        return f"none. {meter.reason.splitlines()[0]}"
    return (
        f"{meter.name}: {meter.scope}; new value every {1000 * meter.update_period_s:.0f} ms; idle "
        f"{meter.idle_mw / 1000:.2f} W"
    )


def _ratio(pair: PairedLatency) -> str:
    interval = f"{pair.speedup:.2f}x [{pair.speedup_low:.2f}, {pair.speedup_high:.2f}] the speed"
    return interval if pair.trusted else f"{interval} (untrusted: {pair.reason})"
