"""Tune's search algorithm: it hands out what the search's agenda says is next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, final

from ray.tune import Callback
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from autocompress.search.cluster.unkept import Unkept

FINISHED: Final[str] = Searcher.FINISHED


class TrialSource(Protocol):
    """Where Tune's trials come from and go to."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A trial's configuration, `FINISHED`, or None if there is none for now."""

    def complete(self, trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        """Take in how a trial ended."""

    def pump(self) -> None:
        """Do what is to be done between events."""


@final
class StudySearch(Unkept, OptunaSearch):  # type: ignore[misc]  # Ray has no types
    """`OptunaSearch` on a study of its own making would know neither seeds nor judged plans.

    This one is given the study that the local engine works on, with the same sampler, seeds and
    record: a run may go from one engine to the other. Nothing is restored from Tune's checkpoints;
    the study is the truth.

    Args:
        source: says what is next.
        modes: `max` or `min` of each objective by its name.
    """

    def __init__(self, source: TrialSource, modes: Mapping[str, str]) -> None:
        super().__init__(metric=list(modes), mode=list(modes.values()))
        self._source = source

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """The study has all of it."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See `TrialSource.suggest`."""
        return self._source.suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A result is taken in when the trial is complete."""

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """See `TrialSource.complete`."""
        self._source.complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing that the study does not have."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


@final
class Pump(Unkept, Callback):  # type: ignore[misc]  # Ray has no types
    """Calls a function at every step of Tune's loop, at least ten times a second."""

    def __init__(self, pump: Callable[[], None]) -> None:
        self._pump = pump

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Tune's loop has handled an event, or waited for one in vain."""
        self._pump()
