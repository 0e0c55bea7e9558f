"""The Optuna study: the record of every trial, in the run folder's SQLite file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.config import Objective, Sampler
from autocompress.device import DeviceProfile
from autocompress.errors import RunFolderError
from autocompress.evaluate import Evaluation
from autocompress.plan import Plan, candidate_name
from autocompress.search.front import MAXIMISE, objective_values
from autocompress.search.space import Space

_NAME = "autocompress"
_EVALUATION = "evaluation"
_CANDIDATE = "candidate"
_FAILURE = "failure"
_DUPLICATE = "duplicate_of"
_INTERRUPTED = "interrupted"
_SEEDS = "seeds"
_MOST_INTERRUPTIONS = 5
_DUPLICATES_IN_A_ROW = 20
# Which of the profile's runtimes; no layer or group can be called so.
_RUNTIME = "|runtime"


@final
@dataclass(frozen=True)
class Proposal:
    """A trial that waits for its figures."""

    trial: Trial
    plan: Plan
    runtime: str
    candidate: str


@final
class Study:
    """Proposes plans and keeps what came of them; every change is on disk when a call returns.

    Args:
        database: path of the SQLite file, made if missing.
        space: what may be chosen.
        profile: the device; with several runtimes each trial chooses one.
        objectives: what is optimised.
        sampler: how plans are proposed once the enqueued ones are used up.
        seed: of the sampler.

    Raises:
        RunFolderError: the file is no study.
    """

    def __init__(
        self,
        database: Path,
        space: Space,
        profile: DeviceProfile,
        objectives: Sequence[Objective],
        sampler: Sampler,
        seed: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        directions = [
            StudyDirection.MAXIMIZE if MAXIMISE[name] else StudyDirection.MINIMIZE
            for name in objectives
        ]
        try:
            storage = RDBStorage(
                f"sqlite:///{database}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            self._study = optuna.create_study(
                study_name=_NAME, storage=storage, directions=directions, load_if_exists=True
            )
        except Exception as cause:
            # Whatever the database layer raises, the file cannot serve as a study.
            raise RunFolderError(
                f"The study cannot be opened: {cause}",
                given=database,
                advice="give another folder with --run",
            ) from cause
        self._space = space
        self._profile = profile
        self._objectives = tuple(objectives)
        self._sampler = sampler
        self._seed = seed
        self._distributions: dict[str, BaseDistribution] = {
            p.name: IntDistribution(0, p.highest) for p in space.parameters
        }
        if len(profile.runtimes) > 1:
            self._distributions[_RUNTIME] = IntDistribution(0, len(profile.runtimes) - 1)
        self._evaluations: dict[str, Evaluation] = {}
        self._failures: dict[str, str] = {}
        self._recover()

    @property
    def evaluations(self) -> list[Evaluation]:
        """Finished trials' evaluations in order, each plan once."""
        return list(self._evaluations.values())

    @property
    def failures(self) -> Mapping[str, str]:
        """Candidate's name and reason of every failed trial."""
        return self._failures

    @property
    def finished(self) -> int:
        """Trials that ended, well or with a reason; duplicates and interrupted ones don't count."""
        return len(self._evaluations) + len(self._failures)

    def enqueue(self, seeds: Sequence[Mapping[str, int]]) -> None:
        """Put plans before those of the sampler, once per study; each in every runtime."""
        done = int(self._study.user_attrs.get(_SEEDS, 0))
        runtimes = range(len(self._profile.runtimes))
        everywhere = [{**seed, _RUNTIME: i} for seed in seeds for i in runtimes]
        for count, seed in enumerate(everywhere[done:], done + 1):
            values = {name: seed.get(name, 0) for name in self._distributions}
            self._study.enqueue_trial(values)
            self._study.set_user_attr(_SEEDS, count)

    def propose(self) -> Proposal | None:
        """The next plan that was not tried yet; None when there seems to be none left."""
        for attempt in range(2 * _DUPLICATES_IN_A_ROW):
            exhausted = attempt >= _DUPLICATES_IN_A_ROW
            self._study.sampler = self._make_sampler(attempt, uniform=exhausted)
            trial = self._study.ask(self._distributions)
            plan, runtime, name = self._meant(trial.params)
            known = self._evaluations.get(name)
            if known is None and name not in self._failures and plan.steps:
                trial.set_user_attr(_CANDIDATE, name)
                return Proposal(trial, plan, runtime, name)
            trial.set_user_attr(_DUPLICATE, name)
            if known is None:
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self._study.tell(trial, objective_values(known, self._objectives))
        return None

    def succeed(self, proposal: Proposal, evaluation: Evaluation) -> None:
        """Record a finished evaluation."""
        proposal.trial.set_user_attr(_EVALUATION, json.dumps(evaluation.to_dict()))
        self._study.tell(proposal.trial, objective_values(evaluation, self._objectives))
        self._evaluations[evaluation.candidate] = evaluation

    def fail(self, proposal: Proposal, reason: str) -> None:
        """Record a candidate that could not be built or measured."""
        proposal.trial.set_user_attr(_FAILURE, reason)
        self._study.tell(proposal.trial, state=TrialState.FAIL)
        self._failures[proposal.candidate] = reason

    def _meant(self, values: Mapping[str, int]) -> tuple[Plan, str, str]:
        """Plan, runtime and candidate's name that parameter values stand for."""
        plan = self._space.plan(values)
        runtime = self._profile.runtime_names[values.get(_RUNTIME, 0)]
        return plan, runtime, candidate_name(plan.hash, runtime, self._profile.runtime_names[0])

    def _recover(self) -> None:
        """Take in what earlier calls finished; trials that were interrupted are tried again."""
        interrupted: list[FrozenTrial] = []
        for trial in self._study.get_trials(deepcopy=False):
            found = trial.user_attrs.get(_EVALUATION)
            if found is not None:
                evaluation = Evaluation.from_dict(json.loads(found))
                if trial.state == TrialState.RUNNING:
                    # Killed between keeping the figures and closing the trial.
                    self._study.tell(trial.number, objective_values(evaluation, self._objectives))
                self._evaluations[evaluation.candidate] = evaluation
            elif _FAILURE in trial.user_attrs:
                if trial.state == TrialState.RUNNING:
                    self._study.tell(trial.number, state=TrialState.FAIL)
                self._failures[trial.user_attrs[_CANDIDATE]] = trial.user_attrs[_FAILURE]
            elif trial.state == TrialState.RUNNING:
                interrupted.append(trial)
        for trial in interrupted:
            # A kill between the two leads to a duplicate, which is harmless, and to no loss.
            self._retry(trial)
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _retry(self, trial: FrozenTrial) -> None:
        times = int(trial.user_attrs.get(_INTERRUPTED, 0)) + 1
        # A trial that was killed while it was drawn has only what it was enqueued with.
        values = trial.system_attrs.get("fixed_params", trial.params)
        if _DUPLICATE in trial.user_attrs or len(values) < len(self._distributions):
            return
        _, _, name = self._meant(values)
        if times > _MOST_INTERRUPTIONS:
            # A plan that ends the whole process each time must not stop the search for good.
            reason = f"the search was interrupted {times} times while trying it"
            kept = Trial(self._study, trial._trial_id)
            kept.set_user_attr(_CANDIDATE, name)
            kept.set_user_attr(_FAILURE, reason)
            self._failures[name] = reason
            return
        self._study.enqueue_trial(values, user_attrs={_INTERRUPTED: times})

    def _make_sampler(self, attempt: int, *, uniform: bool) -> BaseSampler:
        """A sampler whose seed depends on what is finished only, so that a resumed run agrees."""
        entropy = np.random.SeedSequence([self._seed, self.finished, attempt])
        seed = int(entropy.generate_state(1)[0])
        if uniform or self._sampler == "random":
            return RandomSampler(seed=seed)
        if self._sampler == "nsga2":
            return NSGAIISampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=8, multivariate=True)
