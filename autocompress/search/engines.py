"""Who works a search's stages off: this machine, or a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from autocompress.evaluate import Evaluation
from autocompress.search.agenda import Outcome
from autocompress.search.context import SearchContext
from autocompress.search.costs.models import CostModels
from autocompress.search.explore import Explorer, beside_the_device
from autocompress.search.judge import Sample
from autocompress.search.study import Study
from autocompress.search.training import SurvivorTraining


@final
@dataclass(frozen=True)
class Exploring:
    """What an engine is given to search with.

    Attributes:
        study: proposes plans and keeps what came of them.
        costs: predicted costs; learns from what is measured.
        original: figures of the original network on the search split.
        outcome: limits, and whom to tell.
        refine: enqueues refined seeds; calls its argument between steps.
    """

    study: Study
    costs: CostModels
    original: Evaluation
    outcome: Outcome
    refine: Callable[[Callable[[], None]], None]


class Engine(ABC):
    """Works the stages off that take the time."""

    @abstractmethod
    def explore(self, context: SearchContext, exploring: Exploring) -> int:
        """Judge, build and measure candidates until the search is over; how many were judged.

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

    def explore(self, context: SearchContext, exploring: Exploring) -> int:
        """See `Explorer`."""
        seed = context.settings.seed
        explorer = Explorer(
            context,
            exploring.study,
            Sample(context.prepared.workload, context.evaluator.builder, seed),
            exploring.costs,
            exploring.original,
            exploring.outcome,
        )
        with beside_the_device(context.prepared.device, context.evaluator.worker.cores):
            exploring.refine(explorer.keep_busy)
            explorer.run()
        return explorer.judged

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
