"""Taking paired latency samples: rounds of runs of two models in turn, in this process."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from autocompress.measure.machine import CoreTime, clock_mhz
from autocompress.measure.session import Array, Session
from autocompress.measure.statistics import bootstrap_ratio

Load = Callable[[], Session]

MINIMUM_ROUNDS = 8
_BLOCK_S = 0.005
_ROUND_S = 0.25
_CHECK_EVERY = 2
# Loading and warming up anew may take this share of the sampling time.
_LOADING_SHARE = 0.25
_TAKEN_BLOCKS = 64
_TAKEN_BYTES = (1 << 8, 1 << 19)
_WARM_CHUNK_S = 0.01
_WARM_CHUNKS = 3
_WARM_TOLERANCE = 0.02
_WARM_LIMIT_S = 1.0
_WARM_SHARE = 0.05


@final
@dataclass(frozen=True)
class Stopping:
    """When sampling ends: at `target_half_width` (a share of the ratio) or at `time_limit_s`.

    Attributes:
        least_s: sampling goes on for so long though the target is met: the machine's state changes
            over seconds, and a short look at it may agree with itself by luck.
        rounds_in_limit: so many rounds fit into the time limit at least, unless a run takes too
            long for that; the more, the sooner sampling may stop.
    """

    target_half_width: float
    time_limit_s: float
    seed: int
    least_s: float = 0.0
    rounds_in_limit: int = 60


@final
@dataclass(frozen=True)
class Samples:
    """Run times in ms, one list per round, and the machine's state meanwhile.

    Attributes:
        baseline_ms: all timed runs of the baseline, by round.
        candidate_ms: those of the candidate, taken in turn with the baseline's.
        loads: how often both models were loaded.
        load_average: one-minute load average when sampling began.
        others_share: share of the measuring cores' time that other programs had; NaN if unknown.
        clocks_mhz: mean clock of the measuring cores after each round; empty where not told.
        elapsed_s: how long all of it took.
    """

    baseline_ms: list[list[float]]
    candidate_ms: list[list[float]]
    loads: int
    load_average: float
    others_share: float
    clocks_mhz: list[float]
    elapsed_s: float

    @property
    def mean_clock_mhz(self) -> float | None:
        """The mean over the rounds; None where the system does not tell."""
        return float(np.mean(self.clocks_mhz)) if self.clocks_mhz else None

    @property
    def clock_change(self) -> float:
        """From the first third of the rounds to the last, as a share; 0 where not told."""
        third = len(self.clocks_mhz) // 3
        if not third:
            return 0.0
        first, last = np.mean(self.clocks_mhz[:third]), np.mean(self.clocks_mhz[-third:])
        return float(last / first - 1)


def generator_for(seed: int, rounds: int) -> np.random.Generator:
    """The bootstrap's generator: the same samples always give the same interval."""
    return np.random.default_rng((seed, rounds))


def sample_pairs(
    baseline: Load,
    candidate: Load,
    inputs: Sequence[Array],
    stopping: Stopping,
    cores: Sequence[int],
) -> Samples:
    """Time two models in turn until their ratio is known well enough.

    Sampling goes in rounds of at most a quarter of a second. Before a round both models are loaded
    anew, as long as that takes no more than a quarter of the time in all, because where a model
    comes to lie in memory changes its speed by some tenths of a per cent; memory that is taken at
    random before makes that another place each time. They are warmed up until the
    fastest run of a chunk no longer falls. Within a round blocks of runs alternate (A B, B A,
    A B, ...). A block lasts at least 5 ms or one run; its first run only fills the caches that the
    other model has emptied, and is not timed. From eight rounds on, the interval decides whether to
    stop.

    Args:
        baseline: loads the baseline.
        candidate: loads the candidate.
        inputs: what both models are run on.
        stopping: the target, the time limit and the bootstrap's seed.
        cores: those that this process is pinned to.
    """
    load_average, others = os.getloadavg()[0], CoreTime(cores)
    rounds: tuple[list[list[float]], list[list[float]]] = ([], [])
    clocks: list[float] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.monotonic()
        pair, loading_s, loads = _Pair(baseline, candidate, inputs, stopping), 0.0, 0
        while True:
            if loading_s <= _LOADING_SHARE * (time.monotonic() - start):
                begin = time.monotonic()
                pair.load()
                loading_s, loads = loading_s + time.monotonic() - begin, loads + 1
            remaining_s = start + stopping.time_limit_s - time.monotonic()
            round_s = min(_ROUND_S, stopping.time_limit_s / stopping.rounds_in_limit)
            for side, runs in enumerate(pair.round(min(round_s, max(remaining_s, 0.0)))):
                rounds[side].append(runs)
            clock = clock_mhz(cores)
            clocks += [] if clock is None else [clock]
            spent_s = time.monotonic() - start
            enough = spent_s >= stopping.least_s and _enough(rounds, stopping)
            if enough or spent_s >= stopping.time_limit_s:
                break
        elapsed_s = time.monotonic() - start
    finally:
        if collecting:
            gc.enable()
    return Samples(*rounds, loads, load_average, others.share_of_others(), clocks, elapsed_s)


@final
class _Pair:
    """Two models that are run in turn."""

    def __init__(
        self, baseline: Load, candidate: Load, inputs: Sequence[Array], stopping: Stopping
    ) -> None:
        self._loads = (baseline, candidate)
        self._inputs = inputs
        self._generator = np.random.default_rng(stopping.seed)
        self._warm_limit_s = min(_WARM_LIMIT_S, _WARM_SHARE * stopping.time_limit_s)
        self._taken: list[Array] = []
        self._sessions: tuple[Session, ...] = ()
        self._runs: tuple[int, ...] = ()

    def load(self) -> None:
        """Load both anew and warm them up."""
        # The old ones go first: two of each would not fit everywhere.
        self._sessions = ()
        self._taken = _take_memory(self._generator)
        self._sessions = tuple(load() for load in self._loads)
        seconds = [warm_up(s, self._inputs, self._warm_limit_s) for s in self._sessions]
        self._runs = tuple(math.ceil(_BLOCK_S / s) for s in seconds)

    def round(self, seconds: float) -> tuple[list[float], list[float]]:
        """Pairs of blocks for about so long, at least one pair; run times in ms of each model."""
        times: tuple[list[float], list[float]] = ([], [])
        end, order = time.monotonic() + seconds, (0, 1)
        while True:
            for side in order:
                times[side].extend(
                    _timed_block(self._sessions[side], self._inputs, self._runs[side])
                )
            order = order[::-1]
            if time.monotonic() >= end:
                return times


def _take_memory(generator: np.random.Generator) -> list[Array]:
    """Blocks of memory of random sizes, in use."""
    smallest, largest = np.log(_TAKEN_BYTES)
    sizes = np.exp(generator.uniform(smallest, largest, size=_TAKEN_BLOCKS))
    return [np.ones(int(size), dtype=np.uint8) for size in sizes]


def warm_up(session: Session, inputs: Sequence[Array], limit_s: float = _WARM_LIMIT_S) -> float:
    """Run until the fastest run of a chunk stays within 2 % for three chunks, or for `limit_s`.

    Returns:
        Seconds that one run takes then.
    """
    chunks: list[float] = []
    end = time.perf_counter() + limit_s
    while True:
        chunks.append(_fastest(session, inputs))
        last = chunks[-_WARM_CHUNKS:]
        settled = len(chunks) >= _WARM_CHUNKS and max(last) <= (1 + _WARM_TOLERANCE) * min(last)
        if settled or time.perf_counter() >= end:
            return max(min(last), 1e-7)


def _fastest(session: Session, inputs: Sequence[Array]) -> float:
    end, fastest = time.perf_counter() + _WARM_CHUNK_S, math.inf
    while True:
        start = time.perf_counter()
        session.run(inputs)
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if now >= end:
            return fastest


def _timed_block(session: Session, inputs: Sequence[Array], runs: int) -> list[float]:
    clock, run = time.perf_counter_ns, session.run
    run(inputs)
    times = []
    for _ in range(runs):
        start = clock()
        run(inputs)
        times.append(clock() - start)
    # A coarse clock may tick between two reads of it: no run takes no time.
    return [max(t, 1) / 1e6 for t in times]


def _enough(rounds: tuple[list[list[float]], list[list[float]]], stopping: Stopping) -> bool:
    count = len(rounds[0])
    if count < MINIMUM_ROUNDS or count % _CHECK_EVERY == 0:
        return False
    interval = bootstrap_ratio(*rounds, generator_for(stopping.seed, count))
    return interval.half_width <= stopping.target_half_width
