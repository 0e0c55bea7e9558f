"""Where a search starts: cost models, sensitivities, and the plans that follow from both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import final

import torch

from autocompress.bank import Bank
from autocompress.build import Builder, Stopwatch
from autocompress.config import Objective
from autocompress.errors import AutocompressError, MeasurementError
from autocompress.evaluate import Evaluation
from autocompress.measure.client import Worker
from autocompress.plan import Decision
from autocompress.search.costs.bytes import download_costs, file_costs
from autocompress.search.costs.corrected import CorrectedCost, CorrectionSettings
from autocompress.search.costs.factored import FactoredSum
from autocompress.search.costs.latency import latency_costs, macs_costs
from autocompress.search.costs.models import CostModels
from autocompress.search.costs.probes import Probing, quick_profile
from autocompress.search.prepare import Prepared
from autocompress.search.progress import Progress
from autocompress.search.record import JudgedLog
from autocompress.search.seeding.lagrangian import frontier
from autocompress.search.seeding.spdy import PlanKey, RefineSettings, Scorer, plan_key, refine
from autocompress.search.sensitivity import (
    Sensitivities,
    SensitivityRun,
    output_loss,
    sensitivity_folder,
)
from autocompress.search.space import Space
from autocompress.search.study import RUNTIME
from autocompress.workload import network_outputs

# Plans of a frontier, from the unchanged network to the cheapest; many change too much to be of use.
_FRONTIER = 24
_MOST_LOSS = 1.0
# Plans that are refined: those whose summed loss is nearest to these, in nats.
_REFINED_AT = (0.02, 0.06, 0.2)
_TRIES = 48
_SCORED = 256
# Of a model that nothing was fitted to.
_GUESS_DEVIATION = 0.5

Seed = Mapping[str, int]


def find_latency(
    prepared: Prepared, builder: Builder, progress: Progress
) -> dict[str, FactoredSum]:
    """Latency of plans in ms by runtime, from a dozen files that are profiled in each.

    For the thread that measures. A runtime that tells no layer times is left out.
    """
    profile = quick_profile(prepared.profile)
    batch = [x[: profile.batch_size].numpy() for x in prepared.workload.search_split.inputs]
    found = {}
    with Worker(profile, prepared.folder.path / "scratch") as worker:
        for number, name in enumerate(profile.runtime_names):
            folder = prepared.folder.path / "costs" / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            probing = Probing(
                name, batch, profile.channel_multiple, folder,
                seed=prepared.experiment.search.seed,
            )  # fmt: skip
            try:
                found[name] = latency_costs(
                    prepared.graph, prepared.space, builder, worker, probing
                )
            except MeasurementError as reason:
                progress.note(
                    f"no layer times in {name}: {reason.what} Until candidates are measured, "
                    "latency is guessed from multiply-accumulates."
                )
    return found


def cost_models(
    prepared: Prepared,
    latency: Mapping[str, FactoredSum],
    references: Mapping[str, Evaluation],
    bits_per_weight: Mapping[Decision | None, float],
) -> CostModels:
    """Models of what the search goes by.

    Args:
        latency: see `find_latency`; a runtime without gets multiply-accumulates.
        references: figures of the original network by runtime, the first runtime's among them.
        bits_per_weight: see `bytes.download_costs`.
    """
    first = references[prepared.profile.runtime_names[0]]
    graph, space = prepared.graph, prepared.space
    multiple = prepared.profile.channel_multiple
    models: dict[str, CorrectedCost] = {}
    for name, reference in references.items():
        if name in latency:
            models[name] = CorrectedCost(latency[name])
        else:
            guess = macs_costs(graph, space, multiple, reference.latency.value)
            models[name] = CorrectedCost(guess, CorrectionSettings(common_sd=_GUESS_DEVIATION))
    sizes: dict[Objective, CorrectedCost] = {
        "file_bytes": CorrectedCost(file_costs(graph, space, multiple, first.file_bytes))
    }
    if first.download_bytes:
        sizes["download_bytes"] = CorrectedCost(
            download_costs(graph, space, multiple, first.download_bytes, bits_per_weight)
        )
    return CostModels(models, sizes, first.latency.value)


def sensitivity_run(prepared: Prepared, bank: Bank) -> SensitivityRun:
    """The sensitivities of a search's space, to be measured or read."""
    return SensitivityRun(
        bank,
        prepared.space,
        prepared.workload.calibration.inputs,
        sensitivity_folder(),
        class_scores=not callable(prepared.workload.metric),
    )


def frontier_seeds(
    space: Space,
    loss: FactoredSum,
    costs: CostModels,
    objectives: Sequence[Objective],
    runtimes: Sequence[str],
) -> list[Seed]:
    """Plans of the least summed loss for a range of budgets of each cost in each runtime.

    The mildest of each first, runtimes in turn; plans that lose too much to be of use are left out.
    """
    lists: list[list[Seed]] = []
    for objective in objectives:
        for number, runtime in enumerate(runtimes):
            cost = None if objective == "metric" else costs.sum_of(objective, runtime)
            # Energy and memory follow the time and the bytes, as far as anything is known.
            if cost is None or (objective != "latency" and number > 0):
                continue
            found = frontier(loss, cost, _FRONTIER)
            kept = sorted((s for s in found if s.loss <= _MOST_LOSS), key=lambda s: s.loss)
            lists.append([{**s.indices, RUNTIME: number} for s in kept])
    longest = max(map(len, lists), default=0)
    return [each[i] for i in range(longest) for each in lists if i < len(each)]


@final
class Refinement:
    """SPDY's search for better plans, scored by the loss of the stitched network's outputs.

    Args:
        prepared: the search.
        builder: makes the networks.
        keep_busy: called between scores, so that the device is not idle meanwhile.
        stop: whether time is up.
    """

    def __init__(
        self,
        prepared: Prepared,
        builder: Builder,
        keep_busy: Callable[[], None],
        stop: Callable[[], bool],
    ) -> None:
        self._prepared, self._builder = prepared, builder
        self._keep_busy, self._stop = keep_busy, stop
        self._known = _Scores(prepared.folder.path / "refinement.jsonl")
        inputs = tuple(x[:_SCORED] for x in prepared.workload.calibration.inputs)
        self._inputs = inputs
        self._original = [
            torch.from_numpy(o) for o in network_outputs(prepared.workload.network, inputs)
        ]

    def seeds(self, loss: FactoredSum, cost: FactoredSum, runtime: int) -> Iterator[Seed]:
        """Refined plans for a few budgets, each as soon as it is found."""
        found = frontier(loss, cost, _FRONTIER)
        for number, wanted in enumerate(_REFINED_AT):
            start = min(found, key=lambda s: abs(math.log((s.loss + 1e-6) / wanted)))
            scorer = Scorer(self._score, self._known, self._stop)
            seed = 1000 * self._prepared.experiment.search.seed + number
            settings = RefineSettings(tries=_TRIES, seed=seed)
            refined = refine(loss, cost, start.cost, scorer, settings)
            yield {**refined.indices, RUNTIME: runtime}
            if self._stop():
                break

    def _score(self, indices: Mapping[str, int]) -> float:
        self._keep_busy()
        plan = self._prepared.space.plan(indices)
        try:
            network = self._builder.network(plan, Stopwatch())
            outputs = [torch.from_numpy(o) for o in network_outputs(network, self._inputs)]
        except AutocompressError:
            # A plan that cannot be stitched is as bad as can be.
            return math.inf
        scores = not callable(self._prepared.workload.metric)
        return output_loss(self._original, outputs, class_scores=scores)


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


def save_sensitivities(path: Path, found: Sensitivities) -> None:
    """Keep a copy in the run folder, which then holds all that `solve` needs."""
    path.write_text(json.dumps({"samples": found.samples, "losses": dict(found.losses)}, indent=1))
