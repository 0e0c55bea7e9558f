"""How well measurements repeat: the same two models again and again, idle and with busy cores.

Each repetition is a new worker process. The long-run ratio is the median over the idle repetitions.
Half of the repetitions run while another process computes on every core.

    python experiments/measuring/repeat.py BASELINE.onnx CANDIDATE.onnx --repetitions 20
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from autocompress.device import load_profile, usable_cores
from autocompress.measure.any_file import open_model, random_inputs
from autocompress.measure.client import Subject, Worker
from autocompress.measure.latency import PairedLatency


def main() -> None:
    """Measure, print one line per repetition and a summary, keep everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/measuring/repeat.json"))
    options = parser.parse_args()
    results: dict[str, list[PairedLatency]] = {"idle": [], "both cores loaded": []}
    for name, found in results.items():
        with busy_cores(usable_cores() if name != "idle" else ()):
            for _ in range(options.repetitions):
                found.append(measure_once(options))
                print(name, line(found[-1]), flush=True)
    long_run = float(np.median([p.speedup for p in results["idle"]]))
    for name, found in results.items():
        print(f"{name}: {summary(found, long_run)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: [p.to_dict() for p in found] for name, found in results.items()}
    options.out.write_text(json.dumps(kept))


def measure_once(options: argparse.Namespace) -> PairedLatency:
    """One final measurement by a new worker."""
    profile = load_profile(options.device)
    inputs = random_inputs(open_model(options.baseline), profile.batch_size, {}, 0)
    runtime = profile.runtime_names[0]
    sides = (Subject(options.baseline, runtime), Subject(options.candidate, runtime))
    with tempfile.TemporaryDirectory() as scratch, Worker(profile, Path(scratch)) as worker:
        return worker.compare(sides[0], sides[1], inputs, final=True, seed=0)


@contextmanager
def busy_cores(cores: Sequence[int]) -> Iterator[None]:
    """One process on each core that only computes, while the block runs."""
    processes = [
        multiprocessing.Process(target=_compute, args=(core,), daemon=True) for core in cores
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _compute(core: int) -> None:
    os.sched_setaffinity(0, {core})
    matrix = np.random.default_rng(0).standard_normal((300, 300))
    while True:
        np.tanh(matrix @ matrix)


def line(paired: PairedLatency) -> str:
    """One repetition."""
    return (
        f"{paired.speedup:.4f}x [{paired.speedup_low:.4f}, {paired.speedup_high:.4f}] in "
        f"{paired.elapsed_s:.1f} s, others {paired.others_share:.0%} {paired.reason}"
    )


def summary(found: list[PairedLatency], long_run: float) -> str:
    """Spread, largest distance from the long-run ratio, coverage and flags."""
    ratios = np.array([p.speedup for p in found])
    covered = [p.speedup_low <= long_run <= p.speedup_high for p in found]
    flagged = [not p.trusted for p in found]
    moved = np.abs(ratios / long_run - 1)
    return (
        f"ratio {np.median(ratios):.4f}, spread (max - min) {np.ptp(ratios) / long_run:.2%}, "
        f"standard deviation {ratios.std(ddof=1) / long_run:.2%}, median distance from the "
        f"long-run ratio {np.median(moved):.2%}, largest {moved.max():.2%}, intervals that cover "
        f"it {np.mean(covered):.0%}, median half-width "
        f"{np.median([p.half_width for p in found]):.2%}, flagged {sum(flagged)} of {len(found)}"
    )


if __name__ == "__main__":
    main()
