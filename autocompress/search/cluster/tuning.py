"""Running trials by Ray Tune, with the search as the source of its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ray import tune
from ray.tune import Stopper
from ray.tune.schedulers import TrialScheduler

from autocompress.config import Objective
from autocompress.search.cluster.candidate import SharedReference
from autocompress.search.cluster.live_first import LiveFirst
from autocompress.search.cluster.study_search import Pump, StudySearch, TrialSource
from autocompress.search.cluster.unkept import Unkept
from autocompress.search.front import MAXIMISE

# A trial whose worker died is begun anew so often.
MOST_LOST = 3


@final
@dataclass(frozen=True)
class Race:
    """What Tune is told beside the trials.

    Attributes:
        name: of the folder in `storage`.
        modes: `max` or `min` of each objective by its name.
        resources: of a trial.
        storage: where checkpoints go: a folder that all nodes see.
        scheduler: first come, first served if left out.
        over: whether trials are to end with their next result.
        abandoned: whether all is to end at once.
        workers: how many processes are kept for trials that are still to come, unless `scheduler`
            is given.
    """

    name: str
    modes: Mapping[str, str]
    resources: Mapping[str, float]
    storage: str
    scheduler: TrialScheduler | None = None
    over: Callable[[], bool] = lambda: False
    abandoned: Callable[[], bool] = lambda: False
    workers: Callable[[], int] = lambda: 0


@final
class _Ending(Unkept, Stopper):  # type: ignore[misc]  # Ray has no types
    """Tune's stopper by what a race says."""

    def __init__(self, race: Race) -> None:
        self._race = race

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether a trial ends with this result."""
        return self._race.over()

    def stop_all(self) -> bool:
        """Whether everything ends now."""
        return self._race.abandoned()


def modes_of(objectives: Sequence[Objective]) -> dict[str, str]:
    """`max` or `min` of each objective."""
    return {name: "max" if MAXIMISE[name] else "min" for name in objectives}


def run_trials(
    trainable: type[tune.Trainable], shared: SharedReference | None, source: TrialSource, race: Race
) -> None:
    """Run trials until the source has no more and all have ended.

    Workers are used for one trial after another. Nothing is read back from Tune's own files: the
    study is the truth, and a new call starts a new Tuner on it.

    Args:
        shared: given to `trainable.setup`, if there is anything to share.
    """
    bound = trainable if shared is None else tune.with_parameters(trainable, shared=shared)
    tune.Tuner(
        tune.with_resources(bound, dict(race.resources)),
        tune_config=tune.TuneConfig(
            search_alg=StudySearch(source, race.modes),
            scheduler=race.scheduler or LiveFirst(race.workers),
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=race.name,
            storage_path=race.storage,
            failure_config=tune.FailureConfig(max_failures=MOST_LOST),
            stop=_Ending(race),
            callbacks=[Pump(source.pump)],
            verbose=0,
        ),
    ).fit()
