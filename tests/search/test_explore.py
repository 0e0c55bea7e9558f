"""The search's loop with a builder, a judge and a device in closed form."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autocompress.build import Tried
from autocompress.device import load_profile
from autocompress.errors import DeviceError, MeasurementError, PlanError, SearchError
from autocompress.evaluate import Device
from autocompress.evaluation import Evaluation
from autocompress.measure.host import host_of
from autocompress.plan import Plan
from autocompress.search.agenda import Agenda, Outcome
from autocompress.search.costs.models import CostModels
from autocompress.search.explore import Explorer, beside_the_device
from autocompress.search.judge import Interval, Judgement
from autocompress.search.promotion import FrontGain
from autocompress.search.space import Parameter, Space
from autocompress.search.study import Sampling, Study
from autocompress.techniques import NETWORK, Stage
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.recovery import Recover

OBJECTIVES = ("metric", "latency")
PROFILE = load_profile("cpu")
DECISIONS = tuple(FilterPrune(pruning_ratio=r / 10) for r in (2, 4, 6, 8))
SPACE = Space(tuple(Parameter(Stage.PRUNE, f"layer{t}", DECISIONS) for t in range(4)))
SEEDS = [{"layer0|prune": i, "layer1|prune": j} for i in range(1, 5) for j in (1, 2)]


def figures(plan: Plan) -> tuple[float, float]:
    """Metric and latency as a share: the later layers give more for what they lose."""
    ratios = {s.target: getattr(s.decision, "pruning_ratio", 0.0) for s in plan.steps}
    lost = sum(r**2 / (2 + int(t.removeprefix("layer") or 0)) for t, r in ratios.items() if r)
    return 0.9 - 0.2 * lost, 1 / (1 + sum(ratios.values()))


class Scene:
    """All that an explorer works with, and what it did with it.

    `on_network`, `on_build` and `on_measure` are called before a plan is judged, built and
    measured; `delay` gives a measurement's seconds by its number.
    """

    def __init__(
        self,
        folder: Path,
        make_evaluation: Callable[..., Evaluation],
        limit: int = 12,
        space: Space = SPACE,
    ) -> None:
        self.limit, self.space = limit, space
        self.make_evaluation = make_evaluation
        self.on_measure: Callable[[Plan], None] = lambda plan: None
        self.on_build: Callable[[Plan], None] = lambda plan: None
        self.on_network: Callable[[Plan], None] = lambda plan: None
        self.dominated: Callable[[Plan], bool] = lambda plan: False
        self.delay: Callable[[int], float] = lambda number: 0.0
        self.study = Study(folder, space, PROFILE, OBJECTIVES, Sampling("random", 0))
        self.device = ThreadPoolExecutor(1)
        self.measured: list[str] = []
        self.judged: list[str] = []
        self.finished: list[Evaluation | None] = []
        self.learnt: list[tuple[Judgement, Evaluation]] = []
        self.networks: dict[str, nn.Module] = {}
        self.handed: dict[str, nn.Module | None] = {}
        self.looks: dict[str, int] = {}
        self.asked: list[int] = []
        self.most_under_way = self.submitted = 0
        self._busy = threading.Lock()
        original = make_evaluation("original", 0.9, 1.0)
        context: Any = SimpleNamespace(
            objectives=OBJECTIVES,
            measure=self._submit,
            evaluator=SimpleNamespace(
                artifact=self._artifact, builder=SimpleNamespace(network=self._network)
            ),
        )
        judge: Any = SimpleNamespace(
            objectives=OBJECTIVES,
            judge=self._judge,
            learn=lambda j, e: self.learnt.append((j, e)),
        )
        sample: Any = SimpleNamespace(first=self._look, further=lambda network: "further")
        outcome = Outcome(self._allowed, self.finished.append, lambda e: (), lambda: 1.0)
        self.agenda = Agenda(self.study, judge, CostModels(), original, outcome)
        self.explorer = Explorer(context, self.agenda, sample)

    def _allowed(self, count: int) -> bool:
        self.asked.append(count)
        return count < self.limit

    def _network(self, plan: Plan, clock: Any) -> Tried:
        self.on_network(plan)
        self.networks[plan.hash] = nn.Linear(1, 1)
        self._last = plan
        return Tried(self.networks[plan.hash], None)

    def _look(self, tried: Tried) -> Plan:
        assert tried.network is self.networks[self._last.hash]
        self.judged.append(self._last.hash)
        return self._last

    def _judge(self, seen: list[Any], costs: Any, measured: Any) -> Judgement:
        plan = seen[0]
        self.looks[plan.hash] = len(seen)
        metric, latency = figures(plan)
        estimates = {
            "metric": Interval(metric, metric - 0.05, metric + 0.05),
            "latency": Interval(latency, latency / 2, latency * 2),
        }
        return Judgement(estimates, 0.1, 128, self.dominated(plan))

    def _artifact(self, plan: Plan, network: nn.Module | None) -> Plan:
        self.on_build(plan)
        self.handed[plan.hash] = network
        return plan

    def _submit(self, artifact: Plan, plan: Plan, runtime: str) -> Future[Evaluation]:
        assert artifact is plan
        self.submitted += 1
        under_way = self.submitted - len(self.finished)
        self.most_under_way = max(self.most_under_way, under_way)
        return self.device.submit(self._measure, plan, self.submitted)

    def _measure(self, plan: Plan, number: int) -> Evaluation:
        assert self._busy.acquire(blocking=False), "two measurements at once"
        try:
            time.sleep(self.delay(number))
            self.on_measure(plan)
            self.measured.append(plan.hash)
            metric, latency = figures(plan)
            return self.make_evaluation(plan.hash, metric, 1 / latency, plan=plan)
        finally:
            self._busy.release()


@pytest.fixture
def new_scene(
    tmp_path: Path, make_evaluation: Callable[..., Evaluation]
) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def make(name: str = "run", **settings: Any) -> Scene:
        (tmp_path / name).mkdir(exist_ok=True)
        scenes.append(Scene(tmp_path / name, make_evaluation, **settings))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.device.shutdown()


def names(plans: list[dict[str, int]]) -> list[str]:
    return [SPACE.plan(indices).hash for indices in plans]


def test_seeds_come_first_and_the_limit_is_exact(new_scene: Callable[..., Scene]) -> None:
    scene = new_scene(limit=12)
    scene.study.enqueue(SEEDS)

    def hold_the_first(plan: Plan) -> None:
        while scene.submitted < 2:
            time.sleep(1e-3)

    scene.on_measure = hold_the_first
    scene.explorer.run()
    assert scene.measured[: len(SEEDS)] == names(SEEDS)
    assert len(scene.measured) == scene.study.finished == len(scene.finished) == 12
    assert scene.submitted == 12
    assert max(scene.asked) == 12
    assert len(set(scene.measured)) == 12
    assert [e.candidate for e in scene.study.evaluations] == scene.measured
    # The device had one file in hand and one that waited, never more.
    assert scene.most_under_way == 2


def test_seeds_are_not_judged_and_others_are(new_scene: Callable[..., Scene]) -> None:
    scene = new_scene(limit=12)
    scene.study.enqueue(SEEDS)
    scene.explorer.run()
    assert not set(scene.judged) & set(names(SEEDS))
    rest = scene.measured[len(SEEDS) :]
    assert set(rest) <= set(scene.judged)
    assert scene.agenda.judged_plans == len(scene.judged)
    assert {e.candidate for _, e in scene.learnt} == set(rest)
    # What was built for judging is not built again, and nothing is kept of it afterwards.
    for name in rest:
        assert scene.handed[name] is scene.networks[name]
    assert all(scene.handed[name] is None for name in names(SEEDS))
    assert not scene.explorer._networks
    assert not scene.agenda.waiting


@pytest.mark.parametrize("limit", [1, 5, 8])
def test_which_seeds_are_finished_does_not_depend_on_the_threads(
    new_scene: Callable[..., Scene], limit: int
) -> None:
    delays: list[Callable[[int], float]] = [
        lambda number: 0.0, lambda number: 0.004, lambda number: 0.006 * (number % 2)
    ]  # fmt: skip
    for index, delay in enumerate(delays):
        scene = new_scene(f"run{index}", limit=limit)
        scene.delay = delay
        scene.study.enqueue(SEEDS)
        scene.explorer.run()
        assert scene.measured == names(SEEDS[:limit])


def test_plans_that_are_dominated_or_promise_nothing_are_judged_only(
    new_scene: Callable[..., Scene],
) -> None:
    scene = new_scene(limit=10)
    scene.dominated = lambda plan: any(s.target == "layer0" for s in plan.steps)
    scene.explorer.run()
    with_first = [name for name, plan in scene.study.judged.items() if plan["dominated"]]
    assert with_first
    assert not set(with_first) & set(scene.measured)
    assert len(scene.measured) == 10
    # Judging costs no trial.
    assert len(scene.judged) > 10


def test_of_the_judged_the_one_that_adds_most_is_measured_first(
    new_scene: Callable[..., Scene],
) -> None:
    """While the device is held up, many are judged; then the best of them goes first."""
    scene = new_scene(limit=4)
    enough = threading.Event()
    plans: dict[str, Plan] = {}
    gains: list[float] = []

    def network(plan: Plan) -> None:
        plans[plan.hash] = plan
        if len(scene.judged) >= 20:
            enough.set()

    def build(plan: Plan) -> None:
        # Two are under way while the device is held up: the third is chosen from many.
        if len(scene.handed) == 2:
            front = scene.study.evaluations_on_front
            original = scene.make_evaluation("original", 0.9, 1.0)
            gain = FrontGain(front, original, OBJECTIVES)
            waiting = set(scene.judged) - set(scene.handed)
            gains.extend(gain.of(figures(plans[name])) for name in waiting)
            assert gain.of(figures(plan)) == max(gains)

    def held(plan: Plan) -> None:
        assert enough.wait(20)

    scene.on_network, scene.on_build, scene.on_measure = network, build, held
    scene.explorer.run()
    assert len(gains) > 15
    assert len(scene.measured) == 4
    assert not scene.study.failures


def test_only_what_promises_something_is_looked_at_twice(new_scene: Callable[..., Scene]) -> None:
    scene = new_scene(limit=10)
    scene.dominated = lambda plan: any(s.target == "layer0" for s in plan.steps)
    scene.explorer.run()
    for name, judgement in scene.study.judged.items():
        if judgement["dominated"]:
            assert scene.looks[name] == 1
    assert set(scene.looks.values()) == {1, 2}


def test_failures_are_recorded_and_the_search_goes_on(new_scene: Callable[..., Scene]) -> None:
    scene = new_scene(limit=24)
    scene.study.enqueue(SEEDS)
    # Few enough of each that there are never ten in a row.
    refusals, unbuilt = (
        [MeasurementError("It crashed the runtime.")] * 3,
        [RuntimeError("size")] * 3,
    )

    def refuse(plan: Plan) -> None:
        if refusals and any(s.decision == DECISIONS[1] for s in plan.steps):
            raise refusals.pop()

    def unbuildable(plan: Plan) -> None:
        if unbuilt and any(s.decision == DECISIONS[3] for s in plan.steps):
            raise unbuilt.pop()

    scene.on_measure, scene.on_build = refuse, unbuildable
    scene.explorer.run()
    assert scene.study.finished == 24 == len(scene.finished)
    failures = scene.study.failures
    assert len(failures) == scene.finished.count(None) > 2
    assert len(scene.study.evaluations) == 24 - len(failures) > 2
    assert {reason.partition(":")[0] for reason in failures.values()} == {
        "MeasurementError", "RuntimeError"
    }  # fmt: skip
    assert not set(failures) & set(scene.measured)
    assert max(scene.asked) == 24


def test_a_plan_that_cannot_be_judged_is_a_failure(new_scene: Callable[..., Scene]) -> None:
    scene = new_scene(limit=6)

    def refuse(plan: Plan) -> None:
        if any(s.target == "layer3" for s in plan.steps) and len(scene.study.failures) < 2:
            raise PlanError("It does not fit.")

    scene.on_network = refuse
    scene.explorer.run()
    assert len(scene.study.failures) == 2
    assert len(scene.measured) == 4


@pytest.mark.parametrize("where", ["on_measure", "on_build", "on_network"])
def test_ten_failures_in_a_row_end_the_search(new_scene: Callable[..., Scene], where: str) -> None:
    scene = new_scene(limit=50)
    if where != "on_network":
        scene.study.enqueue(SEEDS + [{**seed, "layer2|prune": 1} for seed in SEEDS])

    def refuse(plan: Plan) -> None:
        raise PlanError("Nothing works.")

    setattr(scene, where, refuse)
    with pytest.raises(SearchError, match="last 10 candidates all failed"):
        scene.explorer.run()
    assert len(scene.study.failures) == 10


def test_nine_failures_in_a_row_do_not(new_scene: Callable[..., Scene]) -> None:
    scene = new_scene(limit=16)
    scene.study.enqueue(SEEDS + [{**seed, "layer2|prune": 1} for seed in SEEDS])
    tried: list[str] = []

    def refuse(plan: Plan) -> None:
        tried.append(plan.hash)
        if len(tried) % 10:
            raise PlanError("Nearly nothing works.")

    scene.on_measure = refuse
    scene.explorer.run()
    assert (len(scene.study.failures), len(scene.study.evaluations)) == (15, 1)


@pytest.mark.parametrize("where", ["on_measure", "on_build"])
@pytest.mark.parametrize("error", [DeviceError("It was unplugged."), OSError("disk full")])
def test_a_device_error_leaves_the_trial_open(
    new_scene: Callable[..., Scene], where: str, error: Exception
) -> None:
    scene = new_scene()
    scene.study.enqueue(SEEDS)
    wanted = names(SEEDS)[2]

    def unplug(plan: Plan) -> None:
        if plan.hash == wanted:
            raise error

    setattr(scene, where, unplug)
    with pytest.raises(type(error)):
        scene.explorer.run()
    assert wanted not in scene.study.failures
    again = new_scene(limit=8)
    assert again.study.finished == 2
    again.study.enqueue(SEEDS)
    again.explorer.run()
    assert again.measured[0] == wanted
    assert {e.candidate for e in again.study.evaluations} == set(names(SEEDS))


def test_a_device_error_while_judging_leaves_the_plan_unknown(
    new_scene: Callable[..., Scene],
) -> None:
    scene = new_scene()

    def unplug(plan: Plan) -> None:
        raise DeviceError("It was unplugged.")

    scene.on_network = unplug
    with pytest.raises(DeviceError):
        scene.explorer.run()
    assert not scene.study.failures
    assert scene.study.finished == 0


def test_a_space_that_is_used_up_ends_the_search(new_scene: Callable[..., Scene]) -> None:
    space = Space(SPACE.parameters[:1])
    scene = new_scene(limit=50, space=space)
    scene.explorer.run()
    assert len(scene.judged) == 4
    assert set(scene.measured) <= set(scene.judged)
    assert scene.measured


def test_plans_that_train_are_built_without_judging(new_scene: Callable[..., Scene]) -> None:
    training = Parameter(Stage.RECOVER, NETWORK, (Recover(epochs=1),))
    scene = new_scene(limit=12, space=Space((*SPACE.parameters, training)))
    scene.explorer.run()
    trained = {
        e.candidate for e in scene.study.evaluations if any(r["target"] == NETWORK for r in e.plan)
    }
    assert trained
    assert not trained & set(scene.judged)


def test_one_is_built_ahead_of_the_device_and_no_more(new_scene: Callable[..., Scene]) -> None:
    scene = new_scene()
    go_on = threading.Event()

    def held(plan: Plan) -> None:
        assert go_on.wait(20)

    scene.on_measure = held
    scene.study.enqueue(SEEDS)
    # One for the device and one that waits are built at once, and no more.
    scene.explorer.keep_busy()
    assert scene.submitted == 2
    scene.explorer.keep_busy()
    assert scene.submitted == 2
    go_on.set()
    while scene.explorer._under_way:
        scene.explorer._wait()
    assert scene.measured == names(SEEDS[:2])
    assert scene.study.seeds_waiting == len(SEEDS) - 2
    assert scene.study.finished == 2


def test_the_process_gets_its_cores_and_threads_back() -> None:
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    cores = tuple(sorted(before))
    device = Device(PROFILE, host_of(PROFILE))
    with pytest.raises(ValueError), beside_the_device(device, cores):
        own = os.sched_getaffinity(0)
        pinned = set(PROFILE.pinned_cores(cores))
        assert own == (before - pinned or before)
        assert torch.get_num_threads() <= len(own)
        raise ValueError
    assert os.sched_getaffinity(0) == before
    assert torch.get_num_threads() == threads
