"""Solved plans made better by scoring their networks: SPDY in a share of the search's time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import final

from autocompress.build import Builder, Stopwatch
from autocompress.errors import AutocompressError
from autocompress.search.context import SearchContext
from autocompress.search.costs.factored import FactoredSum
from autocompress.search.judge import rough_tensors
from autocompress.search.prepare import Prepared
from autocompress.search.record import JudgedLog
from autocompress.search.seeding.lagrangian import frontier
from autocompress.search.seeding.spdy import PlanKey, RefineSettings, Scorer, plan_key, refine
from autocompress.search.starting import FRONTIER, Seed, Start
from autocompress.search.study import RUNTIME, Study
from autocompress.workload.output_loss import output_loss

# Plans that are refined: those whose summed loss is nearest to these, in nats.
_REFINED_AT = (0.02, 0.06, 0.2)
_TRIES = 48
# Of a search with a time limit; the plans of all runtimes and losses have it in equal parts.
_REFINEMENT = 0.3


def refine_seeds(
    context: SearchContext,
    study: Study,
    start: Start,
    keep_busy: Callable[[], None],
    left: Callable[[], float],
) -> None:
    """Enqueue refined plans for a few budgets of latency in every runtime.

    Args:
        study: gets the plans.
        keep_busy: called between dear steps, so that the device is not idle meanwhile.
        left: seconds until the search is to end; infinite without a time limit.
    """
    if start.loss is None or "latency" not in context.objectives or left() <= 0:
        return

    def over() -> bool:
        return left() <= 0

    each_s = _REFINEMENT * left() / (len(context.runtimes) * len(_REFINED_AT))
    refinement = Refinement(context.prepared, context.evaluator.builder, keep_busy, over, each_s)
    for number, runtime in enumerate(context.runtimes):
        cost = start.costs.sum_of("latency", runtime)
        if cost is not None and not over():
            for seed in refinement.seeds(start.loss, cost, number):
                study.enqueue([seed])


@final
class Refinement:
    """SPDY's search for better plans, scored by the loss of the stitched network's outputs.

    Args:
        prepared: the search.
        builder: makes the networks.
        keep_busy: called between scores, so that the device is not idle meanwhile.
        stop: whether time is up.
        each_s: seconds for each plan.
    """

    def __init__(
        self,
        prepared: Prepared,
        builder: Builder,
        keep_busy: Callable[[], None],
        stop: Callable[[], bool],
        each_s: float,
    ) -> None:
        self._prepared, self._builder = prepared, builder
        self._keep_busy, self._stop, self._each_s = keep_busy, stop, each_s
        self._known = _Scores(prepared.folder.path / "refinement.jsonl")
        # Not the calibration samples, which layers were solved with.
        self._inputs = builder.sample.inputs
        self._original = rough_tensors(prepared.workload.network, self._inputs)

    def seeds(self, loss: FactoredSum, cost: FactoredSum, runtime: int) -> Iterator[Seed]:
        """Refined plans for a few budgets, each as soon as it is found."""
        found = frontier(loss, cost, FRONTIER)
        for number, wanted in enumerate(_REFINED_AT):
            start = min(found, key=lambda s: abs(math.log((s.loss + 1e-6) / wanted)))
            scorer = Scorer(self._score, self._known, self._over_after(self._each_s))
            seed = 1000 * self._prepared.experiment.search.seed + number
            settings = RefineSettings(tries=_TRIES, seed=seed)
            refined = refine(loss, cost, start.cost, scorer, settings)
            yield {**refined.indices, RUNTIME: runtime}
            if self._stop():
                break

    def _over_after(self, seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: self._stop() or time.monotonic() > end

    def _score(self, indices: Mapping[str, int]) -> float:
        self._keep_busy()
        plan = self._prepared.space.plan(indices)
        try:
            tried = self._builder.network(plan, Stopwatch())
            if tried.outputs is None:
                outputs = rough_tensors(tried.network, self._inputs)
            else:
                # Calibration inputs come first.
                outputs = [o[-len(self._inputs[0]) :] for o in tried.outputs]
        except AutocompressError:
            # A plan that cannot be stitched is as bad as can be.
            return math.inf
        class_scores = self._prepared.workload.class_scores
        return output_loss(self._original, outputs, class_scores=class_scores)


@final
class _Scores(MutableMapping[PlanKey, float]):
    """Scores of plans, kept in a file line by line."""

    def __init__(self, path: Path) -> None:
        self._log = JudgedLog(path)
        self._known = {
            plan_key(line["indices"]): float(line["score"]) for line in self._log.lines()
        }

    def __getitem__(self, key: PlanKey) -> float:
        return self._known[key]

    def __setitem__(self, key: PlanKey, value: float) -> None:
        self._known[key] = value
        self._log.append({"indices": dict(key), "score": value})

    def __delitem__(self, key: PlanKey) -> None:
        raise TypeError("scores are not forgotten")

    def __iter__(self) -> Iterator[PlanKey]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
