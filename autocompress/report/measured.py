"""What `autocompress measure` does and shows: any ONNX files against a baseline, with intervals."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from rich import box
from rich.table import Table
from rich.text import Text

from autocompress.device import DeviceProfile, Fingerprint
from autocompress.errors import MeasurementError
from autocompress.measure.any_file import model_bytes, open_model, random_inputs
from autocompress.measure.arrays import read_arrays
from autocompress.measure.client import Inputs, Subject, Worker
from autocompress.measure.latency import PairedLatency
from autocompress.measure.memory import PeakMemory, peak_memory
from autocompress.measure.paired_energy import PairedEnergy
from autocompress.report import figures
from autocompress.report.device import where

_UNTRUSTED = "*"


@final
@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        baseline: the file that the others are compared with, in the profile's first runtime.
        models: the other files.
        runtimes: full names; every file is measured in each.
        inputs: an .npz file with one array per model input; None for random ones.
        sizes: of axes that the models leave open, by name.
        energy: meter the energy too.
        quick: use the search's limits instead of the tighter ones for final results.
        seed: of random inputs and of the bootstrap.
    """

    baseline: Path
    models: tuple[Path, ...]
    runtimes: tuple[str, ...]
    inputs: Path | None = None
    sizes: Mapping[str, int] | None = None
    energy: bool = False
    quick: bool = False
    seed: int = 0


@final
@dataclass(frozen=True)
class MeasuredFile:
    """The figures of one file in one runtime; `failure` says why there are none."""

    model: Path
    runtime: str
    file_bytes: int
    latency: PairedLatency | None = None
    memory: PeakMemory | None = None
    energy: PairedEnergy | None = None
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, without the raw samples."""
        row: dict[str, Any] = {
            "model": str(self.model),
            "runtime": self.runtime,
            "file_bytes": self.file_bytes,
            "failure": self.failure or None,
        }
        if self.latency is not None:
            row["latency"] = _without_samples(self.latency.to_dict())
        if self.memory is not None:
            row["peak_memory_bytes"] = self.memory.resident_bytes
            row["gpu_memory_bytes"] = self.memory.gpu_bytes
        if self.energy is not None:
            row["energy"] = self.energy.energy().to_dict()
        return row


def measure_files(
    profile: DeviceProfile, wanted: Wanted, advance: Callable[[str], None]
) -> tuple[Fingerprint, tuple[MeasuredFile, ...]]:
    """Measure files in turn with the baseline.

    A file that fails becomes a row with its reason; the others are measured all the same.

    Args:
        profile: the device.
        wanted: files and runtimes.
        advance: told what is measured next.

    Raises:
        DeviceError: the device lacks what the profile asks for.
        MeasurementError: the baseline cannot be measured.
    """
    with tempfile.TemporaryDirectory() as scratch, Worker(profile, Path(scratch)) as worker:
        inputs = _inputs(profile, wanted)
        first = Subject(wanted.baseline, profile.runtime_names[0])
        rows = []
        for subject in _subjects(wanted, first):
            advance(f"measuring {subject.model.name} in {subject.runtime}")
            try:
                rows.append(_measure(worker, profile, wanted, (first, subject), inputs))
            except MeasurementError as reason:
                if subject == first:
                    raise
                size = model_bytes(subject.model)
                rows.append(MeasuredFile(*_named(subject), size, failure=str(reason)))
        return worker.fingerprint, tuple(rows)


def measured_table(
    profile: DeviceProfile, device: Fingerprint, rows: Sequence[MeasuredFile]
) -> Table:
    """One row per file and runtime; fits 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    with_runtime = len({row.runtime for row in rows}) > 1
    with_energy = any(row.energy is not None for row in rows)
    table.title = Text(f"Measured on {where(device)}", style="bold")
    headings = ["model", *(["runtime"] if with_runtime else []), "latency", "p50", "p95", "p99"]
    headings += ["speed-up", *(["energy"] if with_energy else []), "file", "memory"]
    for heading in headings:
        texts = heading in ("model", "runtime")
        table.add_column(heading, justify="left" if texts else "right", overflow="fold")
    for row in rows:
        cells = [Text(row.model.name), *([Text(row.runtime)] if with_runtime else [])]
        cells += [Text(text) for text in _cells(row, with_energy)]
        table.add_row(*cells)
    table.caption = Text("\n".join(_notes(rows)), style="dim")
    table.caption_justify = "left"
    return table


def _subjects(wanted: Wanted, first: Subject) -> Iterator[Subject]:
    yield first
    files = list(dict.fromkeys((wanted.baseline, *wanted.models)))
    for model in files:
        for runtime in wanted.runtimes:
            if Subject(model, runtime) != first:
                yield Subject(model, runtime)


def _inputs(profile: DeviceProfile, wanted: Wanted) -> Inputs:
    if wanted.inputs is not None:
        return read_arrays(wanted.inputs)
    model = open_model(wanted.baseline)
    return random_inputs(model, profile.batch_size, wanted.sizes or {}, wanted.seed)


def _measure(
    worker: Worker,
    profile: DeviceProfile,
    wanted: Wanted,
    pair: tuple[Subject, Subject],
    inputs: Inputs,
) -> MeasuredFile:
    latency = worker.compare(*pair, inputs, final=not wanted.quick, seed=wanted.seed)
    energy = None
    if wanted.energy:
        energy = worker.energy(*pair, inputs, final=not wanted.quick, seed=wanted.seed)
    memory = peak_memory(pair[1], inputs, profile)
    return MeasuredFile(*_named(pair[1]), model_bytes(pair[1].model), latency, memory, energy)


def _named(subject: Subject) -> tuple[Path, str]:
    return subject.model, subject.runtime


def _cells(row: MeasuredFile, with_energy: bool) -> list[str]:
    size = figures.byte_size(row.file_bytes)
    if row.latency is None or row.memory is None:
        return ["failed", "", "", "", "", *([""] if with_energy else []), size, ""]
    latency = row.latency
    mark = "" if latency.trusted else _UNTRUSTED
    ratio = figures.speedup(latency.speedup, latency.speedup_low, latency.speedup_high)
    percentiles = (
        latency.candidate_p50_ms,
        latency.candidate_p95_ms,
        latency.candidate_p99_ms,
    )
    cells = [figures.milliseconds(latency.candidate_ms), *map(figures.number, percentiles)]
    cells.append(ratio + mark)
    if with_energy:
        energy = row.energy
        cells.append(figures.millijoules(energy.energy().value) if energy else figures.ABSENT)
    return [*cells, size, figures.byte_size(row.memory.resident_bytes)]


def _notes(rows: Sequence[MeasuredFile]) -> list[str]:
    notes = [
        "latency: quiet time (2nd percentile); p50, p95, p99 in ms over all runs; speed-up over "
        "the first row with its 95 % interval"
    ]
    for row in rows:
        name = f"{row.model.name} in {row.runtime}"
        if row.failure:
            notes.append(f"{name} failed: {row.failure}")
        elif row.latency is not None and not row.latency.trusted:
            notes.append(f"{_UNTRUSTED} {name}: {row.latency.reason}")
        if row.energy is not None and not row.energy.trusted:
            notes.append(f"{_UNTRUSTED} energy of {name}: {row.energy.reason}")
    return notes


def _without_samples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if not key.endswith("samples_ms")}
