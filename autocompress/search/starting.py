"""Where a search starts: cost models, sensitivities, and the plans that follow from both."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from autocompress.build import Builder, Stopwatch
from autocompress.config import Objective
from autocompress.errors import AutocompressError, ExportError, MeasurementError
from autocompress.evaluate import Evaluation
from autocompress.files import write_json
from autocompress.measure.arrays import read_arrays
from autocompress.measure.client import Worker
from autocompress.plan import Decision, file_of
from autocompress.search.columns import ORIGINAL
from autocompress.search.context import SearchContext
from autocompress.search.costs.bytes import download_costs, file_costs
from autocompress.search.costs.corrected import CorrectedCost, CorrectionSettings
from autocompress.search.costs.factored import FactoredSum
from autocompress.search.costs.latency import latency_costs, macs_costs
from autocompress.search.costs.models import CostModels
from autocompress.search.costs.probes import Probing, quick_profile
from autocompress.search.judge import rough_outputs
from autocompress.search.kept_models import keep_models
from autocompress.search.prepare import Prepared
from autocompress.search.record import JudgedLog
from autocompress.search.seeding.lagrangian import Solution, frontier
from autocompress.search.seeding.spdy import PlanKey, RefineSettings, Scorer, plan_key, refine
from autocompress.search.seeds import uniform_seeds
from autocompress.search.sensitivity import SensitivityRun, output_loss, sensitivity_folder
from autocompress.search.study import RUNTIME, Study
from autocompress.techniques import NETWORK, Stage

# Plans of a frontier, from the unchanged network to the cheapest; many change too much to be used.
_FRONTIER = 24
_LEAST_LOSS, _MOST_LOSS = 1e-3, 0.7
# Plans that are refined: those whose summed loss is nearest to these, in nats.
_REFINED_AT = (0.02, 0.06, 0.2)
_TRIES = 48
# Of a search with a time limit; the plans of all runtimes and losses have it in equal parts.
_REFINEMENT = 0.3
# Uniform plans beside those that were solved for: they need no model to be right.
_UNIFORM = 6
# Of a model that nothing was fitted to.
_GUESS_DEVIATION = 0.5

Seed = Mapping[str, int]


def find_latency(context: SearchContext) -> dict[str, FactoredSum]:
    """Latency of plans in ms by runtime, from a dozen files that are profiled in each.

    For the thread that measures. A runtime that tells no layer times is left out.
    """
    prepared, builder = context.prepared, context.evaluator.builder
    profile = quick_profile(prepared.profile)
    batch = read_arrays(context.evaluator.example)
    found = {}
    scratch = prepared.folder.path / "scratch"
    with Worker(profile, scratch, prepared.device.host) as worker:
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
                context.progress.note(
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


def sensitivity_run(context: SearchContext) -> SensitivityRun:
    """The sensitivities of a search's space, to be measured or read.

    On samples of the search split: on those that layers were solved with, a layer with few of them
    looks as if it lost nothing.
    """
    prepared = context.prepared
    return SensitivityRun(
        context.bank,
        prepared.space,
        context.evaluator.builder.sample.inputs,
        sensitivity_folder(),
        class_scores=not callable(prepared.workload.metric),
    )


def frontier_seeds(
    loss: FactoredSum,
    costs: CostModels,
    objectives: Sequence[Objective],
    runtimes: Sequence[str],
) -> list[Seed]:
    """Plans of the least summed loss for a range of budgets of each cost in each runtime.

    Runtimes and costs in turn; see `_useful` for the order.
    """
    lists: list[list[Seed]] = []
    for objective in objectives:
        for number, runtime in enumerate(runtimes):
            cost = None if objective == "metric" else costs.sum_of(objective, runtime)
            # Energy and memory follow the time and the bytes, as far as anything is known.
            if cost is None or (objective != "latency" and number > 0):
                continue
            found = frontier(loss, cost, _FRONTIER)
            lists.append([{**s.indices, RUNTIME: number} for s in _useful(found)])
    longest = max(map(len, lists), default=0)
    return [each[i] for i in range(longest) for each in lists if i < len(each)]


def _useful(found: Sequence[Solution]) -> list[Solution]:
    """Of plans that lose next to nothing the cheapest, and those that do not lose too much.

    In such an order that the first few already cover the whole range.
    """
    by_loss = sorted(found, key=lambda s: (s.loss, -s.cost))
    free = [s for s in by_loss if s.loss < _LEAST_LOSS]
    kept = [*free[-1:], *(s for s in by_loss if _LEAST_LOSS <= s.loss <= _MOST_LOSS)]
    return [kept[i] for i in coarse_to_fine(len(kept))]


def coarse_to_fine(count: int) -> list[int]:
    """The middle of a range, then the middles of its halves, and so on."""
    spans, order = deque([(0, count)]), []
    while spans:
        low, high = spans.popleft()
        if low < high:
            middle = (low + high) // 2
            order.append(middle)
            spans += [(low, middle), (middle + 1, high)]
    return order


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
        self._original = [
            torch.from_numpy(o) for o in rough_outputs(prepared.workload.network, self._inputs)
        ]

    def seeds(self, loss: FactoredSum, cost: FactoredSum, runtime: int) -> Iterator[Seed]:
        """Refined plans for a few budgets, each as soon as it is found."""
        found = frontier(loss, cost, _FRONTIER)
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
                outputs = [torch.from_numpy(o) for o in rough_outputs(tried.network, self._inputs)]
            else:
                # Calibration inputs come first.
                outputs = [o[-len(self._inputs[0]) :] for o in tried.outputs]
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


@final
@dataclass(frozen=True)
class Start:
    """What a search knows before its first candidate.

    Attributes:
        loss: the summed sensitivity of a plan; None if it was not measured.
        costs: predicted costs.
    """

    loss: FactoredSum | None
    costs: CostModels


def find_bits(context: SearchContext, original: Evaluation) -> dict[Decision | None, float]:
    """Coded bits of a weight by what it is quantized to, from one coded file for each.

    Empty if nobody asks for coded bytes. The key None is for float weights.

    Args:
        original: the original network's figures, its coded bytes among them.
    """
    if original.download_bytes is None:
        return {}
    weights = {x.name: x.weights for x in context.prepared.graph.layers}
    floating = 8 * original.download_bytes / sum(weights.values())
    found: dict[Decision | None, float] = {None: floating}
    offered: dict[Decision, dict[str, int]] = {}
    for parameter in context.prepared.space.parameters:
        if parameter.stage is Stage.QUANTIZE and parameter.target != NETWORK:
            for index, decision in enumerate(parameter.decisions, 1):
                offered.setdefault(decision, {})[parameter.name] = index
    jobs = []
    cores = os.sched_getaffinity(0)
    for decision, indices in offered.items():
        plan = context.prepared.space.plan(indices)
        try:
            model = context.evaluator.artifact(plan).path
        except ExportError:
            # Then no plan with it can be measured either.
            continue
        own = sum(weights[step.target] for step in plan.steps if step.decision == decision)
        coding = context.evaluator.builder.start_coding(model, cores, checked=False)
        jobs.append((decision, own, coding))
    rest = sum(weights.values())
    for decision, own, coding in jobs:
        coded = 8 * coding.wait() - floating * (rest - own)
        found[decision] = max(coded / max(own, 1), 0.0)
    return found


def guessed_start(context: SearchContext, references: Sequence[Evaluation]) -> Start:
    """Nothing but guesses from multiply-accumulates."""
    return Start(None, cost_models(context.prepared, {}, _originals(references), {}))


def find_start(context: SearchContext, study: Study, references: Sequence[Evaluation]) -> Start:
    """Profile layers on the device and meanwhile measure sensitivities; enqueue the solved plans.

    Args:
        study: gets the plans.
        references: figures of the reference points on the search split.
    """
    prepared, progress = context.prepared, context.progress
    run = sensitivity_run(context)
    progress.stage("seeds", run.passes)
    job = context.device.submit(find_latency, context)
    for _ in run.steps():
        progress.advance()
    sensitivities = run.result()
    write_json(
        context.folder.path / "sensitivity.json",
        {"samples": sensitivities.samples, "losses": dict(sensitivities.losses)},
    )
    loss = sensitivities.of(prepared.space)
    bits = find_bits(context, references[0])
    costs = cost_models(prepared, job.result(), _originals(references), bits)
    keep_models(context.folder.path, prepared.space, loss, costs, references[0])
    seeds = frontier_seeds(loss, costs, context.objectives, context.runtimes)
    uniform = uniform_seeds(prepared.space)[:_UNIFORM]
    study.enqueue([*seeds, *({**seed, RUNTIME: 0} for seed in uniform)])
    return Start(loss, costs)


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


def _originals(references: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """The original's figures by runtime."""
    return {e.runtime: e for e in references if file_of(e.candidate) == ORIGINAL}
