"""The study: which plans are proposed, and what is known of every one of them.

Optuna's samplers work on a study in memory; what they learn from is on disk (see `record`), so that
a killed search goes on with all of it. A storage on disk alone would take longer to write a trial's
parameters than the trial takes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autocompress.config import Objective, Sampler
from autocompress.device import DeviceProfile
from autocompress.evaluation import Evaluation
from autocompress.plan import Plan, candidate_name
from autocompress.search.earlier import take_in
from autocompress.search.front import MAXIMISE, front_mask, objective_values
from autocompress.search.record import (
    CANDIDATE,
    EVALUATION,
    FAILURE,
    FINISHED_S,
    INTERRUPTED,
    ORDER,
    TRAINED,
    VIOLATIONS,
    JudgedLog,
    TrialRecord,
)
from autocompress.search.samplers import SamplerContext, make_sampler
from autocompress.search.space import Space
from autocompress.search.storage import Storage, storage_of

_DUPLICATES_IN_A_ROW = 20
# Which of the profile's runtimes; no layer or group can be called so.
RUNTIME = "|runtime"
# These keep what they know between draws; the others are made anew for each.
_LASTING: tuple[Sampler, ...] = ("mutation",)


@final
@dataclass(frozen=True)
class Proposal:
    """A plan that waits for its figures.

    Attributes:
        indices: the values of all parameters.
        number: of the proposal, counted over all calls.
        seeded: whether it was enqueued.
    """

    trial: Trial
    indices: Mapping[str, int]
    plan: Plan
    runtime: str
    candidate: str
    number: int
    seeded: bool = False


@final
@dataclass(frozen=True)
class Sampling:
    """How plans are proposed once the enqueued ones are used up."""

    sampler: Sampler
    seed: int
    context: SamplerContext = field(default_factory=SamplerContext)


@final
class Study:
    """Proposes plans and keeps what came of them.

    Args:
        folder: the run folder; holds the log of judged plans.
        space: what may be chosen.
        profile: the device; with several runtimes each trial chooses one.
        objectives: what is optimised.
        sampling: the sampler.
        storage: of the trials; None for where the folder has it.

    Raises:
        RunFolderError: the database is no study.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        profile: DeviceProfile,
        objectives: Sequence[Objective],
        sampling: Sampling,
        storage: Storage | None = None,
    ) -> None:
        directions = [
            StudyDirection.MAXIMIZE if MAXIMISE[name] else StudyDirection.MINIMIZE
            for name in objectives
        ]
        self._record = TrialRecord(storage or storage_of(folder), directions)
        self._log = JudgedLog(folder / "judged.jsonl")
        self._study = optuna.create_study(directions=directions)
        self._space = space
        self._profile = profile
        self._objectives = tuple(objectives)
        self._sampling = sampling
        self._lasting: BaseSampler | None = None
        self._distributions: dict[str, BaseDistribution] = {
            p.name: IntDistribution(0, p.highest) for p in space.parameters
        }
        if len(profile.runtimes) > 1:
            self._distributions[RUNTIME] = IntDistribution(0, len(profile.runtimes) - 1)
        self._evaluations: dict[str, Evaluation] = {}
        self._failures: dict[str, str] = {}
        self._judged: dict[str, Mapping[str, Any]] = {}
        self._ids: dict[str, int] = {}
        self._interruptions: dict[str, int] = {}
        self._number = 0
        self._front: list[Evaluation] = []
        self._trained: dict[str, Evaluation] = {}
        self._indices: dict[str, Mapping[str, int]] = {}
        self._seeds: deque[Mapping[str, int]] = deque()
        self._recover()

    @property
    def evaluations(self) -> list[Evaluation]:
        """Finished trials' evaluations in order, each plan once."""
        return list(self._evaluations.values())

    @property
    def evaluations_on_front(self) -> list[Evaluation]:
        """Of those that were not trained the ones that no other one dominates."""
        return self._front

    @property
    def failures(self) -> Mapping[str, str]:
        """Candidate's name and reason of every failed trial."""
        return self._failures

    @property
    def trained(self) -> Mapping[str, Evaluation]:
        """Of the evaluations those that were trained after the search, by candidate's name."""
        return self._trained

    def indices_of(self, candidate: str) -> Mapping[str, int]:
        """The parameter values of an evaluated candidate that was not trained."""
        return self._indices[candidate]

    def keep_trained(self, evaluation: Evaluation, spent_s: float) -> None:
        """Record a candidate that was trained; no sampler learns from it."""
        attributes = {CANDIDATE: evaluation.candidate, ORDER: self._number, TRAINED: True}
        trial_id = self._record.begin({}, {}, attributes)
        values = objective_values(evaluation, self._objectives)
        found = {EVALUATION: json.dumps(evaluation.to_dict()), FINISHED_S: round(spent_s, 2)}
        self._record.finish(trial_id, TrialState.COMPLETE, values, found)
        self._take_trained(evaluation)

    @property
    def judged(self) -> Mapping[str, Mapping[str, Any]]:
        """What is known of plans that were judged and not measured, by candidate's name."""
        return self._judged

    @property
    def finished(self) -> int:
        """Trials that were measured or failed; plans that were judged or trained don't count."""
        return len(self._evaluations) - len(self._trained) + len(self._failures)

    def enqueue(self, seeds: Sequence[Mapping[str, int]]) -> None:
        """Put plans before those of the sampler, each in every runtime; known ones are passed over.

        Args:
            seeds: values by parameter; one that names a runtime is tried in that only.
        """
        for seed in seeds:
            runtimes = [seed[RUNTIME]] if RUNTIME in seed else range(len(self._profile.runtimes))
            for runtime in runtimes:
                values = {**seed, RUNTIME: runtime}
                values = {name: values.get(name, 0) for name in self._distributions}
                _, _, name = self._meant(values)
                if not self._is_known(name):
                    self._seeds.append(values)

    @property
    def seeds_waiting(self) -> int:
        """How many enqueued plans were not proposed yet; some of them may be known by now."""
        return len(self._seeds)

    def propose(self) -> Proposal | None:
        """The next plan that was not tried yet; None when there seems to be none left."""
        attempts = 0
        while attempts < 2 * _DUPLICATES_IN_A_ROW:
            seeded = bool(self._seeds)
            if seeded:
                self._study.enqueue_trial(dict(self._seeds.popleft()))
            exhausted = attempts >= _DUPLICATES_IN_A_ROW
            self._study.sampler = self._make_sampler(attempts, uniform=exhausted)
            trial = self._study.ask(self._distributions)
            attempts += not seeded
            plan, runtime, name = self._meant(trial.params)
            if not self._is_known(name) and name not in self._ids and plan.steps:
                self._number += 1
                # Two proposals under way must not be the same.
                self._ids[name] = -1
                indices = {k: int(v) for k, v in trial.params.items()}
                return Proposal(trial, indices, plan, runtime, name, self._number, seeded)
            # Not told as a result: it is in the study already, and a resumed search has it once.
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def begin_judging(self, proposal: Proposal) -> None:
        """Note that a plan is about to be judged: one that ends the process is known by it."""
        self._log.append(
            {CANDIDATE: proposal.candidate, "state": "begun", "indices": _sparse(proposal.indices)}
        )

    def keep_judgement(
        self, proposal: Proposal, judgement: Mapping[str, Any], spent_s: float = 0.0
    ) -> None:
        """Note what judging found, after so many seconds of search; it may still be measured."""
        self._log.append(
            {
                CANDIDATE: proposal.candidate, "state": "judged", ORDER: proposal.number,
                "indices": _sparse(proposal.indices), "judgement": dict(judgement),
                FINISHED_S: round(spent_s, 2),
            }
        )  # fmt: skip
        self._judged[proposal.candidate] = judgement

    def set_aside(self, proposal: Proposal) -> None:
        """Leave a judged plan unmeasured."""
        self._study.tell(proposal.trial, state=TrialState.PRUNED)
        del self._ids[proposal.candidate]

    def start(self, proposal: Proposal) -> None:
        """Note that a plan is about to be built and measured."""
        attributes = {
            CANDIDATE: proposal.candidate,
            ORDER: proposal.number,
            INTERRUPTED: self._interruptions.get(proposal.candidate, 0),
        }
        self._ids[proposal.candidate] = self._record.begin(
            proposal.indices, self._distributions, attributes
        )

    def succeed(
        self,
        proposal: Proposal,
        evaluation: Evaluation,
        spent_s: float = 0.0,
        violations: Sequence[float] = (),
    ) -> None:
        """Record a finished evaluation.

        Args:
            spent_s: seconds of the search until now.
            violations: by how much it misses the hard limits, 0 or less where it holds one.
        """
        values = objective_values(evaluation, self._objectives)
        attributes = {
            EVALUATION: json.dumps(evaluation.to_dict()),
            FINISHED_S: round(spent_s, 2),
            VIOLATIONS: list(violations),
        }
        self._record.finish(self._started(proposal), TrialState.COMPLETE, values, attributes)
        proposal.trial.set_user_attr(VIOLATIONS, list(violations))
        self._study.tell(proposal.trial, values)
        self._indices[evaluation.candidate] = proposal.indices
        self._keep(evaluation)
        del self._ids[proposal.candidate]

    def fail(self, proposal: Proposal, reason: str) -> None:
        """Record a candidate that could not be built or measured."""
        trial_id = self._started(proposal)
        self._record.finish(trial_id, TrialState.FAIL, None, {FAILURE: reason})
        self._study.tell(proposal.trial, state=TrialState.FAIL)
        self._failures[proposal.candidate] = reason
        del self._ids[proposal.candidate]

    def _keep(self, evaluation: Evaluation) -> None:
        self._evaluations[evaluation.candidate] = evaluation
        # Only the front's members can still be dominated, or dominate.
        known = [*self._front, evaluation]
        mask = front_mask(known, self._objectives)
        self._front = [e for e, on in zip(known, mask, strict=True) if on]

    def _started(self, proposal: Proposal) -> int:
        if self._ids[proposal.candidate] < 0:
            self.start(proposal)
        return self._ids[proposal.candidate]

    def _is_known(self, name: str) -> bool:
        return name in self._evaluations or name in self._failures or name in self._judged

    def _meant(self, values: Mapping[str, int]) -> tuple[Plan, str, str]:
        """Plan, runtime and candidate's name that parameter values stand for."""
        plan = self._space.plan(values)
        runtime = self._profile.runtime_names[values.get(RUNTIME, 0)]
        return plan, runtime, candidate_name(plan.hash, runtime, self._profile.runtime_names[0])

    def _recover(self) -> None:
        """Go on with what earlier calls finished; what they left undone is tried again."""
        earlier = take_in(self._record, self._log, self._objectives)
        self._number = earlier.number
        self._failures.update(earlier.failures)
        self._judged.update(earlier.judged)
        told = [
            (order, self._frozen(TrialState.PRUNED, indices, None, {}))
            for order, indices in earlier.set_aside
        ]
        for done in earlier.finished:
            evaluation = done.evaluation
            if done.trained:
                self._take_trained(evaluation)
                continue
            self._indices[evaluation.candidate] = done.indices
            self._keep(evaluation)
            values = objective_values(evaluation, self._objectives)
            attributes = {VIOLATIONS: done.violations}
            complete = self._frozen(TrialState.COMPLETE, done.indices, values, attributes)
            told.append((done.order, complete))
        for _, trial in sorted(told, key=lambda pair: pair[0]):
            self._study.add_trial(trial)
        for cut in earlier.interrupted:
            self._interruptions[cut.candidate] = cut.times
            self._seeds.append(dict(cut.indices))

    def _take_trained(self, evaluation: Evaluation) -> None:
        self._trained[evaluation.candidate] = evaluation
        self._evaluations[evaluation.candidate] = evaluation

    def _frozen(
        self,
        state: TrialState,
        params: Mapping[str, int],
        values: Sequence[float] | None,
        attributes: Mapping[str, Any],
    ) -> FrozenTrial:
        return create_trial(
            state=state,
            values=values,
            params={name: params.get(name, 0) for name in self._distributions},
            distributions=self._distributions,
            user_attrs=dict(attributes),
        )

    def _make_sampler(self, attempt: int, *, uniform: bool) -> BaseSampler:
        """A sampler whose seed depends on what is finished only, so that a resumed run agrees."""
        sampling = self._sampling
        if not uniform and sampling.sampler in _LASTING:
            if self._lasting is None:
                self._lasting = make_sampler(sampling.sampler, sampling.seed, sampling.context)
            return self._lasting
        entropy = np.random.SeedSequence(
            [sampling.seed, self.finished + len(self._judged), attempt]
        )
        seed = int(entropy.generate_state(1)[0])
        return make_sampler("random" if uniform else sampling.sampler, seed, sampling.context)


def _sparse(indices: Mapping[str, int]) -> dict[str, int]:
    return {name: index for name, index in indices.items() if index}
