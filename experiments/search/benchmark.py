"""The search against the plain loop, and its own parts against each other; writes RESULTS.md.

    python experiments/search/benchmark.py --out runs/search_benchmark --only plain ours

Each cell (a part, a variant, a seed) is on disk once it is finished; the same command measures what
is missing and writes the tables anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, final, get_args

import numpy as np
import onnx
import pandas as pd
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from growth import depth_table, trial_cost_table  # noqa: E402
from plain_loop import Row, read_rows, step_seconds  # noqa: E402

from autocompress.config import Sampler, load_experiment, read_yaml  # noqa: E402
from autocompress.device import DeviceProfile, load_profile, usable_cores  # noqa: E402
from autocompress.device.facts import cpu_facts  # noqa: E402
from autocompress.errors import ConfigError  # noqa: E402
from autocompress.evaluation import Evaluation  # noqa: E402
from autocompress.export.coding import encode_file  # noqa: E402
from autocompress.export.torch_export import export_graph  # noqa: E402
from autocompress.files import user_cache, write_json, write_whole  # noqa: E402
from autocompress.measure.client import Subject, Worker  # noqa: E402
from autocompress.measure.scoring import ScoringPool  # noqa: E402
from autocompress.pareto import hypervolume, non_dominated  # noqa: E402
from autocompress.workload import Split, Workload, load_workload, score  # noqa: E402

PARTS = ("plain", "ours", "download", "samplers", "depth", "trial_cost")
TIMES_MIN = (1, 2, 5, 10)
# The worst corner of the hypervolume: this many points below the original, and no faster.
CORNER_DROP_PP, CORNER_SHARE = 10.0, 1.0
# A sampler alone: no solved plans to begin with, nothing trained.
ALONE = {"seeds": False, "survivors": False}
SCORING_BATCH = 64
MAXIMISE = (True, False)


@final
@dataclass(frozen=True)
class Point:
    """A candidate: when it was known, its accuracy on the search split, its share of the latency.

    The share is of the original network's file, measured in turn with it.
    """

    t_s: float
    accuracy: float
    latency_share: float


@final
@dataclass(frozen=True)
class Judged:
    """A member of the last front: percentage points lost on test, and what that buys."""

    drop_pp: float
    speedup: float
    download_bytes: float


@final
@dataclass(frozen=True)
class Original:
    """The original network: its accuracy on the search split and its bytes."""

    accuracy: float
    file_bytes: float
    download_bytes: float


@final
@dataclass(frozen=True)
class Cell:
    """One finished run of one part.

    Attributes:
        judged: candidates that got an accuracy, all measured ones among them.
        measured: candidates that also got a latency.
        step_seconds: mean per trial; empty where stages are not trials.
        load_average: one-minute load average of the machine when it began.
    """

    name: str
    minutes: float
    judged: int
    measured: int
    original: Original
    points: tuple[Point, ...]
    front: tuple[Judged, ...]
    step_seconds: Mapping[str, float]
    load_average: float

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Cell:
        """Read back what `asdict` gave."""
        parts = {
            "original": Original(**data["original"]),
            "points": tuple(Point(**point) for point in data["points"]),
            "front": tuple(Judged(**point) for point in data["front"]),
        }
        return Cell(**{**data, **parts})


# --- the plain loop


def plain_cell(options: argparse.Namespace, name: str, seed: int) -> Cell:
    """The plain loop in a process of its own; its front is measured again afterwards."""
    folder = options.out / name
    finished = folder / "finished.json"
    load = os.getloadavg()[0]
    if not finished.is_file():
        seconds = str(60 * options.plain_minutes)
        command = [str(HERE / "plain_loop.py"), str(options.experiment), "--seconds", seconds]
        _run([*command, "--seed", str(seed), "--out", str(folder)])
        write_json(finished, {"load_average": load})
    load = json.loads(finished.read_text(encoding="utf-8"))["load_average"]
    rows = read_rows(folder)
    sound = sum(not row.failure for row in rows)
    experiment = load_experiment(options.experiment)
    workload = load_workload(experiment.workload, options.experiment)
    profile = load_profile(experiment.device, options.experiment)
    original, points, front = rescore(workload, profile, rows, folder)
    minutes = rows[-1].t_s / 60
    steps = step_seconds(rows)
    return Cell(name, minutes, sound, sound, original, points, front, steps, load)


def rescore(
    workload: Workload, profile: DeviceProfile, rows: Sequence[Row], folder: Path
) -> tuple[Original, tuple[Point, ...], tuple[Judged, ...]]:
    """Measure every plain-loop row that was on its own front at any time as the search measures.

    Args:
        rows: those with a model were on the front when they were found.
        folder: holds `models/`; gets the original's file and scratch files.

    Returns:
        The original network; a point per model, dated as the plain loop found it; and what the
        members of the points' front are on the test split, with the limits of final results.
    """
    path = folder / "original.onnx"
    onnx.save(export_graph(workload.network, workload.example_inputs), path)
    kept = [row for row in rows if row.model]
    files = [folder / "models" / row.model for row in kept]
    scratch = folder / "scratch"
    with Worker(profile, scratch) as worker, ScoringPool(profile, worker.cores, scratch) as pool:
        bench = _Bench(workload, profile, path, worker, pool)
        points = [
            Point(row.t_s, bench.accuracy(file, workload.search_split), 1 / bench.speedup(file))
            for row, file in zip(kept, files, strict=True)
        ]
        accuracy = bench.accuracy(path, workload.search_split)
        original = Original(accuracy, path.stat().st_size, _download_bytes(path))
        on_front = non_dominated(_values(points), maximise=MAXIMISE)
        front = [bench.judge(f) for f, on in zip(files, on_front, strict=True) if on]
    return original, tuple(points), tuple(front)


@final
class _Bench:
    """The search's own measuring, of any file."""

    def __init__(
        self, workload: Workload, profile: DeviceProfile, original: Path, worker: Worker,
        pool: ScoringPool,
    ) -> None:  # fmt: skip
        self._workload = workload
        self._runtime = profile.runtime_names[0]
        self._original = original
        self._worker = worker
        self._pool = pool
        batch = [x[: profile.batch_size].numpy() for x in workload.search_split.inputs]
        self._example = worker.store(batch)

    def accuracy(self, model: Path, split: Split) -> float:
        inputs = self._worker.store(split.numpy_inputs())
        outputs = self._pool.predict(Subject(model, self._runtime), inputs, SCORING_BATCH)
        return score(self._workload.metric, outputs, split.targets)

    def speedup(self, model: Path, *, final: bool = False) -> float:
        original, candidate = (Subject(x, self._runtime) for x in (self._original, model))
        return self._worker.compare(original, candidate, self._example, final=final, seed=0).speedup

    def judge(self, model: Path) -> Judged:
        drop = self._original_test - self.accuracy(model, self._workload.test_split)
        return Judged(100 * drop, self.speedup(model, final=True), _download_bytes(model))

    @cached_property
    def _original_test(self) -> float:
        return self.accuracy(self._original, self._workload.test_split)


def _download_bytes(model: Path) -> int:
    return encode_file(model, model.with_suffix(".acz")).coded_bytes


# --- the search


def ours_cell(options: argparse.Namespace, name: str, seed: int) -> Cell:
    """The search as it is by default, distillation included."""
    return _search_cell(options.experiment, options.out / name, options.minutes, seed)


def download_cell(options: argparse.Namespace, name: str, seed: int) -> Cell:
    """The search for small downloads, distillation included."""
    return _search_cell(HERE / "download.yaml", options.out / name, options.minutes, seed)


def sampler_cell(options: argparse.Namespace, name: str, seed: int, sampler: str) -> Cell:
    """One sampler, with neither solved plans to begin with nor training."""
    base = read_yaml(options.experiment, ConfigError)
    file, _, function = base["workload"].rpartition(":")
    base["workload"] = f"{(options.experiment.parent / file).resolve()}:{function}"
    base["search"] = {**base.get("search", {}), **ALONE, "sampler": sampler}
    experiment = options.out / f"{name}.yaml"
    write_whole(experiment, yaml.safe_dump(base).encode())
    return _search_cell(experiment, options.out / name, options.sampler_minutes, seed)


def _search_cell(experiment: Path, run: Path, minutes: float, seed: int) -> Cell:
    load = os.getloadavg()[0]
    limits = ["--time", f"{60 * minutes:g}s", "--seed", str(seed)]
    command = ["-m", "autocompress", "search", str(experiment), "--run", str(run), *limits]
    _run(command, XDG_CACHE_HOME=str(own_cache(run.with_name(f"{run.name}-cache"))))
    return read_search(run, load)


def own_cache(folder: Path) -> Path:
    """A cache with the trained network in it, but no sensitivities of an earlier search."""
    kept = folder / "autocompress"
    kept.mkdir(parents=True, exist_ok=True)
    for file in user_cache().glob("*.safetensors"):
        if not (kept / file.name).exists():
            shutil.copy(file, kept)
    return folder


def read_search(run: Path, load: float) -> Cell:
    """What a finished run folder says."""
    from autocompress.search.history import read_history

    judged = judged_plans(run)
    found = [(t, e) for t, e in read_history(run) if e.plan and e.split == "search"]
    points = tuple(Point(t, e.metric.value, 1 / e.speedup.value) for t, e in found)
    measured = {e.candidate for _, e in found}
    frame = pd.read_csv(run / "front.csv").set_index("candidate")
    first = frame.loc["original"]
    original = Original(*map(float, first[["metric_search", "file_bytes", "download_bytes"]]))
    finalists = frame[(frame["role"] == "finalist") & frame["metric_test"].notna()]
    columns = finalists[["drop_test_pp", "speedup", "download_bytes"]]
    front = tuple(Judged(*map(float, row)) for row in columns.to_numpy())
    # Rates are those of the search, set-up included: training and judging come after it.
    minutes = max(t for t, e in found if not _is_trained(e)) / 60
    measured = {e.candidate for _, e in found if not _is_trained(e)}
    counts = (len(measured | judged), len(measured))
    return Cell(run.name, minutes, *counts, original, points, front, {}, load)


def _is_trained(evaluation: Evaluation) -> bool:
    return any(step["technique"] in ("recover", "qat") for step in evaluation.plan)


def judged_plans(run: Path) -> set[str]:
    """Names of the candidates whose accuracy was sampled, from the run's log."""
    from autocompress.search.record import JudgedLog

    lines = JudgedLog(run / "judged.jsonl").lines()
    return {line["candidate"] for line in lines if "judgement" in line}


# --- growth with layers and trials


def depth_cell(options: argparse.Namespace) -> Mapping[str, Any]:
    """Seconds of sensitivity and seeds, residual networks of 20 and 110 layers."""
    return depth_table()


def trial_cost_cell(options: argparse.Namespace) -> Mapping[str, Any]:
    """What the 50th and the 5,000th trial of a study cost."""
    return trial_cost_table()


# --- tables


def hypervolume_at(cell: Cell, t_s: float) -> float:
    """Percentage points times share of the latency, of what was known at a time; at most about 10.

    The corner is `CORNER_DROP_PP` below the original at the original's latency.
    """
    points = [point for point in cell.points if point.t_s <= t_s]
    corner = (100 * cell.original.accuracy - CORNER_DROP_PP, CORNER_SHARE)
    return hypervolume(_values(points), corner, maximise=MAXIMISE)


def _values(points: Sequence[Point]) -> np.ndarray:
    return np.array([(100 * p.accuracy, p.latency_share) for p in points]).reshape(-1, 2)


def rates_table(groups: Mapping[str, Sequence[Cell]]) -> str:
    """Candidates per minute of set-up and search; training and final judging come after them."""
    rows = []
    for name, cells in groups.items():
        judged = median(cell.judged / cell.minutes for cell in cells)
        measured = median(cell.measured / cell.minutes for cell in cells)
        minutes = median(cell.minutes for cell in cells)
        rows.append([name, f"{minutes:.1f}", f"{judged:.1f}", f"{measured:.1f}"])
    return _table(["", "minutes", "judged per minute", "measured per minute"], rows)


def steps_table(cells: Sequence[Cell]) -> str:
    """Seconds per trial of each step of the plain loop."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.step_seconds))
    seconds = [median(cell.step_seconds.get(name, 0.0) for cell in cells) for name in names]
    return _table(names, [[f"{s:.3f}" for s in seconds]]) if names else ""


def hypervolume_table(groups: Mapping[str, Sequence[Cell]]) -> str:
    """Medians over the seeds at `TIMES_MIN`, empty after a run's last point, and at the end."""
    rows = []
    for name, cells in groups.items():
        row = [name]
        for minute in TIMES_MIN:
            # A run keeps its limit by a few per cent.
            lasted = [cell for cell in cells if minute <= 1.05 * _last_minute(cell)]
            values = [hypervolume_at(cell, 60 * minute) for cell in lasted]
            row.append(f"{median(values):.3f}" if values else "")
        row.append(f"{median(hypervolume_at(cell, math.inf) for cell in cells):.3f}")
        rows.append(row)
    return _table(["", *(f"{minute} min" for minute in TIMES_MIN), "end"], rows)


def _last_minute(cell: Cell) -> float:
    """When a run's last point was known, or its search was over; training comes after it."""
    return max([cell.minutes, *(point.t_s / 60 for point in cell.points)])


def best_table(groups: Mapping[str, Sequence[Cell]]) -> str:
    """Per run: the fastest and the smallest of its front, by points lost on the test split."""
    columns = ["run", "speed-up, 0.5 lost", "speed-up, 1.0 lost", "download, 1.0 lost"]
    rows = []
    for name, cells in groups.items():
        found = [best_points(cell) for cell in cells]
        shown = [(cell.name, best) for cell, best in zip(cells, found, strict=True)]
        if len(cells) > 1:
            middle = tuple(median(values) for values in zip(*found, strict=True))
            shown.append((f"{name}, median", middle))
        rows += [[label, f"{a:.2f}x", f"{b:.2f}x", f"1/{c:.1f}"] for label, (a, b, c) in shown]
    return _table(columns, rows)


def best_points(cell: Cell) -> tuple[float, float, float]:
    """Best speed-up with at most 0.5 and 1.0 points lost, and times fewer download bytes with 1.0.

    Fewer than the original's file has: it is what is downloaded today. The original itself, coded,
    stands where nothing else is good enough.
    """
    here = [*cell.front, Judged(0.0, 1.0, cell.original.download_bytes)]
    fast = [max(p.speedup for p in here if p.drop_pp <= lost) for lost in (0.5, 1.0)]
    smallest = min(p.download_bytes for p in here if p.drop_pp <= 1.0)
    return fast[0], fast[1], cell.original.file_bytes / smallest


def results(cells: Sequence[Cell], others: Sequence[Mapping[str, Any]]) -> str:
    """The text of RESULTS.md."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.name.rpartition("-")[0], []).append(cell)
    loads = ", ".join(f"{cell.name} {cell.load_average:.1f}" for cell in cells)
    sections = [
        "# The search against the plain loop\n\nWritten by `benchmark.py`; see README.md.\n",
        f"{machine()}\n\nLoad average when each run began: {loads}.\n",
        f"## Candidates per minute\n\n{rates_table(groups)}",
        "Seconds per trial of the plain loop:\n\n" + steps_table(groups.get("plain", [])),
        f"## Hypervolume against time\n\n{hypervolume_table(groups)}",
        f"## Best points on the test split\n\n{best_table(groups)}",
        *(f"## {o['title']}\n\n{_table(o['columns'], o['rows'])}" for o in others),
    ]
    return "\n".join(sections)


def machine() -> str:
    """What the figures were taken on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "optuna"))
    model = cpu_facts()[0]
    return f"{model}, {len(usable_cores())} cores; Python {platform.python_version()}, {packages}."


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [list(map(str, columns)), ["---"] * len(columns), *(list(map(str, r)) for r in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# --- the command line


def _run(arguments: Sequence[str], **variables: str) -> None:
    # Both sides take PyTorch's own number of threads, as a user has it.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
    subprocess.run([sys.executable, *arguments], check=True, env=environment)


def wanted(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Cells by name, in the order in which they are measured."""
    seeds, parts = options.seeds, options.only
    cells: dict[str, Callable[[], Any]] = {}
    # Seed by seed, so that slow changes of the machine meet both sides.
    for seed in seeds:
        if "plain" in parts:
            cells[f"plain-{seed}"] = partial(plain_cell, options, f"plain-{seed}", seed)
        if "ours" in parts:
            cells[f"ours-{seed}"] = partial(ours_cell, options, f"ours-{seed}", seed)
    if "download" in parts:
        for seed in seeds:
            name = f"download-{seed}"
            cells[name] = partial(download_cell, options, name, seed)
    if "samplers" in parts:
        for seed in seeds:
            for sampler in get_args(Sampler):
                cell = f"{sampler}_alone-{seed}"
                cells[cell] = partial(sampler_cell, options, cell, seed, sampler)
    others: dict[str, Callable[[], Any]] = {
        "depth": lambda: depth_cell(options),
        "trial_cost": lambda: trial_cost_cell(options),
    }
    cells |= {name: cell for name, cell in others.items() if name in parts}
    return cells


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/search_benchmark"))
    parser.add_argument("--experiment", type=Path, default=HERE.parent / "fashion_mnist.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--plain-minutes", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--sampler-minutes", type=float, default=5.0)
    options = parser.parse_args()
    done = options.out / "cells"
    done.mkdir(parents=True, exist_ok=True)
    for name, measure in wanted(options).items():
        path = done / f"{name}.json"
        if path.is_file():
            continue
        print(f"{name} ...", flush=True)
        found = measure()
        write_json(path, asdict(found) if isinstance(found, Cell) else found)
    write_results(done, options.results)


def write_results(done: Path, target: Path) -> None:
    """Write the tables of all finished cells, of earlier calls too."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(done.glob("*.json"))]
    cells = [Cell.from_dict(data) for data in found if "points" in data]
    write_whole(target, results(cells, [d for d in found if "points" not in d]).encode())


if __name__ == "__main__":
    main()
