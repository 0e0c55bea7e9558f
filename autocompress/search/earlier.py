"""What earlier calls of a search left: what they finished, and what they were at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from optuna.trial import FrozenTrial, TrialState

from autocompress.config import Objective
from autocompress.evaluation import Evaluation
from autocompress.search.front import objective_values
from autocompress.search.record import (
    CANDIDATE,
    EVALUATION,
    FAILURE,
    INTERRUPTED,
    ORDER,
    TRAINED,
    VIOLATIONS,
    JudgedLog,
    TrialRecord,
)

_MOST_INTERRUPTIONS = 5


@final
@dataclass(frozen=True)
class Finished:
    """A trial that was measured.

    Attributes:
        order: number of its proposal.
        indices: the values of all parameters; empty for a trained one.
        trained: whether it was trained after the search.
    """

    order: int
    indices: Mapping[str, int]
    evaluation: Evaluation
    violations: Sequence[float] = ()
    trained: bool = False


@final
@dataclass(frozen=True)
class Interrupted:
    """A trial that was under way; it is tried again.

    Attributes:
        times: how often it was interrupted.
    """

    candidate: str
    indices: Mapping[str, int]
    times: int


@final
@dataclass
class Earlier:
    """What is known from earlier calls.

    Attributes:
        number: of the last proposal.
        finished: in order of their beginning.
        failures: candidate's name and reason.
        judged: what is known of plans that were judged, by candidate's name.
        set_aside: numbers of proposals that were judged only, and their parameter values.
        interrupted: what was under way.
    """

    number: int = 0
    finished: list[Finished] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    judged: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    set_aside: list[tuple[int, Mapping[str, int]]] = field(default_factory=list)
    interrupted: list[Interrupted] = field(default_factory=list)


def take_in(record: TrialRecord, log: JudgedLog, objectives: Sequence[Objective]) -> Earlier:
    """Read what earlier calls left, and close the rows that they left open.

    Plans that ended the whole process again and again are failures: they must not stop the search
    for good.

    Args:
        objectives: what is optimised.
    """
    found = Earlier()
    running: dict[str, FrozenTrial] = {}
    for trial in record.trials():
        order = int(trial.user_attrs.get(ORDER, 0))
        found.number = max(found.number, order)
        name = str(trial.user_attrs[CANDIDATE])
        unfinished = trial.state == TrialState.RUNNING
        trained = TRAINED in trial.user_attrs
        if EVALUATION in trial.user_attrs:
            evaluation = Evaluation.from_dict(json.loads(trial.user_attrs[EVALUATION]))
            if unfinished:
                # Killed between keeping the figures and closing the trial.
                values = objective_values(evaluation, objectives)
                record.finish(trial._trial_id, TrialState.COMPLETE, values, {})
            violations = trial.user_attrs.get(VIOLATIONS, [])
            found.finished.append(Finished(order, trial.params, evaluation, violations, trained))
        elif unfinished and FAILURE not in trial.user_attrs and not trained:
            running[name] = trial
        else:
            if FAILURE in trial.user_attrs:
                found.failures[name] = trial.user_attrs[FAILURE]
            if unfinished:
                # What was being trained is trained anew, from its checkpoint.
                record.finish(trial._trial_id, TrialState.FAIL, None, {})
    _read_log(log, found)
    for name, trial in running.items():
        _close(record, found, name, trial)
    return found


def _read_log(log: JudgedLog, found: Earlier) -> None:
    """Plans that were judged and not measured; those that ended the process are failures."""
    begun: dict[str, int] = {}
    measured = {e.evaluation.candidate for e in found.finished} | set(found.failures)
    for line in log.lines():
        name = str(line[CANDIDATE])
        if line["state"] == "begun":
            begun[name] = begun.get(name, 0) + 1
            continue
        begun[name] = 0
        order = int(line[ORDER])
        found.number = max(found.number, order)
        found.judged[name] = line["judgement"]
        if name not in measured:
            found.set_aside.append((order, line["indices"]))
    for name, times in begun.items():
        if times > _MOST_INTERRUPTIONS:
            found.failures[name] = f"the search was interrupted {times} times while judging it"


def _close(record: TrialRecord, found: Earlier, name: str, trial: FrozenTrial) -> None:
    """Close the row of an interrupted trial, which is tried again in a row of its own."""
    times = int(trial.user_attrs.get(INTERRUPTED, 0)) + 1
    if times > _MOST_INTERRUPTIONS:
        reason = f"the search was interrupted {times} times while trying it"
        record.finish(trial._trial_id, TrialState.FAIL, None, {FAILURE: reason})
        found.failures[name] = reason
        return
    # A kill between the two leads to a duplicate, which is harmless, and to no loss.
    found.judged.pop(name, None)
    found.interrupted.append(Interrupted(name, trial.params, times))
    record.finish(trial._trial_id, TrialState.FAIL, None, {})
