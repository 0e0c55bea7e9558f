"""Where a search starts: cost models, sensitivities, and the plans that follow from both."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from autocompress.build import Builder
from autocompress.config import Objective
from autocompress.errors import ExportError, MeasurementError
from autocompress.evaluation import Evaluation
from autocompress.export.coding.estimate import estimate_bytes
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
from autocompress.search.judge import rough_tensors
from autocompress.search.kept_models import keep_models
from autocompress.search.prepare import Prepared
from autocompress.search.seeding.lagrangian import Solution, frontier
from autocompress.search.seeds import uniform_seeds
from autocompress.search.sensitivity import SensitivityRun, sensitivity_folder
from autocompress.search.study import RUNTIME, Study
from autocompress.techniques import NETWORK, Stage
from autocompress.workload.output_loss import constant_loss

# Plans of a frontier, from the unchanged network to the cheapest; many change too much to be used.
FRONTIER = 24
_LEAST_LOSS, _MOST_LOSS = 1e-3, 0.7
# Of what a network loses that does not look at its inputs: with two classes that is soon reached.
_MOST_SHARE = 0.5
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
        class_scores=prepared.workload.class_scores,
    )


def frontier_seeds(
    loss: FactoredSum,
    costs: CostModels,
    objectives: Sequence[Objective],
    runtimes: Sequence[str],
    most_loss: float = _MOST_LOSS,
) -> list[Seed]:
    """Plans of the least summed loss for a range of budgets of each cost in each runtime.

    Runtimes and costs in turn; see `_useful` for the order.

    Args:
        most_loss: plans that lose more are of no use.
    """
    lists: list[list[Seed]] = []
    for objective in objectives:
        for number, runtime in enumerate(runtimes):
            cost = None if objective == "metric" else costs.sum_of(objective, runtime)
            # Energy and memory follow the time and the bytes, as far as anything is known.
            if cost is None or (objective != "latency" and number > 0):
                continue
            found = frontier(loss, cost, FRONTIER)
            lists.append([{**s.indices, RUNTIME: number} for s in _useful(found, most_loss)])
    longest = max(map(len, lists), default=0)
    return [each[i] for i in range(longest) for each in lists if i < len(each)]


def _useful(found: Sequence[Solution], most_loss: float = _MOST_LOSS) -> list[Solution]:
    """Of plans that lose next to nothing the cheapest, and those that do not lose too much.

    In such an order that the first few already cover the whole range.
    """
    by_loss = sorted(found, key=lambda s: (s.loss, -s.cost))
    free = [s for s in by_loss if s.loss < _LEAST_LOSS]
    kept = [*free[-1:], *(s for s in by_loss if _LEAST_LOSS <= s.loss <= most_loss)]
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
    """Coded bits of a weight by what it is quantized to, estimated from one file for each.

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
    rest = sum(weights.values())
    for decision, indices in offered.items():
        plan = context.prepared.space.plan(indices)
        try:
            model = context.evaluator.artifact(plan).path
        except ExportError:
            # Then no plan with it can be measured either.
            continue
        own = sum(weights[step.target] for step in plan.steps if step.decision == decision)
        coded = 8 * estimate_bytes(model.read_bytes(), floating) - floating * (rest - own)
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
    most = _most_loss(prepared, context.evaluator.builder)
    seeds = frontier_seeds(loss, costs, context.objectives, context.runtimes, most)
    uniform = uniform_seeds(prepared.space)[:_UNIFORM]
    study.enqueue([*seeds, *({**seed, RUNTIME: 0} for seed in uniform)])
    return Start(loss, costs)


def _most_loss(prepared: Prepared, builder: Builder) -> float:
    outputs = rough_tensors(prepared.workload.network, builder.sample.inputs)
    largest = constant_loss(outputs, class_scores=prepared.workload.class_scores)
    return min(_MOST_LOSS, _MOST_SHARE * largest)


def _originals(references: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """The original's figures by runtime."""
    return {e.runtime: e for e in references if file_of(e.candidate) == ORIGINAL}
