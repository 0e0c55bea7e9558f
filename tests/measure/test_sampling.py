from __future__ import annotations

import gc
import time
from itertools import groupby

from autocompress.measure.sampling import Stopping, clock_mhz, generator_for, sample_pairs


def test_blocks_alternate_and_the_first_run_of_each_is_discarded() -> None:
    calls: list[str] = []

    def model(name: str) -> None:
        time.sleep(0.002)
        calls.append(name)

    samples = sample_pairs(lambda: model("A"), lambda: model("B"), Stopping(0.99, 20, seed=0))
    assert len(samples.baseline_ms) == len(samples.candidate_ms) == 20
    assert all(time_ms > 1 for block in samples.baseline_ms for time_ms in block)
    sampled = sum(len(block) + 1 for block in [*samples.baseline_ms, *samples.candidate_ms])
    # A B, B A, A B, ...: apart from the ends, two blocks of one model follow each other.
    order = "".join(name for name, _ in groupby(calls[-sampled:]))
    assert order == "AB" * 10 + "A"
    assert gc.isenabled()


def test_the_time_limit_ends_sampling_before_the_target() -> None:
    stopping = Stopping(target_half_width=1e-12, time_limit_s=0.1, seed=0)
    samples = sample_pairs(lambda: time.sleep(0.006), lambda: time.sleep(0.006), stopping)
    assert 1 <= len(samples.baseline_ms) == len(samples.candidate_ms) < 20
    assert samples.elapsed_s >= 0.1


def test_an_error_of_a_model_leaves_garbage_collection_on() -> None:
    runs = iter(range(30))
    try:
        sample_pairs(
            lambda: time.sleep(0.006 + 0 * next(runs)), time.monotonic, Stopping(0.1, 5, seed=0)
        )
    except StopIteration:
        pass
    else:
        raise AssertionError("the model's error was swallowed")
    assert gc.isenabled()


def test_clocks_and_generators() -> None:
    assert clock_mhz([10**6]) is None
    first, second = generator_for(3, 20), generator_for(3, 20)
    assert first.integers(2**40) == second.integers(2**40)
