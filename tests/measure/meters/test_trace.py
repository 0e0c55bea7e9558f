from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import MeasurementError
from autocompress.measure.meters.trace import Trace, mean_power_mw, poll, update_period_s

POWER_MW = 5000.0


def stepped(period_s: float, poll_s: float, offset_s: float, seconds: float) -> Trace:
    """A counter under constant power, updated each period, as polling sees it."""
    times = np.arange(0.0, seconds, poll_s) + offset_s
    return Trace(times, POWER_MW * period_s * np.floor(times / period_s))


@given(st.floats(0.02, 0.5), st.floats(0.02, 0.3), st.floats(0, 1))
@settings(deadline=None)
def test_a_slow_counter_is_read_at_its_steps(period: float, share: float, offset: float) -> None:
    poll_s, seconds = share * period, 12 * period
    trace = stepped(period, poll_s, offset, seconds)
    found = mean_power_mw(trace, "counter", period)
    # Both moments are known to half a poll.
    assert found == pytest.approx(POWER_MW, rel=1.01 * poll_s / (seconds - 3 * period))


@given(st.floats(0.01, 0.05), st.floats(0, 1))
@settings(deadline=None)
def test_a_fast_counter_is_as_old_as_its_period(poll_s: float, offset: float) -> None:
    trace = stepped(0.001, poll_s, offset, 1.0)
    assert mean_power_mw(trace, "counter", 0.001) == pytest.approx(POWER_MW, rel=0.0015)


def test_a_step_lies_midway_to_the_reading_before_or_to_a_period_ago() -> None:
    trace = Trace(np.array([0.0, 0.1, 0.18, 0.9, 1.5]), np.array([0.0, 0, 2, 2, 30]))
    assert mean_power_mw(trace, "counter", 0.2) == pytest.approx(28 / (1.4 - 0.14))


def test_a_window_between_arbitrary_readings_would_be_off() -> None:
    trace = stepped(0.1, 0.005, 0.06, 1.0)
    naive = (trace.values[-1] - trace.values[0]) / (trace.times_s[-1] - trace.times_s[0])
    assert (
        abs(naive / POWER_MW - 1) > 0.005 > abs(mean_power_mw(trace, "counter", 0.1) / POWER_MW - 1)
    )


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=30), st.floats(-50, 50), st.floats(0, 1e5)
)
@settings(deadline=None)
def test_power_on_a_ramp_is_exact(gaps: list[float], slope: float, start: float) -> None:
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    trace = Trace(times, start + slope * times)
    assert mean_power_mw(trace, "power", 0.1) == pytest.approx(start + slope * times[-1] / 2)


def test_unusable_readings_are_refused() -> None:
    still = Trace(np.arange(10.0), np.full(10, 7.0))
    with pytest.raises(MeasurementError, match="stands still"):
        mean_power_mw(still, "counter", 0.1)
    fell = Trace(np.arange(4.0), np.array([5.0, 6.0, 1.0, 2.0]))
    with pytest.raises(MeasurementError, match="fell"):
        mean_power_mw(fell, "counter", 0.1)
    with pytest.raises(MeasurementError, match="only once"):
        mean_power_mw(Trace(np.zeros(1), np.ones(1)), "power", 0.1)


def test_the_update_period_is_watched() -> None:
    assert update_period_s(stepped(0.1, 0.001, 0.03, 0.6)) == pytest.approx(0.1, abs=0.002)
    assert update_period_s(stepped(0.1, 0.001, 0.03, 0.2)) is None
    now = [10.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    trace = poll(lambda: 2 * now[0], 1.0, 0.25, lambda: now[0], sleep)
    assert trace.times_s.tolist() == [10, 10.25, 10.5, 10.75, 11]
    assert trace.values.tolist() == [20, 20.5, 21, 21.5, 22]
