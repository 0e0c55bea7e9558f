"""What all stages of one search share."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

from autocompress.bank import Bank
from autocompress.build import Artifact
from autocompress.config import Objective, SearchSettings
from autocompress.evaluate import Evaluator, Measured
from autocompress.evaluation import Evaluation
from autocompress.plan import Plan
from autocompress.recover.recovery import step_count_of
from autocompress.search.budget import Budget
from autocompress.search.prepare import Prepared
from autocompress.search.progress import Progress
from autocompress.search.run_folder import RunFolder
from autocompress.workload import chance_level


@final
@dataclass(frozen=True)
class SearchContext:
    """A prepared search, what builds and measures for it, and what it may spend.

    Attributes:
        device: the one thread that measures.
    """

    prepared: Prepared
    bank: Bank
    evaluator: Evaluator
    device: ThreadPoolExecutor
    budget: Budget
    progress: Progress

    @property
    def settings(self) -> SearchSettings:
        """How long to search and how."""
        return self.prepared.experiment.search

    @property
    def chance(self) -> float:
        """What a network that does not look at its inputs scores on the search split."""
        workload = self.prepared.workload
        return chance_level(workload.metric, workload.search_split.targets)

    @property
    def epoch_steps(self) -> int:
        """Steps of a training of one epoch on the train split, which must be there."""
        train = self.prepared.workload.train
        assert train is not None
        return step_count_of(self.prepared.workload.network, len(train), 1.0)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is optimised."""
        return self.prepared.experiment.objectives

    @property
    def folder(self) -> RunFolder:
        """Where everything is kept."""
        return self.prepared.folder

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Full names of the device's runtimes; the first one's original is the baseline."""
        return self.prepared.profile.runtime_names

    def measure(self, artifact: Artifact, plan: Plan, runtime: str) -> Future[Evaluation]:
        """Hand a file to the device, on the search split; see `Evaluator.measure`."""
        return self.device.submit(
            self.evaluator.measure, artifact, plan, runtime, "search", final=False
        )

    def measure_uncoded(self, artifact: Artifact, plan: Plan, runtime: str) -> Future[Measured]:
        """As `measure`, but see `Evaluator.measure_uncoded`."""
        return self.device.submit(
            self.evaluator.measure_uncoded, artifact, plan, runtime, "search", final=False
        )
