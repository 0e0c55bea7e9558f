"""What a search does next, whoever does it: what is judged, what is built, and what came of it.

Plans that wait are judged on a sample; whenever the device is about to become idle the judged plan
with the largest expected gain is built.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from autocompress.config import Objective
from autocompress.errors import SearchError
from autocompress.evaluation import Evaluation
from autocompress.search.costs.models import CostModels
from autocompress.search.front import front_mask
from autocompress.search.judge import Interval, Judge, Judgement, Seen
from autocompress.search.promotion import FrontGain, Judged, Pool
from autocompress.search.steadied import steadied
from autocompress.search.study import Proposal, Study
from autocompress.techniques import technique_of

# Judged plans that wait.
POOL = 24
# Of so many judged plans the best is measured though none promises anything.
_PATIENCE = 3
# If so many candidates fail one after another, something is wrong with all of them.
_HOPELESS = 10


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
@dataclass(frozen=True)
class Task:
    """A candidate to be built and measured, with what was thought of it, if it was judged."""

    proposal: Proposal
    judgement: Judgement | None


@final
class Agenda:
    """Says what is next and takes in what came of it; does nothing itself.

    Every task of `next_to_build` must end with `measured` or `failed`, and every proposal of
    `next_to_judge` with `judged` or `failed`.

    Args:
        study: proposes plans and keeps what came of them.
        judge: judges plans.
        costs: predicted costs; learns from what is measured.
        original: figures of the original network on the search split.
        outcome: limits, and whom to tell.
    """

    def __init__(
        self,
        study: Study,
        judge: Judge,
        costs: CostModels,
        original: Evaluation,
        outcome: Outcome,
    ) -> None:
        self._study, self._judge, self._costs = study, judge, costs
        self._original, self._outcome = original, outcome
        self._pool = Pool(POOL)
        # Plans that a sample tells nothing about.
        self._unjudged: deque[Proposal] = deque()
        self._gain: FrontGain | None = None
        self._known_front: list[Evaluation] | None = None
        self._exhausted = False
        self._under_way = self._judged = self._since_promising = self._failed_in_a_row = 0

    @property
    def judged_plans(self) -> int:
        """How many plans were judged so far by this object."""
        return self._judged

    @property
    def allowed(self) -> bool:
        """Whether another candidate may be begun."""
        return self._outcome.allowed(self._study.finished + self._under_way)

    @property
    def waiting(self) -> frozenset[str]:
        """Names of judged candidates that may still be built."""
        return frozenset(judged.proposal.candidate for judged in self._pool)

    @property
    def over(self) -> bool:
        """Whether nothing is left to begin."""
        return not self._under_way and (self._exhausted or not self.allowed)

    @property
    def judges(self) -> bool:
        """Whether further plans are to be judged."""
        return not self._exhausted and self.allowed and not self._study.seeds_waiting

    def next_to_judge(self) -> Proposal | None:
        """A new plan; None if there is none that is to be judged."""
        if not self.judges:
            return None
        proposal = self._study.propose()
        if proposal is None:
            self._exhausted = True
        elif proposal.seeded or _trains(proposal):
            self._unjudged.append(proposal)
        else:
            self._study.begin_judging(proposal)
            return proposal
        return None

    def judge(self, proposal: Proposal, seen: Sequence[Seen]) -> Judgement:
        """What is thought of a plan by what its network made of some samples."""
        predicted = self._costs.predict(proposal.indices, proposal.runtime)
        return self._judge.judge(seen, predicted, self._front())

    def promises(self, judgement: Judgement) -> bool:
        """Whether a plan is expected to lie beyond the front."""
        return not judgement.dominated and self._front_gain().of_estimates(judgement.estimates) > 0

    def judged(self, proposal: Proposal, judgement: Judgement) -> None:
        """Take in a judgement."""
        self._judged += 1
        self._since_promising += 1
        self._study.keep_judgement(proposal, judgement.to_dict(), self._outcome.spent_s())
        if judgement.dominated:
            self._study.set_aside(proposal)
        else:
            self._pool.add(Judged(proposal, judgement))

    def next_to_build(self) -> Task | None:
        """The most promising candidate; None if none is ready or allowed."""
        while self.allowed:
            if self._study.seeds_waiting:
                proposal = self._study.propose()
                if proposal is not None:
                    return self._begun(Task(proposal, None))
            elif self._unjudged:
                return self._begun(Task(self._unjudged.popleft(), None))
            else:
                judged = self._most_promising()
                return judged and self._begun(Task(judged.proposal, judged.judgement))
        return None

    def measured(self, task: Task, evaluation: Evaluation) -> None:
        """Take in a candidate's figures."""
        violations = self._outcome.violations(evaluation)
        self._study.succeed(task.proposal, evaluation, self._outcome.spent_s(), violations)
        self._costs.observe(task.proposal.indices, evaluation)
        if task.judgement is not None:
            self._judge.learn(task.judgement, evaluation)
        self._gain = self._known_front = None
        self._failed_in_a_row = 0
        self._under_way -= 1
        self._outcome.finished(evaluation)

    def failed(self, task: Task, reason: str, cause: Exception | None = None) -> None:
        """Take in that a candidate could not be built or measured.

        Raises:
            SearchError: too many failed in a row.
        """
        self._under_way -= 1
        self.unjudgeable(task.proposal, reason, cause)

    def unjudgeable(self, proposal: Proposal, reason: str, cause: Exception | None = None) -> None:
        """Take in that a plan's network could not be made.

        Raises:
            SearchError: too many failed in a row.
        """
        self._study.fail(proposal, reason)
        self._failed_in_a_row += 1
        self._outcome.finished(None)
        if self._failed_in_a_row >= _HOPELESS:
            raise SearchError(
                f"The last {self._failed_in_a_row} candidates all failed; the search is given up.",
                given=reason,
                advice="see failures.json in the run folder; --debug shows the last traceback",
            ) from cause

    def close(self) -> None:
        """Set aside what still waits."""
        for judged in self._pool.clear():
            self._study.set_aside(judged.proposal)

    def _begun(self, task: Task) -> Task:
        self._study.start(task.proposal)
        self._under_way += 1
        return task

    def _front(self) -> list[Evaluation]:
        """The front of what was measured, untrained; luck must not keep better plans away."""
        if self._known_front is None:
            trained = self._study.trained
            own = [e for e in self._study.evaluations if e.candidate not in trained]
            points = steadied(own, self._original)
            mask = front_mask(points, self._judge.objectives)
            self._known_front = [e for e, on in zip(points, mask, strict=True) if on]
        return self._known_front

    def _front_gain(self) -> FrontGain:
        if self._gain is None:
            self._gain = FrontGain(
                self._front(), self._original, self._judge.objectives, self._outcome.excess
            )
        return self._gain

    def _most_promising(self) -> Judged | None:
        # A device that would be idle measures the best there is, whatever it promises; so does one
        # that no new plan will come for.
        impatient = self._exhausted or self._since_promising >= _PATIENCE
        taken, gone = self._pool.take(
            self._front_gain(),
            self._front(),
            self._judge.objectives,
            anything=impatient,
        )
        for judged in gone:
            self._study.set_aside(judged.proposal)
        if taken is not None:
            self._since_promising = 0
        return taken


def reason_of(cause: Exception) -> str:
    """What is kept of why a candidate failed."""
    return f"{type(cause).__name__}: {cause}"


def _trains(proposal: Proposal) -> bool:
    return any(technique_of(step.decision).stage.trains for step in proposal.plan.steps)
