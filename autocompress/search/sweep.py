"""Sweeps: one search for every combination of workloads, devices, spaces, samplers and seeds.

Each search is a process of its own with a run folder of its own. Searches that measure on one
machine come one after another, for they would disturb each other; others may run side by side.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, final

import yaml

from autocompress.config import Experiment, Sweep, parse_duration, read_yaml, validate
from autocompress.device import load_profile
from autocompress.errors import ConfigError
from autocompress.files import write_json, write_whole
from autocompress.search.progress import Progress

# A process that is told its parent's id by this variable dies with it.
PARENT = "AUTOCOMPRESS_PARENT"
_POLL_S = 0.5
_TAIL_LINES = 4
_OK = 0
_HERE = "this machine"


@final
@dataclass(frozen=True)
class Cell:
    """One search of a sweep.

    Attributes:
        group: workload and device: what may be compared.
        label: space, sampler and seed.
        place: where it measures; one search at a time there.
        experiment: resolved; all paths in it are absolute.
    """

    name: str
    group: str
    label: str
    place: str
    experiment: Mapping[str, Any]


@final
@dataclass(frozen=True)
class Finished:
    """A search that ended.

    Attributes:
        run: its run folder.
        failure: why it has no front; empty if it has one.
    """

    cell: Cell
    run: Path
    seconds: float
    failure: str = ""


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ConfigError: it is missing, malformed or has unknown keys.
    """
    return validate(Sweep, read_yaml(path, ConfigError), path, ConfigError)


def cells_of(sweep: Sweep, near: Path, *, clustered: bool = False) -> tuple[Cell, ...]:
    """All searches of a sweep, in the order in which they are begun.

    Args:
        near: the sweep's file.
        clustered: whether devices are nodes of a cluster: then each profile is a place of its own.

    Raises:
        ConfigError: an experiment cannot be read, or two searches would be the same.
        DeviceError: a device profile cannot be read.
    """
    found: dict[str, Cell] = {}
    for file in sweep.experiments:
        path = _near(file, near)
        base = validate(Experiment, read_yaml(path, ConfigError), path, ConfigError)
        choices = (
            sweep.devices or (_absolute(base.device, path),),
            sweep.search_spaces or (_absolute(base.search_space, path),),
            sweep.samplers or (base.search.sampler,),
            sweep.seeds or (base.search.seed,),
        )
        for device, space, sampler, seed in product(*choices):
            places = {"device": _absolute(device, near), "search_space": _absolute(space, near)}
            profile = load_profile(places["device"])
            remote = profile.remote.host if profile.remote else _HERE
            place = profile.name if clustered else remote
            cell = _cell(sweep, (base, path), {**places, "place": place}, sampler, seed)
            if cell.name in found:
                raise ConfigError(
                    "Two searches of the sweep are the same.",
                    given=cell.name,
                    allowed="lists without repetitions, of experiments with different names, and "
                    "of devices and search spaces in files of different names",
                )
            found[cell.name] = cell
    return tuple(found.values())


def run_sweep(
    cells: Sequence[Cell],
    folder: Path,
    options: Sequence[str],
    progress: Progress,
    *,
    parallel: int = 1,
) -> list[Finished]:
    """Run the searches that are not finished; interrupted, the next call goes on.

    Args:
        folder: gets `runs/NAME`, `experiments/NAME.yaml` and `logs/NAME.txt`.
        options: further options of `autocompress search`, for every search.
        parallel: how many searches at a time, never two on one device.
    """
    runner = _Runner(folder, options)
    progress.stage("sweep", len(cells))
    ended = {cell.name: runner.finished(cell) for cell in cells}
    # What failed before is tried again.
    waiting = [c for c in cells if (known := ended[c.name]) is None or known.failure]
    progress.advance(len(cells) - len(waiting))
    running: list[_Running] = []
    try:
        while waiting or running:
            while len(running) < parallel and (cell := _next(waiting, running)) is not None:
                waiting.remove(cell)
                running.append(runner.start(cell))
                progress.note(f"begun: {cell.name}")
            time.sleep(_POLL_S)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                done = runner.finish(one)
                progress.note(f"{'failed' if done.failure else 'finished'}: {one.cell.name}")
                progress.advance()
    finally:
        for one in running:
            one.stop()
    found = [runner.finished(cell) for cell in cells]
    return [done for done in found if done is not None]


def _next(waiting: Sequence[Cell], running: Sequence[_Running]) -> Cell | None:
    busy = {one.cell.place for one in running}
    return next((cell for cell in waiting if cell.place not in busy), None)


@final
@dataclass
class _Running:
    """A search under way."""

    cell: Cell
    process: subprocess.Popen[bytes]
    begun_s: float

    def stop(self) -> None:
        """End it; it goes on where it was when the sweep is called again."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


@final
class _Runner:
    """Starts searches and keeps how they ended."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._folder, self._options = folder, list(options)
        for name in ("runs", "experiments", "logs", "ended"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def start(self, cell: Cell) -> _Running:
        """Begin or go on with a search."""
        experiment = self._folder / "experiments" / f"{cell.name}.yaml"
        write_whole(experiment, yaml.safe_dump(dict(cell.experiment), sort_keys=False).encode())
        command = [sys.executable, "-m", "autocompress", "search", str(experiment)]
        command += ["--run", str(self._run(cell)), *self._options]
        with self._log(cell).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A search must not go on beside the sweep that is begun anew.
                env={**os.environ, PARENT: str(os.getpid())},
                # Ctrl-C in a terminal is the sweep's to handle.
                start_new_session=True,
            )
        return _Running(cell, process, time.monotonic())

    def finish(self, one: _Running) -> Finished:
        """Keep how a search ended; one that failed is tried again by the next call."""
        failure = "" if one.process.returncode == _OK else self._last_words(one.cell)
        seconds = round(time.monotonic() - one.begun_s, 1)
        done = {"seconds": seconds, "failure": failure, "experiment": dict(one.cell.experiment)}
        write_json(self._ended(one.cell), done)
        return Finished(one.cell, self._run(one.cell), seconds, failure)

    def finished(self, cell: Cell) -> Finished | None:
        """How a search ended; None if it did not, or with other settings, or failed before."""
        path = self._ended(cell)
        if not path.is_file():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["experiment"] != json.loads(json.dumps(dict(cell.experiment))):
            return None
        return Finished(cell, self._run(cell), data["seconds"], data["failure"])

    def _last_words(self, cell: Cell) -> str:
        lines = self._log(cell).read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines[-_TAIL_LINES:] if line.strip())

    def _run(self, cell: Cell) -> Path:
        return self._folder / "runs" / cell.name

    def _log(self, cell: Cell) -> Path:
        return self._folder / "logs" / f"{cell.name}.txt"

    def _ended(self, cell: Cell) -> Path:
        return self._folder / "ended" / f"{cell.name}.json"


def _cell(
    sweep: Sweep,
    source: tuple[Experiment, Path],
    places: Mapping[str, str],
    sampler: str,
    seed: int,
) -> Cell:
    base, path = source
    file, _, function = base.workload.rpartition(":")
    search: dict[str, Any] = {**base.search.model_dump(mode="json"), "sampler": sampler}
    search["seed"] = seed
    if sweep.trials is not None or sweep.time is not None:
        search["trials"] = sweep.trials
        search["time_s"] = None if sweep.time is None else parse_duration(sweep.time)
    device, space = (Path(places[key]).stem for key in ("device", "search_space"))
    name = f"{base.name}-{device}-{space}-{sampler}-{seed}"
    experiment = {
        **base.model_dump(mode="json"),
        "device": places["device"],
        "search_space": places["search_space"],
        "name": name,
        "workload": f"{_near(file, path).resolve()}:{function}",
        "search": search,
    }
    label = f"{space}, {sampler}, seed {seed}"
    return Cell(name, f"{base.name} on {device}", label, places["place"], experiment)


def _near(file: str, near: Path) -> Path:
    beside = near.parent / file
    return beside if beside.is_file() else Path(file)


def _absolute(name: str, near: Path) -> str:
    """A short name as it is, a path made absolute."""
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        return name
    return str(_near(name, near).resolve())


def by_group(finished: Sequence[Finished]) -> Iterator[tuple[str, list[Finished]]]:
    """Searches that may be compared, group by group; those that failed are left out."""
    groups: dict[str, list[Finished]] = {}
    for one in finished:
        if not one.failure:
            groups.setdefault(one.cell.group, []).append(one)
    yield from groups.items()
