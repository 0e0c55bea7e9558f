"""Taking paired latency samples: blocks of runs of two models in turn, in this process."""

from __future__ import annotations

import gc
import math
import os
import statistics as exact
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from autocompress.measure.statistics import (
    MINIMUM_PAIRS,
    RatioInterval,
    block_medians,
    bootstrap_ratio,
)

Run = Callable[[], object]

BLOCK_S = 0.005
_WARM_S = 0.03
_WARM_RUNS = 3
_PAIRS_PER_CHECK = 10


@final
@dataclass(frozen=True)
class Stopping:
    """When sampling ends: at `target_half_width` (a share of the ratio) or at `time_limit_s`."""

    target_half_width: float
    time_limit_s: float
    seed: int


@final
@dataclass(frozen=True)
class Samples:
    """Run times in ms: one list per block, block i of both models taken side by side."""

    baseline_ms: list[list[float]]
    candidate_ms: list[list[float]]
    load_average: float
    elapsed_s: float


def generator_for(seed: int, pairs: int) -> np.random.Generator:
    """The bootstrap's generator: the same samples always give the same interval."""
    return np.random.default_rng((seed, pairs))


def sample_pairs(baseline: Run, candidate: Run, stopping: Stopping) -> Samples:
    """Time two models in turn until their ratio is known well enough.

    Both are warmed up first. Then pairs of blocks follow, the order within a pair alternating
    (A B, B A, A B, ...). A block lasts at least 5 ms or one run; its first run only fills the
    caches that the other model has emptied, and is discarded. From 20 pairs on, about every ten
    pairs (every sixth of all, once there are many), the interval decides whether to stop.

    Args:
        baseline: runs the baseline once.
        candidate: runs the candidate once.
        stopping: the target, the time limit and the bootstrap's seed.
    """
    load_average = os.getloadavg()[0]
    models = (baseline, candidate)
    runs = tuple(math.ceil(BLOCK_S / _warm(model)) for model in models)
    blocks: tuple[list[list[float]], list[list[float]]] = ([], [])
    next_check = MINIMUM_PAIRS
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.monotonic()
        while True:
            pairs = len(blocks[0])
            for side in (0, 1) if pairs % 2 == 0 else (1, 0):
                blocks[side].append(_timed_block(models[side], runs[side]))
            elapsed_s, pairs = time.monotonic() - start, pairs + 1
            if elapsed_s >= stopping.time_limit_s:
                break
            if pairs >= next_check:
                if _interval(blocks, stopping.seed).half_width <= stopping.target_half_width:
                    break
                next_check = pairs + max(_PAIRS_PER_CHECK, pairs // 6)
    finally:
        if collecting:
            gc.enable()
    return Samples(*blocks, load_average=load_average, elapsed_s=elapsed_s)


def clock_mhz(cores: Sequence[int]) -> float | None:
    """The mean current clock of some cores in MHz; None where the system does not tell."""
    clocks = []
    for core in cores:
        frequency = Path(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq")
        try:
            clocks.append(int(frequency.read_text()) / 1000)
        except (OSError, ValueError):
            return _clock_from_cpuinfo(cores)
    return exact.fmean(clocks) if clocks else None


def _clock_from_cpuinfo(cores: Sequence[int]) -> float | None:
    clocks, core = [], -1
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "processor":
                core = int(value)
            elif key.strip() == "cpu MHz" and core in cores:
                clocks.append(float(value))
    except (OSError, ValueError):
        return None
    return exact.fmean(clocks) if clocks else None


def _warm(run: Run) -> float:
    """Run until allocations and caches have settled; seconds that one run takes then."""
    times: list[float] = []
    end = time.perf_counter() + _WARM_S
    while len(times) < _WARM_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(exact.median(times[len(times) // 2 :]), 1e-7)


def _timed_block(run: Run, runs: int) -> list[float]:
    clock = time.perf_counter_ns
    run()
    times = []
    for _ in range(runs):
        start = clock()
        run()
        times.append(clock() - start)
    # A coarse clock may tick between two reads of it: no run takes no time.
    return [max(t, 1) / 1e6 for t in times]


def _interval(blocks: tuple[list[list[float]], list[list[float]]], seed: int) -> RatioInterval:
    baseline, candidate = map(block_medians, blocks)
    return bootstrap_ratio(baseline, candidate, generator_for(seed, len(baseline)))
