from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.config import Experiment
from autocompress.device import load_profile
from autocompress.errors import ConfigError, DeviceError
from autocompress.measure.measurement import Measurement
from autocompress.search import prepare
from autocompress.search.limits import (
    FIGURES,
    Limit,
    estimated_violations,
    figures_of,
    parse_limit,
    parse_limits,
    satisfied,
    violations,
)


def limits(*texts):
    return parse_limits(texts)


def test_limits_are_read_with_their_units():
    assert parse_limit("metric >= 0.9") == Limit("metric", ">=", 0.9)
    assert parse_limit(" drop<=-0.5 ") == Limit("drop", "<=", -0.5)
    assert parse_limit("latency_ms <= 0.5 ms") == Limit("latency_ms", "<=", 0.5)
    assert parse_limit("speedup >= 3x").bound == 3
    assert parse_limit("energy_mj <= 2mJ").bound == 2
    assert parse_limit("file_bytes <= 2e5").bound == 200_000
    assert parse_limit("download_bytes <= 50kB").bound == 50_000
    assert parse_limit("peak_memory_bytes <= 5MB").bound == 5_000_000
    assert parse_limit("gpu_memory_bytes <= 1GiB").bound == 2**30


@given(figure=st.sampled_from(FIGURES), bound=st.floats(1e-6, 1e9))
def test_a_limits_text_is_read_back(figure, bound):
    sense = ">=" if figure in ("metric", "speedup") else "<="
    found = parse_limit(Limit(figure, sense, bound).text)
    assert (found.figure, found.sense) == (figure, sense)
    assert found.bound == pytest.approx(bound, rel=1e-11)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fast", ("cannot be read", "drop <= 1.0")),
        ("drop < 1", ("cannot be read",)),
        ("drop <= one", ("cannot be read",)),
        ("drop <= nan", ("cannot be read",)),
        ("accuracy >= 0.9", ("no known figure", "metric", "speedup")),
        ("metric <= 0.9", ("better", "metric >= 0.9")),
        ("file_bytes >= 5kB", ("better", "file_bytes <= 5kB")),
        ("file_bytes <= 5ms", ("unknown unit", "kB", "MiB")),
        ("drop <= 1x", ("unknown unit", "without a unit")),
        ("speedup >= 0", ("above zero",)),
        ("latency_ms <= -1", ("above zero",)),
        ("latency_ms <= 1e999", ("above zero",)),
    ],
)
def test_other_limits_are_refused_with_what_is_allowed(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_limit(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_two_limits_on_one_figure_are_refused():
    with pytest.raises(ConfigError, match="drop <= 1; drop <= 2"):
        limits("drop <= 1", "speedup >= 2", "drop <= 2")


def test_figures_are_those_of_the_measured_columns(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 4.0)
    found = figures_of(candidate, original)
    assert found["drop"] == pytest.approx(2.0)
    assert found["latency_ms"] == pytest.approx(0.25)
    assert (found["file_bytes"], found["download_bytes"]) == (1000, 900)
    assert "energy_mj" not in found and "gpu_memory_bytes" not in found


def test_latency_is_held_by_the_paired_ratio_not_by_a_slow_minute(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 4.0)
    slow = replace(candidate, latency=replace(candidate.latency, value=9.0))
    assert figures_of(slow, original)["latency_ms"] == pytest.approx(0.25)


def test_a_users_metric_drops_in_its_own_unit(make_evaluation):
    original, candidate = make_evaluation("original", 30.0, 1.0), make_evaluation("a", 28.5, 4.0)
    original = replace(original, metric=replace(original.metric, unit="metric"))
    assert figures_of(candidate, original)["drop"] == pytest.approx(1.5)


def test_limits_the_device_cannot_take_are_refused_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(prepare, "meter_for", asked.append)
    profile = load_profile("cpu")
    host = prepare.host_of(profile)
    limits = {"limits": ("gpu_memory_bytes <= 1GB", "energy_mj <= 2mJ")}
    experiment = Experiment(
        version=1, name="x", workload="x.py:x", device="cpu", search_space="cnn", search=limits
    )
    with pytest.raises(DeviceError, match="limit of GPU memory"):
        prepare.open_device(profile, host, prepare.wanted_figures(experiment))
    assert len(asked) == 1
    device, _, _ = prepare.open_device(profile, host, ["metric", "latency"])
    assert len(asked) == 1 and device.profile.integer_sums != "auto"


def test_violations_are_shares_of_the_bound(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 2.0)
    found = violations(
        limits("drop <= 1", "speedup >= 4", "file_bytes <= 800", "metric >= 0.8"),
        candidate,
        original,
    )
    assert found == pytest.approx((1.0, 0.5, 0.25, -0.1))


def test_a_bound_that_is_just_met_holds(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 2.0)
    assert satisfied(limits("speedup >= 2", "file_bytes <= 1000"), candidate, original)
    assert not satisfied(limits("speedup >= 2", "file_bytes <= 999"), candidate, original)
    assert satisfied((), candidate, original)


def test_a_drop_of_zero_is_measured_in_points(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 2.0)
    assert violations(limits("drop <= 0"), candidate, original) == pytest.approx((2.0,))


def test_what_was_not_taken_does_not_hold_but_rules_no_estimate_out(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 2.0)
    wanted = limits("energy_mj <= 2", "speedup >= 1")
    assert violations(wanted, candidate, original) == (math.inf, -1.0)
    assert not satisfied(wanted, candidate, original)
    assert estimated_violations(wanted, {"speedup": 2.0}) == (0.0, -1.0)
    assert estimated_violations(wanted, {"speedup": 0.5, "energy_mj": math.nan}) == (0.0, 0.5)


def test_a_figure_that_is_nan_does_not_hold(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 2.0)
    broken = replace(candidate, metric=replace(candidate.metric, value=math.nan))
    assert violations(limits("metric >= 0.1", "drop <= 90"), broken, original) == (math.inf,) * 2


def test_metered_energy_counts(make_evaluation):
    original, candidate = make_evaluation("original", 0.9, 1.0), make_evaluation("a", 0.88, 2.0)
    energy = Measurement(3.0, 2.9, 3.1, "mJ", "measured", "device")
    metered = replace(candidate, energy=energy)
    assert violations(limits("energy_mj <= 2"), metered, original) == (0.5,)


@given(bound=st.floats(0.1, 1e6), value=st.floats(0, 1e6), sense=st.sampled_from(["<=", ">="]))
def test_an_excess_is_positive_exactly_where_the_bound_is_broken(bound, value, sense):
    holds = value <= bound if sense == "<=" else value >= bound
    assert (Limit("speedup", sense, bound).excess(value) <= 0) == holds
