from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import pytest

from autocompress.measure import sampling
from autocompress.measure.machine import CoreTime, clock_mhz
from autocompress.measure.sampling import Stopping, generator_for, sample_pairs, warm_up
from autocompress.measure.session import Array, Session

CORES = sorted(os.sched_getaffinity(0))
INPUTS = [np.zeros(1)]


class Pretender(Session):
    """Does what it is told instead of running a model."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("x",)

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        self._act()
        return ()


def sleeper(seconds: float) -> Callable[[], Session]:
    return lambda: Pretender(lambda: time.sleep(seconds))


def test_blocks_alternate_and_the_first_run_of_each_is_not_timed() -> None:
    calls: list[str] = []

    def named(name: str) -> Callable[[], Session]:
        def act() -> None:
            time.sleep(0.002)
            calls.append(name)

        def load() -> Session:
            calls.append(f"load {name}")
            return Pretender(act)

        return load

    samples = sample_pairs(named("A"), named("B"), INPUTS, Stopping(0.99, 30, seed=0), CORES)
    rounds = len(samples.baseline_ms)
    assert rounds == len(samples.candidate_ms) >= 8
    assert all(time_ms >= 2 for runs in samples.baseline_ms for time_ms in runs)
    assert samples.loads == calls.count("load A") == calls.count("load B") >= 2
    last_load = len(calls) - 1 - calls[::-1].index("load B")
    # A B, B A, A B, ...: after warming up, blocks of one model meet in pairs.
    order = "".join(name for name, _ in groupby(calls[last_load + 1 :]))
    assert set(order) == {"A", "B"} and "AB" in order
    timed = sum(map(len, [*samples.baseline_ms, *samples.candidate_ms]))
    assert timed < len([c for c in calls if len(c) == 1])
    assert gc.isenabled()


def test_the_time_limit_ends_sampling_before_the_target() -> None:
    stopping = Stopping(target_half_width=1e-12, time_limit_s=0.4, seed=0)
    samples = sample_pairs(sleeper(0.006), sleeper(0.006), INPUTS, stopping, CORES)
    assert len(samples.baseline_ms) == len(samples.candidate_ms) >= 1
    assert samples.elapsed_s >= 0.4


def test_an_error_of_a_model_leaves_garbage_collection_on() -> None:
    runs = iter(range(30))
    failing = Pretender(lambda: time.sleep(0.006 + 0 * next(runs)))
    with pytest.raises(StopIteration):
        sample_pairs(lambda: failing, sleeper(0.001), INPUTS, Stopping(0.1, 5, seed=0), CORES)
    assert gc.isenabled()


def test_warming_up_lasts_until_the_runs_no_longer_become_faster() -> None:
    count = 0

    def act() -> None:
        nonlocal count
        count += 1
        time.sleep(max(0.002, 0.03 * 0.75**count))

    seconds = warm_up(Pretender(act), INPUTS)
    # From the tenth run on they no longer become faster, and that must be seen in three chunks.
    assert count >= 10 + 3
    assert seconds < 0.03 * 0.75**6


def test_clocks_generators_and_core_time() -> None:
    assert clock_mhz([10**6]) is None
    first, second = generator_for(3, 20), generator_for(3, 20)
    assert first.integers(2**40) == second.integers(2**40)
    assert math.isnan(CoreTime([10**6]).share_of_others())
    watch = CoreTime(CORES)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    assert 0 <= watch.share_of_others() <= 1


def test_sampling_goes_on_for_the_least_time_though_the_target_is_met() -> None:
    stopping = Stopping(target_half_width=0.99, time_limit_s=5, seed=0, least_s=0.9)
    samples = sample_pairs(sleeper(0.001), sleeper(0.001), INPUTS, stopping, CORES)
    assert 0.9 <= samples.elapsed_s < 5


class Clock:
    """Time that passes only while a model runs: four milliseconds a run."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    perf_counter = monotonic

    def perf_counter_ns(self) -> int:
        return round(1e9 * self.now_s)

    def run(self) -> None:
        self.now_s += 0.004


@pytest.mark.parametrize("wanted", [10, 60, 240])
def test_so_many_rounds_fit_into_the_limit(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    clock = Clock()
    monkeypatch.setattr(sampling, "time", clock)
    # No interval is narrow enough.
    stopping = Stopping(-1.0, time_limit_s=30.0, seed=0, rounds_in_limit=wanted)
    samples = sample_pairs(
        lambda: Pretender(clock.run), lambda: Pretender(clock.run), INPUTS, stopping, CORES
    )
    rounds = len(samples.baseline_ms)
    # Loading and warming up takes up to a quarter of the time, and no round is over 0.25 s.
    longest = min(0.25, 30.0 / wanted)
    assert rounds >= 0.7 * 30.0 / (longest + 0.024)
    assert rounds <= 30.0 / longest
    # Two runs at least, of which the first is not timed, of each model.
    assert min(map(len, samples.baseline_ms)) >= 1


def test_more_rounds_in_the_limit_let_sampling_stop_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent = []
    for wanted in (60, 600):
        clock = Clock()
        monkeypatch.setattr(sampling, "time", clock)
        stopping = Stopping(0.99, time_limit_s=30.0, seed=0, rounds_in_limit=wanted)
        samples = sample_pairs(
            lambda clock=clock: Pretender(clock.run),
            lambda clock=clock: Pretender(clock.run),
            INPUTS, stopping, CORES,
        )  # fmt: skip
        spent.append(samples.elapsed_s)
    assert spent[1] < 0.5 * spent[0]
