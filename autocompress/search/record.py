"""What a search keeps of its trials: an Optuna study, and a log of what was judged.

Trials that are measured are in the study, in a row each. Plans that were only judged are many, and
a row costs a good part of the judging: they are lines of a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.errors import RunFolderError
from autocompress.search.storage import Storage, open_storage

# Keys of what is noted beside a trial.
CANDIDATE = "candidate"
EVALUATION = "evaluation"
FAILURE = "failure"
FINISHED_S = "finished_s"
INTERRUPTED = "interrupted"
ORDER = "order"
TRAINED = "trained"
VIOLATIONS = "violations"


@final
class TrialRecord:
    """The study of a run: every measured trial once, kept when a call returns.

    Args:
        storage: where it is; made if missing.
        directions: one per objective.

    Raises:
        RunFolderError: there is no study to be had.
    """

    def __init__(self, storage: Storage, directions: Sequence[StudyDirection]) -> None:
        self._storage = open_storage(storage.place)
        self._patience = storage.patience
        try:
            study = optuna.create_study(
                study_name=storage.place.study,
                storage=self._storage,
                directions=directions,
                load_if_exists=True,
            )
        except Exception as cause:
            # Whatever the database layer raises, it cannot serve as a study.
            raise RunFolderError(
                f"The study cannot be opened: {cause}",
                given=storage.place.shown,
                advice="give another folder with --run",
            ) from cause
        self._study_id = study._study_id

    def trials(self) -> list[FrozenTrial]:
        """All trials in the order in which they were begun."""
        return self._storage.get_all_trials(self._study_id)

    def begin(
        self,
        params: Mapping[str, int],
        distributions: Mapping[str, BaseDistribution],
        user_attrs: Mapping[str, Any],
    ) -> int:
        """Note that a trial is about to be measured; its id in the database."""
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=dict(user_attrs),
        )
        # Begun twice, if an answer was lost, it is taken for interrupted and does no harm.
        return self._patience(lambda: self._storage.create_new_trial(self._study_id, template))

    def finish(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
        user_attrs: Mapping[str, Any],
    ) -> None:
        """Note how a trial ended; first what is known of it, then its end."""
        for key, value in user_attrs.items():
            self._patience(partial(self._storage.set_trial_user_attr, trial_id, key, value))
        self._patience(partial(self._end, trial_id, state, values))

    def _end(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> None:
        try:
            self._storage.set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            # Of an earlier attempt only the answer was lost.
            return


@final
class JudgedLog:
    """Lines of JSON, one for each plan that was begun to be judged and one for its judgement.

    Args:
        path: of the file, made if missing; a last line that a kill cut off is passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # A cut line must not swallow the next one.
        if path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            with path.open("ab") as file:
                file.write(b"\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line; it outlives this process when the call returns."""
        with self._path.open("ab") as file:
            file.write(json.dumps(dict(line), separators=(",", ":")).encode() + b"\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines so far."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict):
                    yield line
