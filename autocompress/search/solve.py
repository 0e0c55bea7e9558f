"""A plan for a new budget, from what a search has measured: no new trial is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from autocompress.config import Objective
from autocompress.errors import ConfigError, RunFolderError, SearchError
from autocompress.evaluation import Evaluation, drop_unit
from autocompress.measure.measurement import Measurement
from autocompress.plan import Plan, candidate_name, file_of
from autocompress.search.columns import ORIGINAL, STOCK_INT8
from autocompress.search.costs.models import CostModels
from autocompress.search.history import read_history
from autocompress.search.judge import Interval, LossModel
from autocompress.search.kept_models import (
    KeptModels,
    indices_of,
    observations,
    read_models,
)
from autocompress.search.run_folder import RunFolder
from autocompress.search.seeding.milp import ExactSolution, solve_exactly
from autocompress.search.solve_figures import (
    Figures,
    MeasuredCandidate,
    estimated,
    figures_of,
    speedup_at,
    trains,
)
from autocompress.search.solve_limits import TIME_LIMIT_S, Limits, bounds_of, no_fit

_SOLVED = "solved"
_MOST_SHOWN = 5


@final
@dataclass(frozen=True)
class Solved:
    """The plan that loses least within the limits, by the models.

    Attributes:
        candidate: see `plan.candidate_name`.
        runtime: full name.
        predicted: of the plan in that runtime.
        loss: summed sensitivities, in nats.
        gap: how much lower another plan's sum could be at most, in nats; 0 where proven.
        proven: whether no plan of the space has a smaller sum within the limits.
        measured: figures of the same plan in the same runtime, where it was measured.
        within: measured candidates within the limits, the best metric first.
        original_metric: on the search split.
        learnt_from: how many measured candidates the predictions learnt from.
    """

    run: Path
    limits: Limits
    plan: Plan
    candidate: str
    runtime: str
    predicted: Figures
    loss: float
    gap: float
    proven: bool
    measured: Figures | None
    within: tuple[MeasuredCandidate, ...]
    original_metric: float
    learnt_from: int

    @property
    def model(self) -> Path:
        """Where the plan's ONNX file is once it was measured."""
        return self.run / "artifacts" / f"{file_of(self.candidate)}.onnx"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = ("candidate", "runtime", "loss", "gap", "proven", "learnt_from")
        within = [
            {
                "candidate": c.candidate, "runtime": c.runtime, "trained": c.trained,
                "measured": c.figures.to_dict(),
            }
            for c in self.within
        ]  # fmt: skip
        return {
            "run": str(self.run),
            "limits": self.limits.options(),
            **{name: getattr(self, name) for name in plain},
            "plan": self.plan.to_rows(),
            "predicted": self.predicted.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "measured_within_limits": within,
        }


def solve(run: Path, limits: Limits, runtimes: Sequence[str] = ()) -> Solved:
    """Solve for the plan of the least summed loss that keeps all limits, in its best runtime.

    Nothing is built, measured or written.

    Args:
        run: the run folder of a search, finished or not.
        limits: at least one.
        runtimes: full names of those that may be used; by default all.

    Raises:
        ConfigError: no limit, an unknown runtime, or a limit on what the run has no model of.
        RunFolderError: the folder holds no models or no study.
        NoFitError: no plan of the space keeps the limits; names the least that can be reached.
    """
    if not limits.options():
        raise ConfigError(
            "Solving needs a limit to keep.",
            allowed="--max-latency-ms, --min-speedup, --max-bytes or --max-download-bytes",
        )
    kept = read_models(run)
    wanted = _checked(kept, runtimes) or kept.runtimes
    known = _learn(run, kept)
    tasks = {name: bounds_of(known.costs, limits, name) for name in wanted}
    found: list[tuple[float, float, str, ExactSolution]] = []
    for name, bounds in tasks.items():
        budgets = [b.budget for b in bounds]
        try:
            solution = solve_exactly(kept.loss, [b.cost for b in bounds], budgets, TIME_LIMIT_S)
        except SearchError:
            continue
        # Of equal losses the faster runtime's.
        latency = known.costs.predict(solution.indices, name)["latency"].value
        found.append((solution.loss, latency, name, solution))
    if not found:
        raise no_fit(tasks)
    _, _, runtime, solution = min(found, key=lambda each: each[:2])
    plan = kept.space.plan(solution.indices)
    candidate = candidate_name(plan.hash if plan.steps else ORIGINAL, runtime, kept.runtimes[0])
    return Solved(
        run=run,
        limits=limits,
        plan=plan,
        candidate=candidate,
        runtime=runtime,
        predicted=_predicted(kept, known, plan, runtime),
        loss=solution.loss,
        gap=0.0 if solution.proven else solution.gap,
        proven=solution.proven,
        measured=known.figures.get(candidate),
        within=tuple(_within(known, wanted, limits)),
        original_metric=kept.original_metric,
        learnt_from=known.learnt_from,
    )


def solved_path(run: Path, candidate: str) -> Path:
    """Where the figures of a solved plan are that was measured: it is no trial of the study."""
    return run / _SOLVED / f"{candidate}.json"


def _checked(kept: KeptModels, runtimes: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in runtimes if name not in kept.runtimes]
    if unknown:
        raise ConfigError(
            "The run knows no such runtime.",
            given=", ".join(unknown),
            allowed=", ".join(kept.runtimes),
        )
    return tuple(runtimes)


@final
@dataclass(frozen=True)
class _Known:
    """What a run has measured, and the models that have learnt from it."""

    evaluations: Sequence[Evaluation]
    figures: Mapping[str, Figures]
    costs: CostModels
    losses: LossModel
    learnt_from: int


def _learn(run: Path, kept: KeptModels) -> _Known:
    evaluations = _measured(run, kept)
    observed = observations(kept.space, evaluations)
    losses = LossModel()
    for indices, evaluation in observed:
        if not trains(evaluation):
            lost = evaluation.metric.value - kept.original_metric
            losses.observe(max(kept.loss.value(indices), 0.0), lost)
    figures = {e.candidate: figures_of(e, kept.original_metric) for e in evaluations}
    return _Known(evaluations, figures, kept.cost_models(observed), losses, len(observed))


def _measured(run: Path, kept: KeptModels) -> list[Evaluation]:
    """Reference points, the study's candidates and earlier solved plans, each once."""
    folder, first = RunFolder(run), kept.runtimes[0]
    names = [*(candidate_name(ORIGINAL, name, first) for name in kept.runtimes), STOCK_INT8]
    references = [folder.evaluation(name, "search") for name in names]
    searched = [evaluation for _, evaluation in read_history(run)]
    solved = [_read(path) for path in sorted((run / _SOLVED).glob("*.json"))]
    found = [*(e for e in references if e is not None), *searched, *solved]
    return list({e.candidate: e for e in found}.values())


def _read(path: Path) -> Evaluation:
    try:
        return Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise RunFolderError(
            f"The figures of a solved plan cannot be read: {cause}",
            given=path,
            advice="delete the file; --measure takes them anew",
        ) from cause


def _predicted(kept: KeptModels, known: _Known, plan: Plan, runtime: str) -> Figures:
    """What the models say of a plan in a runtime."""
    indices = indices_of(kept.space, plan) or {}
    costs = known.costs.predict(indices, runtime)
    latency = estimated(costs["latency"], kept.original_ms, "ms", kept.device)
    unit, points = drop_unit(kept.metric_unit)
    lost = known.losses.predict(max(kept.loss.value(indices), 0.0))
    drop = None if lost is None else Interval.around(-lost[0], lost[1])

    def size(name: Objective) -> Measurement | None:
        return estimated(costs[name], 1.0, "bytes", kept.device) if name in costs else None

    return Figures(
        latency=latency,
        speedup=speedup_at(latency, kept.original_ms),
        drop=None if drop is None else estimated(drop, points, unit, kept.device),
        file_bytes=size("file_bytes"),
        download_bytes=size("download_bytes"),
    )


def _within(known: _Known, runtimes: Sequence[str], limits: Limits) -> list[MeasuredCandidate]:
    """The best measured candidates: the least drop first, of equal ones the fastest."""
    found = [
        MeasuredCandidate(e.candidate, e.runtime, known.figures[e.candidate], trains(e))
        for e in known.evaluations
        if e.runtime in runtimes and known.figures[e.candidate].keep(limits)
    ]
    metric = {e.candidate: e.metric.value for e in known.evaluations}
    found.sort(key=lambda c: (-metric[c.candidate], c.figures.latency.value))
    return found[:_MOST_SHOWN]
