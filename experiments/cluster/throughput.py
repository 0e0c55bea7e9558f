"""What the cluster engine costs: trials that only sleep, and the driver's own time per trial.

    python experiments/cluster/throughput.py --out runs/throughput.md

Both run through the same call of Ray Tune that a search makes, on this machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune

from autocompress.search.cluster.connect import set_variables
from autocompress.search.cluster.study_search import FINISHED
from autocompress.search.cluster.tuning import Race, run_trials


class Sleeper(tune.Trainable):  # type: ignore[misc]
    """A trial that takes a time and gives a figure."""

    def setup(self, config: Mapping[str, Any]) -> None:
        """Take a trial's configuration."""
        self._seconds = config["seconds"]

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Workers are used again."""
        self._seconds = new_config["seconds"]
        return True

    def step(self) -> dict[str, Any]:
        """Sleep."""
        time.sleep(self._seconds)
        return {"done": True, "metric": 1.0, "worker": os.getpid()}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing, as for candidates."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""


class Source:
    """Trials of the same length; so many are counted, the first when `warm` workers were seen."""

    def __init__(self, workers: int, seconds: float, count: int, warm: int) -> None:
        self._workers, self._seconds, self._count = workers, seconds, count
        self._warm = warm
        self._under_way: set[str] = set()
        self._seen: set[int] = set()
        self.ended: list[float] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial."""
        if len(self.ended) >= self._count:
            return FINISHED
        if len(self._under_way) >= self._workers:
            return None
        self._under_way.add(trial_id)
        return {"seconds": self._seconds}

    def complete(self, trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        """Note when it ended, if it counts."""
        assert result and not error, result
        self._under_way.remove(trial_id)
        self._seen.add(result["worker"])
        # Starting a worker takes seconds of a core; a search starts each once.
        if len(self._seen) >= self._warm:
            self.ended.append(time.monotonic())

    def pump(self) -> None:
        """Nothing to do."""


def run(workers: int, seconds: float, count: int, warm: int) -> tuple[Source, float]:
    """Run the trials; CPU seconds of this process, the driver, meanwhile."""
    source = Source(workers, seconds, count, warm)
    # Sleeping takes no CPU: as many workers as are asked for find room on any machine.
    with TemporaryDirectory() as folder:
        race = Race("throughput", {"metric": "max"}, {"cpu": 0.01}, folder, workers=lambda: workers)
        begin = time.process_time()
        run_trials(Sleeper, None, source, race)
        return source, time.process_time() - begin


def per_minute(source: Source, workers: int) -> float:
    """Trials per minute once all workers have been started, over whole rounds of all workers."""
    counted = (len(source.ended) - 1) // workers * workers
    return 60 * counted / (source.ended[counted] - source.ended[0])


def main() -> None:
    """Run both and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/throughput.md"))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--trials", type=int, default=10_000)
    options = parser.parse_args()
    set_variables()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    rows = []
    for workers in (1, options.workers):
        source, _ = run(workers, options.seconds, 15 * workers + 1, workers)
        rate = per_minute(source, workers)
        rows.append((workers, rate))
        print(f"{workers} workers: {rate:.1f} trials of {options.seconds:g} s a minute", flush=True)
    source, cpu_s = run(options.workers, 0.0, options.trials, 1)
    wall_s = source.ended[-1] - source.ended[0]
    last = source.ended[-1001:] if options.trials > 1000 else source.ended
    late = 1000 * (last[-1] - last[0]) / (len(last) - 1)
    text = "\n".join(
        [
            f"| workers | trials of {options.seconds:g} s per minute |",
            "| --- | --- |",
            *(f"| {workers} | {rate:.1f} |" for workers, rate in rows),
            "",
            f"{rows[1][1] / rows[0][1]:.2f} times as many with {rows[1][0]} workers.",
            "",
            f"{options.trials} trials that do nothing: {1000 * cpu_s / options.trials:.1f} ms of "
            f"the driver's CPU time a trial, {1000 * wall_s / options.trials:.1f} ms of time; "
            f"{late:.1f} ms over the last thousand. {os.cpu_count()} cores.",
        ]
    )
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
