"""The search itself: plans are judged beside the device while it measures the promising ones.

This process proposes, judges and builds on the cores that do not measure; one thread hands finished
files to the device, one after another. Whenever the device is about to become idle, the judged plan
with the largest expected gain is built; meanwhile further plans are judged.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from autocompress.build import Stopwatch
from autocompress.config import Objective
from autocompress.device import DeviceProfile
from autocompress.errors import DeviceError, SearchError
from autocompress.evaluate import Evaluation
from autocompress.search.context import SearchContext
from autocompress.search.costs.models import CostModels
from autocompress.search.judge import Interval, Judge, Judgement
from autocompress.search.promotion import FrontGain, Judged, Pool
from autocompress.search.study import Proposal, Study
from autocompress.techniques import technique_of

# Built files that wait for the device: one, so that it is never idle.
_AHEAD = 2
# Judged plans that wait, and how much their networks may take together.
_POOL = 24
_POOL_BYTES = 1 << 29
# Of so many judged plans the best is measured though none promises anything.
_PATIENCE = 3
# If so many candidates fail one after another, something is wrong with all of them.
_HOPELESS = 10
_WAIT_S = 1.0


@final
@dataclass
class Outcome:
    """What happens around the search, told by those who run it.

    Attributes:
        allowed: whether another candidate may be begun, with so many finished or under way.
        finished: called after each finished candidate.
        violations: by how much an evaluation misses the hard limits.
        spent_s: seconds of the search until now.
        excess: by how much estimates are expected to miss the hard limits.
    """

    allowed: Callable[[int], bool]
    finished: Callable[[Evaluation | None], None]
    violations: Callable[[Evaluation], Sequence[float]]
    spent_s: Callable[[], float]
    excess: Callable[[Mapping[Objective, Interval]], float] = lambda estimates: 0.0


@final
@dataclass
class _UnderWay:
    """A candidate that was handed to the device."""

    proposal: Proposal
    judgement: Judgement | None
    future: Future[Evaluation]


@final
@dataclass
class _Count:
    in_a_row: int = 0
    since_promising: int = 0
    exhausted: bool = False
    judged: int = 0


@final
class Explorer:
    """Keeps the device busy with the most promising plans.

    Args:
        context: builds and measures.
        study: proposes plans and keeps what came of them.
        judge: judges plans.
        costs: predicted costs; learns from what is measured.
        original: figures of the original network on the search split.
        outcome: limits, and whom to tell.
    """

    def __init__(
        self,
        context: SearchContext,
        study: Study,
        judge: Judge,
        costs: CostModels,
        original: Evaluation,
        outcome: Outcome,
    ) -> None:
        self._context, self._study = context, study
        self._judge, self._costs, self._outcome = judge, costs, outcome
        self._original, self._objectives = original, context.objectives
        self._pool = Pool(_POOL)
        self._networks: dict[str, nn.Module] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._count = _Count()
        self._gain: FrontGain | None = None

    @property
    def judged(self) -> int:
        """How many plans were judged so far by this object."""
        return self._count.judged

    def run(self) -> None:
        """Search until nothing is allowed any more or no new plan is found.

        Raises:
            SearchError: too many candidates failed in a row.
            DeviceError: the device is not there any more; the trial is tried again later.
        """
        while True:
            self.keep_busy()
            if not self._under_way and (self._count.exhausted or not self._allowed()):
                break
            if self._wants_proposal():
                self._propose()
            elif self._under_way:
                self._wait()
        for judged in self._pool.clear():
            self._let_go(judged)

    def keep_busy(self) -> None:
        """Take in what is finished, and build candidates that the device will need."""
        self._take_in_finished()
        while self._study.seeds_waiting and self._has_place():
            proposal = self._study.propose()
            if proposal is not None:
                self._build(proposal, None)
        if not self._study.seeds_waiting and self._has_place():
            judged = self._most_promising()
            if judged is not None:
                self._build(judged.proposal, judged.judgement)

    def _has_place(self) -> bool:
        return len(self._under_way) < _AHEAD and self._allowed()

    def _allowed(self) -> bool:
        return self._outcome.allowed(self._study.finished + len(self._under_way))

    def _wants_proposal(self) -> bool:
        return not self._count.exhausted and self._allowed() and not self._study.seeds_waiting

    def _propose(self) -> None:
        proposal = self._study.propose()
        if proposal is None:
            self._count.exhausted = True
        elif proposal.seeded or _trains(proposal):
            self._build(proposal, None)
        else:
            self._judge_one(proposal)

    def _judge_one(self, proposal: Proposal) -> None:
        self._study.begin_judging(proposal)
        try:
            tried = self._context.evaluator.builder.network(proposal.plan, Stopwatch())
            predicted = self._costs.predict(proposal.indices, proposal.runtime)
            judgement = self._judge.judge(
                tried, predicted, self._study.evaluations_on_front, self._promises
            )
        except (DeviceError, OSError):
            raise
        except Exception as cause:
            self._fail(proposal, cause)
            return
        self._count.judged += 1
        self._count.since_promising += 1
        self._study.keep_judgement(proposal, judgement.to_dict(), self._outcome.spent_s())
        if judgement.dominated:
            self._study.set_aside(proposal)
            return
        if _POOL * _bytes_of(tried.network) <= _POOL_BYTES:
            self._networks[proposal.candidate] = tried.network
        self._pool.add(Judged(proposal, judgement))

    def _front_gain(self) -> FrontGain:
        if self._gain is None:
            measured = self._study.evaluations_on_front
            self._gain = FrontGain(measured, self._original, self._objectives, self._outcome.excess)
        return self._gain

    def _promises(self, estimates: Mapping[Objective, Interval]) -> bool:
        """Whether estimates lie beyond the front."""
        return self._front_gain().of_estimates(estimates) > 0

    def _most_promising(self) -> Judged | None:
        # A device that would be idle measures the best there is, whatever it promises; so does one
        # that no new plan will come for.
        impatient = self._count.exhausted or self._count.since_promising >= _PATIENCE
        taken, gone = self._pool.take(
            self._front_gain(),
            self._study.evaluations_on_front,
            self._objectives,
            anything=impatient,
        )
        for judged in gone:
            self._let_go(judged)
        if taken is not None:
            self._count.since_promising = 0
        return taken

    def _let_go(self, judged: Judged) -> None:
        self._networks.pop(judged.proposal.candidate, None)
        self._study.set_aside(judged.proposal)

    def _build(self, proposal: Proposal, judgement: Judgement | None) -> None:
        self._study.start(proposal)
        network = self._networks.pop(proposal.candidate, None)
        try:
            artifact = self._context.evaluator.artifact(proposal.plan, network)
        except (DeviceError, OSError):
            # The machine's fault, not the plan's: the trial stays open and is tried again.
            raise
        except Exception as cause:
            # Whatever one plan does to PyTorch must not end a search of hours.
            self._fail(proposal, cause)
            return
        future = self._context.measure(
            artifact, proposal.plan, proposal.runtime, "search", final=False
        )
        self._under_way.append(_UnderWay(proposal, judgement, future))

    def _wait(self) -> None:
        wait([self._under_way[0].future], timeout=_WAIT_S)
        self._take_in_finished()

    def _take_in_finished(self) -> None:
        while self._under_way and self._under_way[0].future.done():
            self._take_in(self._under_way.popleft())

    def _take_in(self, done: _UnderWay) -> None:
        cause = done.future.exception()
        if isinstance(cause, (DeviceError, OSError)) or (
            cause is not None and not isinstance(cause, Exception)
        ):
            raise cause
        if isinstance(cause, Exception):
            self._fail(done.proposal, cause)
            return
        evaluation = done.future.result()
        violations = self._outcome.violations(evaluation)
        self._study.succeed(done.proposal, evaluation, self._outcome.spent_s(), violations)
        self._costs.observe(done.proposal.indices, evaluation)
        if done.judgement is not None:
            self._judge.learn(done.judgement, evaluation)
        self._gain = None
        self._count.in_a_row = 0
        self._outcome.finished(evaluation)

    def _fail(self, proposal: Proposal, cause: Exception) -> None:
        self._study.fail(proposal, f"{type(cause).__name__}: {cause}")
        self._count.in_a_row += 1
        self._outcome.finished(None)
        if self._count.in_a_row >= _HOPELESS:
            raise SearchError(
                f"The last {self._count.in_a_row} candidates all failed; the search is given up.",
                given=f"{type(cause).__name__}: {cause}",
                advice="see failures.json in the run folder; --debug shows the last traceback",
            ) from cause


def _trains(proposal: Proposal) -> bool:
    return any(technique_of(step.decision).stage.trains for step in proposal.plan.steps)


def _bytes_of(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


@contextmanager
def beside_the_device(profile: DeviceProfile, cores: tuple[int, ...]) -> Iterator[None]:
    """Keep this process's computing off the cores that measure, if there are others.

    Args:
        cores: those that the device gives.
    """
    before = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    own = before
    if profile.kind == "cpu" and profile.remote is None:
        own = before - set(profile.pinned_cores(cores)) or before
    try:
        os.sched_setaffinity(0, own)
        torch.set_num_threads(max(1, min(threads, len(own))))
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
