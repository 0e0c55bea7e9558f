"""One search from an experiment file to a judged front, on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import final

from autocompress.bank import Bank
from autocompress.build import Artifact, Builder
from autocompress.errors import ExportError, MeasurementError, SearchError
from autocompress.evaluate import Evaluation, Evaluator, Extras
from autocompress.files import write_json
from autocompress.plan import Plan, candidate_name
from autocompress.recover import Watch
from autocompress.search.budget import Budget
from autocompress.search.columns import ORIGINAL, STOCK_INT8
from autocompress.search.costs.factored import FactoredSum
from autocompress.search.costs.models import CostModels
from autocompress.search.explore import Explorer, Outcome, beside_the_device
from autocompress.search.finals import choose_finalists
from autocompress.search.front import Front, build_front
from autocompress.search.judge import Judge, Sample
from autocompress.search.judging import Judging
from autocompress.search.limits import parse_limits, violations
from autocompress.search.paying_levels import keep_paying_levels
from autocompress.search.prepare import Options, Prepared, fill_bank, prepare
from autocompress.search.progress import Progress, Silent
from autocompress.search.samplers import SamplerContext
from autocompress.search.seeds import uniform_seeds
from autocompress.search.starting import (
    Refinement,
    cost_models,
    find_latency,
    frontier_seeds,
    save_sensitivities,
    sensitivity_run,
)
from autocompress.search.study import RUNTIME, VIOLATIONS, Sampling, Study
from autocompress.search.survivors import (
    EPOCHS,
    ROUNDS,
    RoundReport,
    Trained,
    choose_shapes,
    halve,
    report_round,
    run_round,
    shapes_for,
)
from autocompress.search.time_plan import Demand, Phase, TimePlan

# Uniform plans beside those that were solved for: they need no model to be right.
_UNIFORM = 6
# The front's file is written anew at least so often while points come in that are not on it.
_WRITE_EVERY_S = 10.0


def run_search(path: Path, options: Options, progress: Progress | None = None) -> Front:
    """Search, judge the finalists, and return the front; the run folder holds everything.

    Calling it again with the same arguments goes on where the last call ended or was killed.

    Raises:
        AutocompressError: a bad experiment, device, workload, network or run folder.
    """
    progress = progress or Silent()
    begin = time.monotonic()
    prepared = prepare(path, options, progress)
    set_up_s = time.monotonic() - begin - prepared.workload_s
    settings = prepared.experiment.search
    budget = Budget(settings.trials, settings.time_s, prepared.folder.seconds_spent() + set_up_s)
    with prepared.folder.claim(prepared.identity):
        prepared = keep_paying_levels(prepared, progress)
        bank = fill_bank(prepared, progress)
        builder = Builder(
            prepared.workload,
            prepared.exporter,
            bank,
            prepared.profile,
            prepared.experiment.calibration,
            prepared.folder.path,
        )
        objectives = prepared.experiment.objectives
        memory = bool({"peak_memory", "gpu_memory"} & set(objectives))
        extras = Extras("download_bytes" in objectives, "energy" in objectives, memory)
        with (
            Evaluator(
                prepared.workload, builder, prepared.profile, prepared.folder.path, extras
            ) as evaluator,
            ThreadPoolExecutor(1, "device") as device,
        ):
            return _Search(prepared, bank, evaluator, device, budget, progress).run()


@final
class _Search:
    """The stages after preparation: reference points, seeds, search, survivors, judging."""

    def __init__(
        self,
        prepared: Prepared,
        bank: Bank,
        evaluator: Evaluator,
        device: ThreadPoolExecutor,
        budget: Budget,
        progress: Progress,
    ) -> None:
        self._prepared, self._bank, self._evaluator = prepared, bank, evaluator
        self._device, self._budget, self._progress = device, budget, progress
        self._settings = prepared.experiment.search
        self._objectives = prepared.experiment.objectives
        self._limits = parse_limits(self._settings.limits)
        self._folder = prepared.folder
        self._costs = CostModels()
        self._study = Study(
            prepared.folder.path,
            prepared.space,
            prepared.profile,
            self._objectives,
            Sampling(self._settings.sampler, self._settings.seed, self._context()),
        )
        self._references: list[Evaluation] = []
        self._judged: list[Evaluation] = []
        self._judging = Judging(
            prepared, evaluator, device, self._judged, lambda: budget.remaining_s, progress
        )
        self._plan = TimePlan(budget.time_s, budget.spent_s, self._demand(budget.time_s))
        self._written = -math.inf

    def run(self) -> Front:
        self._measure_references()
        self._read_judged()
        self._plan = replace(self._plan, demand=self._demand(self._budget.time_s))
        if self._budget.time_s is not None:
            self._progress.note(self._plan.text())
        self._explore()
        if not self._study.evaluations:
            raise self._nothing_found()
        self._train_survivors()
        return self._judge()

    def _context(self) -> SamplerContext:
        count = len(self._limits)
        constraints = None
        if count:
            # Plans that were only judged are not known to keep any limit.
            constraints = lambda trial: trial.user_attrs.get(VIOLATIONS) or [1.0] * count  # noqa: E731
        return SamplerContext(constraints, None, frozenset({RUNTIME}))

    def _demand(self, time_s: float | None) -> Demand:
        trains = self._settings.survivors and self._prepared.workload.train is not None
        final_s = self._judging.one_final_s(self._references) if self._references else 10.0
        finalists = self._settings.finalists + len(self._references)
        return Demand(final_s=final_s, finalists=finalists, trains=trains)

    def _measure_references(self) -> None:
        """The original network in every runtime, and the stock tool's int8 in the first."""
        runtimes = self._prepared.profile.runtime_names
        wanted = [(ORIGINAL, runtimes[0]), (STOCK_INT8, runtimes[0])]
        wanted += [(ORIGINAL, runtime) for runtime in runtimes[1:]]
        self._progress.stage("reference points", len(wanted))
        built: dict[str, Artifact] = {}
        for file, runtime in wanted:
            name = candidate_name(file, runtime, runtimes[0])
            found = self._folder.evaluation(name, "search")
            if found is None:
                try:
                    if file not in built:
                        built[file] = self._build_reference(file)
                    found = self._device.submit(
                        self._evaluator.measure, built[file], Plan(), runtime, "search",
                        final=False,
                    ).result()  # fmt: skip
                except (ExportError, MeasurementError) as reason:
                    if name == ORIGINAL:
                        raise
                    # What another tool or runtime fails at must not end the search.
                    self._progress.note(f"no reference point {name}: {reason}")
                    continue
                self._folder.save_evaluation(found)
            self._references.append(found)
            self._progress.advance()

    def _build_reference(self, file: str) -> Artifact:
        if file == ORIGINAL:
            return self._evaluator.build_original()
        return self._evaluator.build_stock(file)

    def _read_judged(self) -> None:
        known = [*self._references, *self._study.evaluations]
        for evaluation in known:
            found = self._folder.evaluation(evaluation.candidate, "test")
            if found is not None:
                self._judged.append(found)

    def _explore(self) -> None:
        self._progress.stage("search", self._budget.trials, limit_s=self._seconds_until("search"))
        self._progress.advance(self._study.finished)
        profile = self._prepared.profile
        loss = None
        if self._settings.seeds and self._allowed(self._study.finished):
            self._progress.stage("seeds")
            loss = self._find_seeds()
            self._progress.stage(
                "search", self._budget.trials, limit_s=self._seconds_until("search")
            )
            self._progress.advance(self._study.finished)
        else:
            self._costs = self._models({})
        sample = Sample(self._prepared.workload, self._settings.seed)
        judge = Judge(sample, self._objectives, self._references[0])
        explorer = Explorer(
            self._study,
            self._evaluator,
            self._device,
            judge,
            self._costs,
            self._references[0],
            self._objectives,
            Outcome(
                self._allowed,
                self._finished_one,
                lambda e: violations(self._limits, e, self._references[0]),
                lambda: self._budget.spent_s,
            ),
        )
        for evaluation in self._study.evaluations:
            self._costs.observe(self._study.indices_of(evaluation.candidate), evaluation)
        with beside_the_device(profile, self._evaluator.worker.cores):
            if loss is not None and self._refines():
                self._refine(loss, explorer)
            explorer.run()
        self._plan = self._plan.after("search", self._budget.spent_s)
        self._show(write=True)

    def _find_seeds(self) -> FactoredSum:
        """Cost models beside sensitivities, and the plans that follow from them."""
        run = sensitivity_run(self._prepared, self._bank)
        job = self._device.submit(
            find_latency, self._prepared, self._evaluator.builder, self._progress
        )
        for _ in run.steps():
            self._progress.advance()
        found = run.result()
        save_sensitivities(self._folder.path / "sensitivity.json", found)
        self._costs = self._models(job.result())
        loss = found.of(self._prepared.space)
        runtimes = self._prepared.profile.runtime_names
        seeds = frontier_seeds(self._prepared.space, loss, self._costs, self._objectives, runtimes)
        uniform = uniform_seeds(self._prepared.space)[:_UNIFORM]
        self._study.enqueue([*seeds, *({**seed, RUNTIME: 0} for seed in uniform)])
        return loss

    def _models(self, latency: Mapping[str, FactoredSum]) -> CostModels:
        first = self._prepared.profile.runtime_names[0]
        references = {
            e.runtime: e for e in self._references if not e.candidate.startswith(STOCK_INT8)
        }
        assert first in references
        return cost_models(self._prepared, latency, references, {})

    def _refines(self) -> bool:
        return "latency" in self._objectives

    def _refine(self, loss: FactoredSum, explorer: Explorer) -> None:
        def allowed() -> bool:
            # Two are under way.
            return self._allowed(self._study.finished + 2)

        refinement = Refinement(
            self._prepared,
            self._evaluator.builder,
            explorer.keep_busy,
            lambda: not allowed(),
        )
        runtimes = self._prepared.profile.runtime_names
        for number, runtime in enumerate(runtimes):
            cost = self._costs.sum_of("latency", runtime)
            if cost is None:
                continue
            for seed in refinement.seeds(loss, cost, number):
                self._study.enqueue([seed])
                if not allowed():
                    return

    def _allowed(self, finished: int) -> bool:
        if self._budget.trials is not None and finished >= self._budget.trials:
            return False
        deadline = self._plan.deadline("search")
        # However short the time: without one candidate there would be nothing to show.
        return deadline is None or self._budget.spent_s < deadline or finished == 0

    def _seconds_until(self, phase: Phase) -> float | None:
        deadline = self._plan.deadline(phase)
        return None if deadline is None else max(0.0, deadline - self._budget.spent_s)

    def _finished_one(self, evaluation: Evaluation | None) -> None:
        self._folder.save_seconds_spent(self._budget.spent_s)
        self._progress.advance()
        on_front = evaluation is not None and evaluation in self._study.evaluations_on_front
        self._show(write=on_front or time.monotonic() - self._written > _WRITE_EVERY_S)

    def _train_survivors(self) -> None:
        """Distil members of the front in rounds, within the time that is planned for it."""
        if not self._demand(self._budget.time_s).trains:
            if self._settings.survivors:
                self._progress.note(
                    "the front's members are not trained: the workload has no train split"
                )
            return
        seconds = self._plan.seconds("survivors")
        if not seconds:
            # Without a time limit training has no natural end, and short ones are too short.
            return
        deadline = self._budget.spent_s + seconds
        watch = Watch(stop=lambda: self._budget.spent_s > deadline)
        untrained = [e for e in self._study.evaluations if e.candidate not in self._study.trained]
        shapes = choose_shapes(
            untrained, self._references[0], self._objectives, shapes_for(seconds, None)
        )
        reports: list[RoundReport] = []
        before = {shape.steps.hash: shape.metric for shape in shapes}
        for number in range(ROUNDS):
            epochs = EPOCHS * 2**number
            self._progress.stage(f"train for {epochs:g} epochs more", len(shapes), limit_s=seconds)

            def measure(plan: Plan, runtime: str) -> Evaluation:
                return self._measure_trained(plan, runtime, watch)

            def done(trained: Trained) -> None:
                self._progress.advance()
                self._show(write=True)

            trained, whole = run_round(shapes, number, measure, done)
            old = [before[t.shape.steps.hash] for t in trained]
            reports.append(report_round(trained, old, number))
            before |= {t.shape.steps.hash: t.metric for t in trained}
            if not whole or not trained:
                break
            shapes = halve(trained, self._objectives)
        write_json(self._folder.path / "survivors.json", [asdict(r) for r in reports])
        self._note_rounds(reports)
        self._plan = self._plan.after("survivors", self._budget.spent_s)

    def _note_rounds(self, reports: Sequence[RoundReport]) -> None:
        for report in reports:
            if report.trained:
                self._progress.note(
                    f"trained {report.trained} networks for {report.epochs:g} epochs: the metric "
                    f"rose by {report.gained:.4f} on average, rank correlation before and after "
                    f"{report.rank_correlation:.2f}"
                )

    def _measure_trained(self, plan: Plan, runtime: str, watch: Watch) -> Evaluation:
        name = candidate_name(plan.hash, runtime, self._prepared.profile.runtime_names[0])
        known = self._study.trained.get(name)
        if known is not None:
            return known
        artifact = self._evaluator.artifact(plan, None, watch)
        evaluation = self._device.submit(
            self._evaluator.measure, artifact, plan, runtime, "search", final=False
        ).result()
        self._folder.save_plan(plan)
        self._study.keep_trained(evaluation, self._budget.spent_s)
        return evaluation

    def _nothing_found(self) -> SearchError:
        self._show(write=True)
        reasons = list(self._study.failures.values())
        return SearchError(
            f"None of {len(reasons)} candidates could be finished.",
            given=reasons[0] if reasons else "no candidate was tried",
            advice="see failures.json in the run folder",
        )

    def _judge(self) -> Front:
        finalists = choose_finalists(
            self._study.evaluations,
            self._references[0],
            self._objectives,
            self._settings.finalists,
            next((e for e in self._references if e.candidate == STOCK_INT8), None),
        )
        original, *others = self._references
        self._judging.judge([original, *finalists[:1], *others, *finalists[1:]], self._show)
        self._folder.save_seconds_spent(self._budget.spent_s)
        return self._show(complete=True, write=True)

    def _show(self, *, complete: bool = False, write: bool = True) -> Front:
        searched = [*self._references, *self._study.evaluations]
        front = build_front(
            self._folder.path, self._objectives, searched, self._judged, complete=complete
        )
        if self._study.failures:
            write_json(self._folder.path / "failures.json", dict(self._study.failures))
        if self._study.evaluations and write:
            front.save()
            self._progress.show_front(front.table())
            self._written = time.monotonic()
        return front
