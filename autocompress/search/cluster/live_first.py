"""Tune's first come, first served, at a constant cost per trial and with workers that are kept.

The only place that reaches into Tune's controller: it has no public way for either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from autocompress.search.cluster.unkept import Unkept


@final
class LiveFirst(Unkept, FIFOScheduler):  # type: ignore[misc]  # Ray has no types
    """First come, first served; Tune's own looks through all trials that ever were, each time.

    Args:
        workers: how many processes are kept for trials that are still to come. Tune keeps one that
            has none waiting for it, and starting another takes seconds.
    """

    def __init__(self, workers: Callable[[], int]) -> None:
        super().__init__()
        self._workers, self._kept = workers, 0

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A trial that waits."""
        self._keep_workers(tune_controller)
        for trial in tune_controller.get_live_trials():
            if trial.status == Trial.PENDING:
                return trial
        return None

    def _keep_workers(self, tune_controller: Any) -> None:
        live = list(tune_controller.get_live_trials())
        wanted = self._workers()
        if not live or wanted == self._kept:
            return
        # There is no public way; every trial here asks for the same resources.
        controller = tune_controller._tune_controller
        if "_maybe_reuse_cached_actor" not in vars(controller):
            self._let_workers_start(controller)
        controller._actor_cache.increase_max(
            live[0].placement_group_factory, by=wanted - self._kept
        )
        self._kept = wanted

    def _let_workers_start(self, controller: Any) -> None:
        """Keep Tune from giving a free worker to a trial whose own is being started.

        It would end the other one: as many workers as there are trials at a time never came up
        where trials are shorter than a start.
        """
        reuse = controller._maybe_reuse_cached_actor

        def reuse_unless_starting(trial: Trial) -> bool:
            starting = (
                trial in controller._trial_to_actor and trial not in controller._resetting_trials
            )
            return False if starting and self._kept else bool(reuse(trial))

        controller._maybe_reuse_cached_actor = reuse_unless_starting
