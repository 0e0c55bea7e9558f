from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.measure.latency import PairedLatency, paired_latency
from autocompress.measure.measurement import Measurement
from autocompress.measure.sampling import Samples
from autocompress.measure.statistics import (
    PLACEMENT,
    QUIET,
    bootstrap_ratio,
    disturbance,
    percentiles,
    quiet_time,
    relative_drift,
    widened,
)

rounds_of_times = st.lists(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), min_size=1, max_size=12
)
seeds = st.integers(0, 2**32 - 1)


def drawn_rounds(
    rounds: int, ratio: float, noise: float, seed: int = 0, runs: int = 60
) -> list[list[list[float]]]:
    """Runs of a baseline `ratio` times slower; disturbed upwards, with a state per round."""
    draw = np.random.default_rng(seed)
    sides = []
    for level in (ratio, 1.0):
        state = np.exp(noise * draw.standard_normal((rounds, 1)))
        disturbed = 1 + draw.exponential(0.03, (rounds, runs))
        sides.append((level * state * disturbed).tolist())
    return sides


def samples_of(rounds: int, noise: float, **changes: object) -> Samples:
    baseline, candidate = drawn_rounds(rounds, 2.0, noise)
    plain = Samples(baseline, candidate, 3, 0.5, 0.0, [3000.0] * rounds, 2.0)
    return replace(plain, **changes)


@given(rounds_of_times, seeds)
@settings(deadline=None, max_examples=40)
def test_identical_samples_have_ratio_one(rounds: list[list[float]], seed: int) -> None:
    interval = bootstrap_ratio(rounds, rounds, np.random.default_rng(seed))
    assert interval.speedup == interval.speedup_low == interval.speedup_high == 1


@given(rounds_of_times, seeds, st.floats(0.01, 100))
@settings(deadline=None, max_examples=40)
def test_a_slower_candidate_scales_the_interval(
    rounds: list[list[float]], seed: int, factor: float
) -> None:
    candidate = rounds[::-1]
    slower = [[time * factor for time in runs] for runs in candidate]
    one = bootstrap_ratio(rounds, candidate, np.random.default_rng(seed))
    other = bootstrap_ratio(rounds, slower, np.random.default_rng(seed))
    for name in ("speedup", "speedup_low", "speedup_high"):
        assert getattr(other, name) == pytest.approx(getattr(one, name) / factor)
    assert other.candidate_high_ms == pytest.approx(one.candidate_high_ms * factor)


@given(rounds_of_times, seeds)
@settings(deadline=None, max_examples=40)
def test_the_interval_holds_times_that_were_seen(rounds: list[list[float]], seed: int) -> None:
    interval = bootstrap_ratio(rounds, rounds[::-1], np.random.default_rng(seed))
    seen = {time for runs in rounds for time in runs}
    assert interval.candidate_ms in seen
    assert min(seen) <= interval.candidate_low_ms <= interval.candidate_high_ms <= max(seen)
    assert interval.speedup_low <= interval.speedup_high


@given(rounds_of_times)
def test_the_quiet_time_is_a_low_run_whatever_the_slow_ones_do(rounds: list[list[float]]) -> None:
    runs = [time for each in rounds for time in each]
    quiet = quiet_time(runs)
    assert sum(time < quiet for time in runs) <= QUIET * len(runs)
    slowest = max(runs)
    assert quiet_time([t * 50 if t == slowest and t > quiet else t for t in runs]) == quiet


def test_coverage_where_rounds_have_states_of_their_own() -> None:
    ratio, trials, hits = 1.7, 300, 0
    for trial in range(trials):
        baseline, candidate = drawn_rounds(12, ratio, 0.01, trial)
        interval = bootstrap_ratio(baseline, candidate, np.random.default_rng(trial))
        hits += interval.speedup_low <= ratio <= interval.speedup_high
    assert hits / trials >= 0.90


def test_percentiles_and_quiet_times_have_closed_forms() -> None:
    rounds = [list(range(1, 51)), list(range(51, 102))]
    assert percentiles(rounds) == (51.0, 96.0, 100.0)
    assert quiet_time(range(1, 101)) == 2
    assert quiet_time([3.0]) == 3
    assert relative_drift([[1.0], [9.0], [1.2]]) == pytest.approx(0.2)
    assert relative_drift([[1.0], [2.0]]) == 0


def test_a_quiet_machine_is_not_disturbed_and_a_restless_one_is() -> None:
    calm = [[1.0] * 100] * 3
    assert disturbance(calm, calm) == 0
    # The candidate's few quiet runs hide that the rest are half as slow again.
    restless = [[1.0] * 4 + [1.5] * 96] * 3
    assert disturbance(calm, restless) == pytest.approx(1 / 3)


def test_widening_adds_in_quadrature_and_never_narrows() -> None:
    interval = bootstrap_ratio(*drawn_rounds(10, 2.0, 0.02), np.random.default_rng(0))
    wide = widened(interval, 0.03)
    reach = interval.speedup_high - interval.speedup
    assert wide.speedup_high - wide.speedup == pytest.approx(np.hypot(reach, 0.03 * wide.speedup))
    assert wide.candidate_low_ms <= interval.candidate_low_ms
    assert widened(interval, 0.0).half_width == pytest.approx(interval.half_width)


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([], []), ([[1.0]], [[1.0], [2.0]]), ([[0.0]], [[1.0]]), ([[float("nan")]], [[1.0]])],
)
def test_unusable_times_are_refused(
    baseline: list[list[float]], candidate: list[list[float]]
) -> None:
    with pytest.raises(ValueError, match=r"paired|positive"):
        bootstrap_ratio(baseline, candidate, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (samples_of(20, 0.0005), ()),
        (samples_of(20, 0.5), ("raise the time limit", "stop other programs")),
        (samples_of(4, 0.0005), ("4 of 8 rounds", "4 s")),
        (samples_of(20, 0.0005, others_share=0.5), ("50%", "cores of its own")),
        (samples_of(20, 0.0005, others_share=float("nan")), ()),
        (samples_of(20, 0.0005, clocks_mhz=[3e3] * 10 + [2e3] * 10), ("clock changed by -33%",)),
        (
            samples_of(
                20, 0.0005, baseline_ms=[[2 + 0.05 * i] * 60 for i in range(20)],
            ),
            ("slower meanwhile", "cool down"),
        ),
    ],
)  # fmt: skip
def test_trust_and_its_remedies(samples: Samples, words: tuple[str, ...]) -> None:
    paired = paired_latency(samples, "d", 0.01, seed=0)
    assert paired.trusted == (paired.reason == "") == (not words), paired.reason
    assert all(word in paired.reason for word in words), paired.reason
    assert paired.ratio().trusted is paired.trusted


def test_the_stated_interval_is_never_narrower_than_what_one_process_can_know() -> None:
    paired = paired_latency(samples_of(30, 0.0), "d", 0.01, seed=0)
    assert paired.half_width >= PLACEMENT


def test_records_survive_json() -> None:
    paired = paired_latency(samples_of(12, 0.001), "d", 0.01, seed=0)
    assert PairedLatency.from_dict(json.loads(json.dumps(paired.to_dict()))) == paired
    assert len(paired.baseline_samples_ms) == paired.rounds == 12
    latency = paired.latency()
    assert Measurement.from_dict(json.loads(json.dumps(latency.to_dict()))) == latency
    assert latency.ci_low <= latency.value <= latency.ci_high
    assert (latency.unit, latency.source, latency.device) == ("ms", "measured", "d")
