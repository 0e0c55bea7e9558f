from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.device import EnergySettings
from autocompress.errors import MeasurementError
from autocompress.measure import energy
from autocompress.measure.energy import EnergyPair, WindowPlan, plan_windows, sample_energy
from autocompress.measure.energy_statistics import (
    EnergySamples,
    EnergyStopping,
    Window,
    bootstrap_energy,
    temperature_change_c,
)
from autocompress.measure.measurement import Measurement
from autocompress.measure.meters import Meter, MeterFacts
from autocompress.measure.meters.trace import Trace, mean_power_mw
from autocompress.measure.paired_energy import PairedEnergy, energy_stopping, paired_energy
from autocompress.measure.session import Array, Session

energies = st.lists(st.floats(1e-2, 1e4), min_size=1, max_size=20)
seeds = st.integers(0, 2**32 - 1)
STOPPING = EnergyStopping(target_half_width=0.02, time_limit_s=20, minimum_pairs=4, seed=0)
PLAN = WindowPlan(gap_s=0.001, lead_s=0.002, window_s=0.02)
FACTS = MeterFacts("rapl", "CPU package 0", "counter", 0.001, 0.005, 0.0, counts_cpu=False)


def made(
    pairs: int = 8,
    ratio: float = 2.0,
    noise: float = 0.001,
    temperatures: Callable[[int, int], float | None] = lambda side, pair: 50.0,
    **changes: object,
) -> EnergySamples:
    """Windows of a second; 60 W of which 20 W are idle, 10 ms a run for the candidate."""
    draw = np.random.default_rng(0)

    def windows(side: int, runs: float) -> tuple[Window, ...]:
        return tuple(
            Window(
                runs=round(runs),
                seconds=float(runs * 0.01 * (ratio if side == 0 else 1)),
                power_mw=60_000 * float(np.exp(noise * draw.standard_normal())),
                start_c=temperatures(side, pair),
                end_c=temperatures(side, pair),
            )
            for pair in range(pairs)
        )

    samples = EnergySamples(
        meter="nvml",
        scope="GPU 0",
        update_period_s=0.1,
        baseline=windows(0, 100),
        candidate=windows(1, 100),
        idle_mw=20_000.0,
        other_processes=0,
        other_cores=0.0,
        threads=1,
        load_average=0.1,
        elapsed_s=10.0,
    )
    return replace(samples, **changes)


def test_a_window_has_a_closed_form() -> None:
    window = Window(runs=50, seconds=2.0, power_mw=3000, start_c=None, end_c=None)
    assert (window.run_s, window.energy_mj) == (0.04, 120.0)


@given(energies, seeds)
@settings(deadline=None)
def test_identical_windows_save_nothing(values: list[float], seed: int) -> None:
    figures = bootstrap_energy(values, list(values), np.random.default_rng(seed))
    assert figures.saving.value == figures.saving.low == figures.saving.high == 1
    assert figures.baseline == figures.candidate
    assert min(values) * 0.999 <= figures.baseline.low <= figures.baseline.high
    assert figures.baseline.high <= max(values) * 1.001


@given(energies, seeds, st.floats(0.01, 100))
@settings(deadline=None)
def test_a_thriftier_candidate_scales_the_interval(
    values: list[float], seed: int, factor: float
) -> None:
    other = list(np.roll(values, 1))
    one = bootstrap_energy(values, other, np.random.default_rng(seed))
    scaled = bootstrap_energy(values, [e * factor for e in other], np.random.default_rng(seed))
    for name in ("value", "low", "high"):
        ratio, mj = getattr(scaled.saving, name), getattr(scaled.candidate, name)
        assert ratio == pytest.approx(getattr(one.saving, name) / factor)
        assert mj == pytest.approx(getattr(one.candidate, name) * factor)
    assert scaled.saving.half_width == pytest.approx(one.saving.half_width)


@pytest.mark.parametrize(
    ("baseline", "candidate"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([np.nan], [1.0])]
)
def test_unusable_energies_are_refused(baseline: list[float], candidate: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired|positive"):
        bootstrap_energy(baseline, candidate, np.random.default_rng(0))


def test_coverage_with_few_windows_and_common_drift() -> None:
    ratio, trials, hits = 1.7, 300, 0
    for trial in range(trials):
        draw = np.random.default_rng(trial)
        drift = 100 * np.exp(0.1 * np.sin(np.arange(8) / 5))
        baseline = ratio * drift * np.exp(0.03 * draw.standard_normal(8))
        candidate = drift * np.exp(0.03 * draw.standard_normal(8))
        figures = bootstrap_energy(baseline.tolist(), candidate.tolist(), draw)
        hits += figures.saving.low <= ratio <= figures.saving.high
    # Four standard errors of a binomial share at 95 %; the bootstrap of eight is a little narrow.
    assert hits / trials >= 0.93 - 4 * (0.95 * 0.05 / trials) ** 0.5


def part_time_window(offset_s: float) -> float:
    """Mean power in mW of a 1 s window by a counter that sees the last quarter of each 100 ms.

    A run takes 99 ms, two thirds of them at 300 W, the rest at 90 W: 230 W on average.
    """
    ticks = 0.1 * np.arange(13)
    seen = np.array([np.linspace(tick - 0.025, tick, 50, endpoint=False) for tick in ticks])
    busy = ((seen + offset_s) % 0.099) < 0.066
    counter = np.cumsum(np.where(busy, 300_000, 90_000).mean(axis=1) * 0.1)
    times = np.arange(0.1, 1.2, 0.005)
    # Readings fall between the ticks.
    values = counter[np.floor(times / 0.1 + 0.25).astype(int)]
    return mean_power_mw(Trace(times, values), "counter", 0.1)


def test_random_offsets_mend_a_sensor_that_sees_a_quarter_of_the_time() -> None:
    draw = np.random.default_rng(0)
    truth = (300_000 * 66 + 90_000 * 33) / 99
    everywhere = [part_time_window(offset) for offset in np.linspace(0, 0.099, 400)]
    # Always from the same offset, no number of windows would help.
    assert abs(everywhere[0] / truth - 1) > 0.3
    assert np.mean(everywhere) == pytest.approx(truth, rel=0.01)
    hits = 0
    for _ in range(60):
        eight = [part_time_window(offset) for offset in draw.uniform(0, 0.1, size=8)]
        figures = bootstrap_energy(eight, [truth] * 8, draw)
        hits += figures.baseline.low <= truth <= figures.baseline.high
    assert hits >= 48


def test_gross_energy_stands_first_and_net_beside_it() -> None:
    paired = paired_energy(made(noise=0), "d", STOPPING)
    assert paired.baseline_mj == pytest.approx(60_000 * 0.02)
    assert paired.candidate_mj == pytest.approx(60_000 * 0.01)
    assert paired.saving == pytest.approx(2) and paired.idle_mw == 20_000
    assert paired.baseline_net_mj == pytest.approx(40_000 * 0.02)
    assert paired.candidate_net_mj == pytest.approx(40_000 * 0.01)
    assert paired.energy().value == paired.candidate_mj
    assert paired.trusted and paired.reason == ""


@pytest.mark.parametrize(
    ("samples", "parts"),
    [
        (made(pairs=2), ("only 2 of 4 window pairs", "to about 20 s")),
        (
            made(noise=0.2),
            ("ratio of energies is known to", "raise the profile's energy time limit"),
        ),
        (made(temperatures=lambda side, pair: 50 + 5 * side), ("5 °C warmer under the candidate",)),
        (
            made(temperatures=lambda side, pair: 40 + 3 * pair),
            ("changed by +16 °C", "measure again"),
        ),
        (made(other_processes=1), ("1 other process was", "GPU 0", "stop them")),
        (made(other_cores=1.5), ("kept 1.5 CPU cores busy", "stop them")),
        (made(other_cores=float("nan"), load_average=3.0), ("kept 3.0 CPU cores busy",)),
    ],
)
def test_doubts_and_their_remedies(samples: EnergySamples, parts: Sequence[str]) -> None:
    paired = paired_energy(samples, "d", STOPPING)
    assert not paired.trusted
    for part in parts:
        assert part in paired.reason
    for measurement in (paired.energy(), paired.ratio()):
        assert not measurement.trusted and measurement.reason == paired.reason


def test_temperatures_that_are_not_told_raise_no_doubt() -> None:
    samples = made(temperatures=lambda side, pair: None)
    paired = paired_energy(samples, "d", STOPPING)
    assert paired.trusted and paired.baseline_c is None and temperature_change_c(samples) == 0


def test_records_survive_json() -> None:
    paired = paired_energy(made(), "d", STOPPING)
    assert PairedEnergy.from_dict(json.loads(json.dumps(paired.to_dict()))) == paired
    taken, ratio = paired.energy(), paired.ratio()
    assert Measurement.from_dict(json.loads(json.dumps(taken.to_dict()))) == taken
    assert taken.ci_low <= taken.value <= taken.ci_high
    assert (taken.unit, taken.source, taken.device) == ("mJ", "measured", "d")
    assert ratio.value == paired.saving and ratio.unit == "ratio"
    with pytest.raises(TypeError):
        PairedEnergy.from_dict({**paired.to_dict(), "more": 1})


def test_limits_come_from_the_profile() -> None:
    limits = EnergySettings(target_half_width=0.03, time_limit_s=7, final_time_limit_s=9)
    assert energy_stopping(limits, False, 5) == EnergyStopping(0.03, 7, 4, 5)
    assert energy_stopping(limits, True, 5) == EnergyStopping(0.03, 9, 8, 5)


def test_windows_hold_ten_updates() -> None:
    slow = replace(FACTS, update_period_s=0.1, settle_s=0.2)
    assert plan_windows(slow) == WindowPlan(gap_s=0.1, lead_s=0.2, window_s=1.0)
    assert plan_windows(FACTS) == WindowPlan(gap_s=0.001, lead_s=0.05, window_s=0.5)


class ConstantMeter(Meter):
    """Always 5000, warms up by a degree a look, and may fail."""

    facts = FACTS

    def __init__(self, reads: str = "power", fails_after: float = np.inf) -> None:
        self.facts = replace(FACTS, reads=reads)
        self._left = fails_after
        self.looks = 0

    def read(self) -> float:
        self._left -= 1
        if self._left < 0:
            raise OSError("the sensor is gone")
        return 5000.0

    def temperature_c(self) -> float | None:
        self.looks += 1
        return float(self.looks)

    def other_processes(self) -> int:
        return 3 if self.looks else 0

    def close(self) -> None:
        pass


class Sleeping(Session):
    """Notes when it runs."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self._name, self._seconds, self._log = name, seconds, log

    @property
    def input_names(self) -> tuple[str, ...]:
        return ()

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        self._log.append(self._name)
        time.sleep(self._seconds)
        return ()


def sampled(
    meter: Meter, minimum_pairs: int, time_limit_s: float, target: float = 0.9
) -> tuple[EnergySamples, list[str], list[float]]:
    log: list[str] = []
    beats: list[float] = []
    pair = EnergyPair(Sleeping("A", 0.004, log), Sleeping("B", 0.002, log), (), threads=1)
    stopping = EnergyStopping(target, time_limit_s, minimum_pairs, seed=0)
    samples = sample_energy(pair, meter, PLAN, stopping, lambda: beats.append(time.monotonic()))
    return samples, log, beats


def test_models_take_turns_until_the_target() -> None:
    samples, log, beats = sampled(ConstantMeter(), minimum_pairs=4, time_limit_s=60)
    turns = "".join(name for i, name in enumerate(log) if i == 0 or log[i - 1] != name)
    # Both are warmed up first; two windows of one model in a row look like one.
    assert turns == "AB" + "A" + "B" + "A" + "B" + "A"
    assert len(samples.baseline) == len(samples.candidate) == 4
    for window in (*samples.baseline, *samples.candidate):
        assert window.power_mw == pytest.approx(5000)
        assert window.seconds >= PLAN.window_s
        assert window.start_c is not None and window.end_c == window.start_c + 1
    assert samples.idle_mw == pytest.approx(5000)
    assert samples.other_processes == 3 and samples.other_cores == 0
    # A parent that hears nothing for long takes the worker for hung.
    assert len(beats) >= sum(window.runs for window in (*samples.baseline, *samples.candidate))


def test_the_pauses_are_random_and_come_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Clock:
        monotonic = staticmethod(time.monotonic)
        sleep = staticmethod(pauses.append)

    monkeypatch.setattr(energy, "time", Clock)
    # The idle window does nothing but wait.
    monkeypatch.setattr(energy, "measure_idle_mw", lambda meter, plan, beat: 1.0)
    for _ in range(2):
        sampled(ConstantMeter(), minimum_pairs=4, time_limit_s=60)
    assert pauses[:8] == pauses[8:]
    assert len(set(pauses[:8])) == 8
    assert all(0 <= pause <= PLAN.gap_s for pause in pauses)


def test_the_time_limit_ends_sampling_whatever_the_target() -> None:
    samples, _, _ = sampled(ConstantMeter(), minimum_pairs=4, time_limit_s=0.0)
    assert len(samples.baseline) == len(samples.candidate) == 1
    endless, _, _ = sampled(ConstantMeter(), minimum_pairs=10_000, time_limit_s=0.5)
    assert len(endless.baseline) < 10_000


@pytest.mark.parametrize(
    ("meter", "text"),
    [
        (ConstantMeter(fails_after=8), "meter failed: the sensor is gone"),
        (ConstantMeter("counter"), "stands still"),
    ],
)
def test_a_failing_meter_ends_the_measurement(meter: Meter, text: str) -> None:
    with pytest.raises(MeasurementError, match=text):
        sampled(meter, minimum_pairs=2, time_limit_s=10)
