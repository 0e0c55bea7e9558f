"""Taking paired energy windows of two models in turn, in the worker's process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from autocompress.device import DeviceProfile
from autocompress.errors import DeviceError
from autocompress.measure.child import Beat, Request, Setup
from autocompress.measure.energy_statistics import (
    EnergySamples,
    EnergyStopping,
    Window,
    bootstrap_energy,
    energies_mj,
    generator_for,
)
from autocompress.measure.lock import hold
from autocompress.measure.machine import CoreTime
from autocompress.measure.meters import Meter, MeterFacts, meter_for
from autocompress.measure.meters.recorder import Recorder
from autocompress.measure.meters.trace import mean_power_mw
from autocompress.measure.models import Models
from autocompress.measure.sampling import warm_up
from autocompress.measure.session import Array, Session

_PERIODS_IN_WINDOW = 10
_SHORTEST_WINDOW_S = 0.5
_SHORTEST_LEAD_S = 0.05
_NAP_S = 0.2


@final
@dataclass(frozen=True)
class WindowPlan:
    """How long the parts of a window are.

    Attributes:
        gap_s: the longest pause before it; it is drawn at random.
        lead_s: how long the model runs before the meter is read.
        window_s: how long it is read, at least; the last run is always finished.
    """

    gap_s: float
    lead_s: float
    window_s: float


@final
@dataclass(frozen=True)
class MeterReport:
    """The meter of a device, for people to read.

    Attributes:
        name: the meter's name; None if there is none.
        scope: what its figures cover; empty if there is none.
        update_period_s: how often its value changes; None if there is none.
        idle_mw: what the device draws with no model loaded; None if there is no meter.
        reason: why there is none, and what would provide one; else empty.
    """

    name: str | None
    scope: str
    update_period_s: float | None
    idle_mw: float | None
    reason: str


def plan_windows(facts: MeterFacts) -> WindowPlan:
    """Windows of at least ten of the meter's updates and half a second.

    The pause is random within one update: the sensors of some GPUs see only a quarter of each
    (Yang et al., SC24, arXiv 2312.02741), and must not see the same part of every run.
    """
    return WindowPlan(
        gap_s=facts.update_period_s,
        lead_s=max(facts.settle_s, _SHORTEST_LEAD_S),
        window_s=max(_PERIODS_IN_WINDOW * facts.update_period_s, _SHORTEST_WINDOW_S),
    )


def meter_report(profile: DeviceProfile) -> MeterReport:
    """Which meter this machine has for a profile, and what it reads now; takes about a second."""
    try:
        opened = meter_for(profile)
    except DeviceError as cause:
        return MeterReport(None, "", None, None, str(cause))
    with closing(opened) as meter:
        idle_mw = measure_idle_mw(meter, plan_windows(meter.facts), lambda: None)
        facts = meter.facts
    return MeterReport(facts.name, facts.scope, facts.update_period_s, idle_mw, "")


def energy(setup: Setup, models: Models, request: Request, beat: Beat) -> dict[str, Any]:
    """The worker's operation: sample baseline and candidate in turn; see `sample_energy`.

    Raises:
        DeviceError: there is no meter.
    """
    batch = models.batch(request)
    with closing(meter_for(setup.profile)) as meter:
        sessions = []
        for side in ("baseline", "candidate"):
            sessions.append(models.session(request[side], batch))
            beat()
        # A meter counts more than this worker's cores: one measurement at a time.
        with hold((f"meter-{meter.facts.name}",), request["lock_wait_s"], beat):
            pair = EnergyPair(sessions[0], sessions[1], batch, setup.profile.threads)
            stopping = EnergyStopping(**request["stopping"])
            return sample_energy(pair, meter, plan_windows(meter.facts), stopping, beat).to_dict()


@final
@dataclass(frozen=True)
class EnergyPair:
    """Two loaded models, what both are run on, and their threads."""

    baseline: Session
    candidate: Session
    inputs: Sequence[Array]
    threads: int


def sample_energy(
    pair: EnergyPair, meter: Meter, plan: WindowPlan, stopping: EnergyStopping, beat: Beat
) -> EnergySamples:
    """Meter two models in turn until the ratio of their energies is known well enough.

    First the idle device is metered, with both models loaded. Then both are warmed up, and pairs of
    windows follow, the order within a pair alternating (A B, B A, A B, ...), so that both models
    see an equally hot device. A window begins after a random pause and a lead in which the model
    already runs. No pair is begun that would probably end after the time limit.

    Args:
        pair: the models.
        meter: it is read, not closed.
        plan: how long the parts of a window are.
        stopping: the target, the time limit, the fewest pairs and the seed.
        beat: called again and again.

    Raises:
        MeasurementError: the meter failed or stands still.
    """
    start, load_average = time.monotonic(), os.getloadavg()[0]
    others = CoreTime(range(os.cpu_count() or 1)) if meter.facts.counts_cpu else None
    processes = meter.other_processes()
    idle_mw = measure_idle_mw(meter, plan, beat)
    generator = np.random.default_rng(stopping.seed)
    sessions = (pair.baseline, pair.candidate)
    for session in sessions:
        warm_up(session, pair.inputs)
        beat()
    windows: tuple[list[Window], list[Window]] = ([], [])
    slowest_s, order = 0.0, (0, 1)
    while True:
        began = time.monotonic()
        for side in order:
            time.sleep(generator.uniform(0.0, plan.gap_s))
            windows[side].append(_take_window(sessions[side], pair.inputs, meter, plan, beat))
        now, order = time.monotonic(), order[::-1]
        slowest_s = max(slowest_s, now - began)
        if _enough(windows, stopping) or now + slowest_s > start + stopping.time_limit_s:
            break
    return EnergySamples(
        meter=meter.facts.name,
        scope=meter.facts.scope,
        update_period_s=meter.facts.update_period_s,
        baseline=tuple(windows[0]),
        candidate=tuple(windows[1]),
        idle_mw=idle_mw,
        other_processes=max(processes, meter.other_processes()),
        other_cores=others.share_of_others() * (os.cpu_count() or 1) if others else 0.0,
        threads=pair.threads,
        load_average=load_average,
        elapsed_s=time.monotonic() - start,
    )


def measure_idle_mw(meter: Meter, plan: WindowPlan, beat: Beat) -> float:
    """Mean power of a window in which this process does nothing, in mW."""
    _nap(plan.lead_s, beat)
    with Recorder(meter) as recorder:
        _nap(plan.window_s, beat)
    return mean_power_mw(recorder.trace, meter.facts.reads, meter.facts.update_period_s)


def _take_window(
    session: Session, inputs: Sequence[Array], meter: Meter, plan: WindowPlan, beat: Beat
) -> Window:
    def run() -> None:
        session.run(inputs)
        beat()

    _repeat(run, plan.lead_s)
    start_c = meter.temperature_c()
    with Recorder(meter) as recorder:
        runs, seconds = _repeat(run, plan.window_s)
    power_mw = mean_power_mw(recorder.trace, meter.facts.reads, meter.facts.update_period_s)
    return Window(runs, seconds, power_mw, start_c, meter.temperature_c())


def _repeat(run: Callable[[], None], seconds: float) -> tuple[int, float]:
    """Run for at least so long; how often, and how long it took."""
    start, runs = time.monotonic(), 0
    while True:
        run()
        runs += 1
        elapsed_s = time.monotonic() - start
        if elapsed_s >= seconds:
            return runs, elapsed_s


def _nap(seconds: float, beat: Beat) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _NAP_S))
        beat()


def _enough(windows: tuple[list[Window], list[Window]], stopping: EnergyStopping) -> bool:
    pairs = len(windows[0])
    if pairs < stopping.minimum_pairs:
        return False
    figures = bootstrap_energy(
        energies_mj(windows[0]), energies_mj(windows[1]), generator_for(stopping.seed, pairs)
    )
    return figures.saving.half_width <= stopping.target_half_width
