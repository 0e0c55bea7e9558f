"""What `autocompress profile` shows of a device."""

from __future__ import annotations

from rich.table import Table

from autocompress.device import DeviceProfile, Fingerprint
from autocompress.measure.probe import ProbeReport
from autocompress.measure.statistics import PairedLatency


def device_table(profile: DeviceProfile, device: Fingerprint, report: ProbeReport) -> Table:
    """The device, and its measured int8 speed-ups and noise floor; fits 100 columns."""
    table = Table(
        title=f"Device '{profile.name}'", title_justify="left", show_header=False, width=100
    )
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("")
    cores = ", ".join(map(str, profile.pinned_cores()))
    settings = f"{device.provider}, graph optimization {device.graph_optimization}"
    pays = {name: "pays" if yes else "does not pay" for name, yes in report.int8_pays.items()}
    rows = {
        "CPU": device.cpu_model,
        "instruction sets": ", ".join(device.instruction_sets),
        "runtime": f"{device.runtime} {device.runtime_version}, {settings}",
        "threads, cores": f"{device.threads} on core {cores}; batch {device.batch_size}",
        "channel multiple": str(profile.channel_multiple),
        "fingerprint": device.id,
        "int8 convolution": f"{_ratio(report.convolution)} of fp32: {pays['Conv']}",
        "int8 matrix product": f"{_ratio(report.matmul)} of fp32: {pays['MatMul']}",
        "noise floor": f"±{100 * report.noise_floor:.2f} % (a model against itself)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _ratio(pair: PairedLatency) -> str:
    interval = f"{pair.speedup:.2f}x [{pair.speedup_low:.2f}, {pair.speedup_high:.2f}] the speed"
    return interval if pair.trusted else f"{interval} (untrusted: {pair.reason})"
