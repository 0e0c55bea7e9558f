from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.measure.measurement import Measurement
from autocompress.measure.statistics import (
    Circumstances,
    PairedLatency,
    block_medians,
    bootstrap_ratio,
    paired_latency,
    percentiles,
)

times = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)
seeds = st.integers(0, 2**32 - 1)
WHERE = Circumstances("d", load_average=0.5, clock_mhz=None, elapsed_s=2.0, target_half_width=0.01)


def drawn_blocks(pairs: int, ratio: float, noise: float, seed: int = 0) -> list[list[list[float]]]:
    draw = np.random.default_rng(seed)
    drift = np.exp(0.1 * np.sin(np.arange(pairs) / 5))[:, None]
    baseline = ratio * drift * np.exp(noise * draw.standard_normal((pairs, 7)))
    candidate = drift * np.exp(noise * draw.standard_normal((pairs, 5)))
    return [baseline.tolist(), candidate.tolist()]


@given(times, seeds)
@settings(deadline=None)
def test_identical_samples_have_ratio_one(values: list[float], seed: int) -> None:
    medians = np.array(values)
    interval = bootstrap_ratio(medians, medians.copy(), np.random.default_rng(seed))
    assert interval.speedup == interval.speedup_low == interval.speedup_high == 1


@given(times, seeds, st.floats(0.01, 100))
@settings(deadline=None)
def test_a_slower_candidate_scales_the_interval(
    values: list[float], seed: int, factor: float
) -> None:
    baseline = np.array(values)
    candidate = np.roll(baseline, 1)
    one = bootstrap_ratio(baseline, candidate, np.random.default_rng(seed))
    other = bootstrap_ratio(baseline, candidate * factor, np.random.default_rng(seed))
    for name in ("speedup", "speedup_low", "speedup_high"):
        assert getattr(other, name) == pytest.approx(getattr(one, name) / factor)
    assert other.half_width == pytest.approx(one.half_width)
    assert other.candidate_high_ms == pytest.approx(one.candidate_high_ms * factor)


@given(times, seeds)
@settings(deadline=None)
def test_the_interval_holds_possible_values_in_order(values: list[float], seed: int) -> None:
    baseline = np.array(values)
    candidate = baseline[::-1] * 2
    interval = bootstrap_ratio(baseline, candidate, np.random.default_rng(seed))
    assert interval.speedup_low <= interval.speedup_high
    assert candidate.min() <= interval.candidate_low_ms <= interval.candidate_high_ms
    assert interval.candidate_high_ms <= candidate.max()


def test_coverage_on_log_normal_samples_with_common_drift() -> None:
    ratio, trials, hits = 1.7, 300, 0
    for trial in range(trials):
        baseline, candidate = drawn_blocks(pairs=30, ratio=ratio, noise=0.05, seed=trial)
        interval = bootstrap_ratio(
            block_medians(baseline), block_medians(candidate), np.random.default_rng(trial)
        )
        hits += interval.speedup_low <= ratio <= interval.speedup_high
    # Four standard errors of a binomial share at 95 %.
    assert hits / trials >= 0.95 - 4 * (0.95 * 0.05 / trials) ** 0.5


def test_percentiles_and_block_medians_have_closed_forms() -> None:
    blocks = [list(range(1, 51)), list(range(51, 102))]
    assert percentiles(blocks) == (51.0, 96.0, 100.0)
    assert block_medians([[1.0], [1.0, 3.0], [5.0, 1.0, 9.0]]).tolist() == [1.0, 2.0, 5.0]


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([float("nan")], [1.0])],
)
def test_unusable_times_are_refused(baseline: list[float], candidate: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired|positive"):
        bootstrap_ratio(np.array(baseline), np.array(candidate), np.random.default_rng(0))


def test_trust_and_its_remedies() -> None:
    def summary(pairs: int, noise: float) -> PairedLatency:
        baseline, candidate = drawn_blocks(pairs, 2.0, noise)
        return paired_latency(baseline, candidate, np.random.default_rng(0), WHERE)

    good, noisy, few = summary(60, 0.002), summary(60, 0.5), summary(5, 0.002)
    assert good.trusted and good.reason == "" and good.speedup == pytest.approx(2, rel=0.01)
    assert not noisy.trusted and "raise the time limit" in noisy.reason
    assert not few.trusted and "5 of 20 block pairs" in few.reason and "8 s" in few.reason
    assert noisy.ratio().trusted is False and noisy.ratio().reason == noisy.reason


def test_records_survive_json() -> None:
    baseline, candidate = drawn_blocks(25, 2.0, 0.01)
    paired = paired_latency(baseline, candidate, np.random.default_rng(0), WHERE)
    assert PairedLatency.from_dict(json.loads(json.dumps(paired.to_dict()))) == paired
    assert len(paired.baseline_samples_ms) == paired.blocks == 25
    latency = paired.latency()
    assert Measurement.from_dict(json.loads(json.dumps(latency.to_dict()))) == latency
    assert latency.ci_low <= latency.value <= latency.ci_high
    assert (latency.unit, latency.source, latency.device) == ("ms", "measured", "d")
