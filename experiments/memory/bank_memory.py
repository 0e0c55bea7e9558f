"""Memory, seconds and disk that the bank of a large network takes, and one candidate made from it.

Example: python experiments/memory/bank_memory.py encoder convolutions

Every network is measured in a process of its own, which does what a search does before its first
trial. Without names both published networks are measured, and the table of this folder's README is
written anew; for networks that are named it is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import pandas as pd

from autocompress.build import Stopwatch
from autocompress.config import Objective
from autocompress.files import write_whole
from autocompress.plan import Plan
from autocompress.search.prepare import Options, Prepared, builder_of, fill_bank, prepare

HERE = Path(__file__).resolve().parent
TABLE_BEGIN, TABLE_END = "<!-- table -->", "<!-- end of table -->"
KIB, GB = 1024, 1e9
PUBLISHED = ("encoder", "convolutions")
COLUMNS = ("network", "phase", "seconds", "peak memory", "on disk")


@final
class Phases:
    """A progress display that keeps each stage's seconds and peak of resident memory.

    Attributes:
        rows: `phase`, `seconds`, `steps` and `peak_bytes` of every finished stage.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._name, self._steps, self._started = "start", 0, time.perf_counter()

    def stage(self, name: str, total: int | None = None, *, limit_s: float | None = None) -> None:
        """Begin a stage; the one before it is finished."""
        seconds = round(time.perf_counter() - self._started, 1)
        row = {"phase": self._name, "seconds": seconds, "steps": self._steps}
        self.rows.append(row | {"peak_bytes": _status("VmHWM")})
        print(self.rows[-1], file=sys.stderr, flush=True)
        # 5 resets the peak to what is resident now (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        self._name, self._steps, self._started = name, 0, time.perf_counter()

    def advance(self, steps: int = 1) -> None:
        """Count finished steps of the stage."""
        self._steps += steps

    def note(self, text: str) -> None:
        """Nothing is kept."""

    def show_front(self, frame: pd.DataFrame, objectives: Sequence[Objective]) -> None:
        """Nothing is kept."""


def _status(field: str) -> int:
    """A size in this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return KIB * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(experiment: Path, run: Path) -> Mapping[str, Any]:
    """Bank and one candidate of an experiment in this process, which should be a fresh one.

    Args:
        run: the run folder; what is on disk there is read.

    Returns:
        `phases`: see `Phases.rows`; `peak_bytes`: resident, over all phases; `child_peak_bytes`:
        of the largest child process; `bank_bytes`: on disk; `parameters`, and `candidate`: of the
        candidate made, by step the seconds.
    """
    phases = Phases()
    prepared = prepare(experiment, Options(run=run), phases)
    bank = fill_bank(prepared, phases)
    phases.stage("candidate")
    artifact = builder_of(prepared, bank).build("candidate", middle_plan(prepared))
    phases.stage("end")
    return {
        "parameters": sum(p.numel() for p in prepared.workload.network.parameters()),
        "phases": phases.rows,
        "peak_bytes": max(row["peak_bytes"] for row in phases.rows),
        "child_peak_bytes": KIB * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "bank_bytes": sum(f.stat().st_size for f in prepared.folder.bank.iterdir()),
        "candidate": dict(artifact.seconds),
    }


def middle_plan(prepared: Prepared) -> Plan:
    """Every choice of the search space at the middle of its levels."""
    parameters = prepared.space.parameters
    return prepared.space.plan({p.name: (p.highest + 1) // 2 for p in parameters})


def measured(name: str) -> Mapping[str, Any]:
    """What `measure` gives in a fresh process for this folder's experiment of that name."""
    command = [sys.executable, str(Path(__file__).resolve()), name, "--here"]
    clock = Stopwatch()
    with clock.step("all"):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": clock.seconds["all"]}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of some networks as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|"]
    for name, figures in found.items():
        for row in figures["phases"]:
            phase = (name, row["phase"], f"{row['seconds']:.1f}", _gb(row["peak_bytes"]), "")
            lines.append(f"| {' | '.join(phase)} |")
        millions = f"**{name}**, {figures['parameters'] / 1e6:.0f} million parameters"
        cells = (millions, "all", f"{figures['seconds']:.0f}", _gb(figures["peak_bytes"]))
        lines.append(f"| {' | '.join(cells)} | {_gb(figures['bank_bytes'])} |")
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def write_table(text: str) -> None:
    """Put a table into this folder's README."""
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(TABLE_BEGIN)
    after = rest.partition(TABLE_END)[2]
    whole = f"{before}{TABLE_BEGIN}\n{text}\n{TABLE_END}{after}"
    write_whole(readme, whole.encode())


def main() -> None:
    """Measure the networks named and print the table, or the published ones and write theirs."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = sorted(path.stem for path in HERE.glob("*.yaml"))
    # Without `choices`: Python 3.11 and earlier check them against the empty list as well.
    parser.add_argument("networks", nargs="*", help=", ".join(names))
    parser.add_argument("--here", action="store_true", help="one network, in this process, as JSON")
    given = parser.parse_args()
    unknown = ", ".join(sorted(set(given.networks) - set(names)))
    if unknown:
        parser.error(f"no such network: {unknown}; there are {', '.join(names)}")
    if given.here:
        with tempfile.TemporaryDirectory() as folder:
            path = HERE / f"{given.networks[0]}.yaml"
            print(json.dumps(measure(path, Path(folder) / "run")))
        return
    text = table({name: measured(name) for name in given.networks or PUBLISHED})
    if given.networks:
        print(text)
    else:
        write_table(text)


if __name__ == "__main__":
    main()
