"""Asynchronous successive halving of the survivors' rounds, by the front instead of one figure.

After each round a network goes on at once if it is in the better half of those that have finished
that round so far; otherwise it waits, and goes on once further results have put it there (Li et
al. 2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, final

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from autocompress.search.cluster.unkept import Unkept

ResultT = TypeVar("ResultT")


@final
class Rungs(Generic[ResultT]):
    """Which networks have finished which rounds, and who goes on.

    Args:
        rounds: how many there are.
        better_half: of results those that go on.
    """

    def __init__(
        self, rounds: int, better_half: Callable[[Sequence[ResultT]], Sequence[ResultT]]
    ) -> None:
        self._rounds, self._better_half = rounds, better_half
        self._finished: list[dict[str, ResultT]] = [{} for _ in range(rounds)]
        self._begun: dict[str, int] = {}

    def finish(self, name: str, number: int, result: ResultT) -> bool:
        """Take in a round's result, from 0; whether the network goes on at once."""
        self._finished[number][name] = result
        self._begun[name] = number
        return self.goes_on(name)

    def goes_on(self, name: str) -> bool:
        """Whether a network that waits after its last round is to begin the next one."""
        number = self._begun[name]
        if number + 1 >= self._rounds:
            return False
        finished = self._finished[number]
        chosen = self._better_half(list(finished.values()))
        return any(finished[name] is result for result in chosen)

    def ended(self, name: str) -> bool:
        """Whether a network has no round left."""
        return self._begun.get(name, -1) + 1 >= self._rounds

    def finished(self, number: int) -> Mapping[str, ResultT]:
        """The results of a round so far."""
        return self._finished[number]


@final
class Halving(Unkept, TrialScheduler):  # type: ignore[misc]  # Ray has no types
    """Tune's scheduler for `Rungs`.

    Args:
        rungs: says who goes on.
        result_of: what `rungs` is told of a trial's configuration and result; None if the round
            failed.
        name_of: a trial's name in `rungs`, by its configuration.
    """

    def __init__(
        self,
        rungs: Rungs[Any],
        result_of: Callable[[Mapping[str, Any], Mapping[str, Any]], Any | None],
        name_of: Callable[[Mapping[str, Any]], str],
    ) -> None:
        super().__init__()
        self._rungs, self._result_of, self._name_of = rungs, result_of, name_of

    def set_search_properties(self, metric: Any, mode: Any, **spec: Any) -> bool:
        """Neither is needed."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing to prepare."""

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """It is out of the race."""

    def on_trial_complete(
        self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]
    ) -> None:
        """The last round's result comes with the end."""
        self._take_in(trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """It is out of the race."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Whether a trial trains on, waits, or has ended."""
        goes_on = self._take_in(trial, result)
        if goes_on is None or self._rungs.ended(self._name_of(trial.config)):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.PAUSE)

    def _take_in(self, trial: Trial, result: Mapping[str, Any]) -> bool | None:
        """Whether a trial goes on after a result; None if its round failed."""
        name, number = self._name_of(trial.config), result["training_iteration"] - 1
        if name in self._rungs.finished(number):
            return self._rungs.goes_on(name)
        found = self._result_of(trial.config, result)
        return None if found is None else self._rungs.finish(name, number, found)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A new trial, else one that waited and now belongs to the better half."""
        live = list(tune_controller.get_live_trials())
        for trial in live:
            if trial.status == Trial.PENDING:
                return trial
        waiting = [trial for trial in live if trial.status == Trial.PAUSED]
        for trial in waiting:
            if self._rungs.goes_on(self._name_of(trial.config)):
                return trial
        if len(waiting) == len(live) and tune_controller.search_alg.is_finished():
            # Nothing runs any more that could bring one of them forward.
            for trial in waiting:
                tune_controller.stop_trial(trial)
        return None

    def debug_string(self) -> str:
        """For Tune's own reports."""
        return "asynchronous halving by the front"

    def save(self, checkpoint_path: str) -> None:
        """Nothing is restored from Tune's files."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
