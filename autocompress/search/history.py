"""When a run found what it found."""

from __future__ import annotations

import json
from pathlib import Path

import optuna

from autocompress.errors import RunFolderError
from autocompress.evaluation import Evaluation
from autocompress.search.record import EVALUATION, FINISHED_S
from autocompress.search.storage import has_study, open_storage, place_of


def read_history(run: Path) -> list[tuple[float, Evaluation]]:
    """Every measured candidate with the seconds of search after which it was finished, in order.

    Seconds count over all calls that worked in the folder, set-up included.

    Raises:
        RunFolderError: there is no study in the folder.
    """
    if not has_study(run):
        raise RunFolderError("There is no study in the folder.", given=run)
    place = place_of(run)
    try:
        study = optuna.load_study(study_name=place.study, storage=open_storage(place))
    except KeyError as cause:
        raise RunFolderError(
            f"The study cannot be read: {place.study} is not there.", given=place.shown
        ) from cause
    found = [
        (
            float(trial.user_attrs.get(FINISHED_S, 0.0)),
            Evaluation.from_dict(json.loads(trial.user_attrs[EVALUATION])),
        )
        for trial in study.get_trials(deepcopy=False)
        if EVALUATION in trial.user_attrs
    ]
    return sorted(found, key=lambda pair: pair[0])
