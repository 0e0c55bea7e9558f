"""Who works a search's stages off: this machine, or a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

from autocompress.evaluation import Evaluation
from autocompress.search.agenda import Agenda
from autocompress.search.context import SearchContext
from autocompress.search.explore import Explorer, beside_the_device
from autocompress.search.judge import Sample
from autocompress.search.study import Study
from autocompress.search.training import SurvivorTraining

# Enqueues refined seeds; calls its argument between steps.
Refine = Callable[[Callable[[], None]], None]


class Engine(ABC):
    """Works the stages off that take the time."""

    @abstractmethod
    def explore(self, context: SearchContext, agenda: Agenda, refine: Refine) -> None:
        """Judge, build and measure candidates until the search is over.

        Raises:
            SearchError: too many candidates failed in a row.
            DeviceError: the device is not there any more; what was under way is tried again later.
        """

    @abstractmethod
    def train(
        self,
        context: SearchContext,
        study: Study,
        original: Evaluation,
        show: Callable[[], object],
        seconds: float,
    ) -> None:
        """Train survivors for at most so long; see `training.SurvivorTraining`."""


@final
class LocalEngine(Engine):
    """This process, and one thread for the device."""

    def explore(self, context: SearchContext, agenda: Agenda, refine: Refine) -> None:
        """See `Explorer`."""
        builder, seed = context.evaluator.builder, context.settings.seed
        explorer = Explorer(context, agenda, Sample(context.prepared.workload, builder, seed))
        with beside_the_device(context.prepared.device, context.evaluator.worker.cores):
            refine(explorer.keep_busy)
            explorer.run()

    def train(
        self,
        context: SearchContext,
        study: Study,
        original: Evaluation,
        show: Callable[[], object],
        seconds: float,
    ) -> None:
        """See `SurvivorTraining`."""
        SurvivorTraining(context, study, original, show).run(seconds)
