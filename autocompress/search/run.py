"""One search from an experiment file to a judged front, on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import final

from optuna.trial import FrozenTrial

from autocompress.device import DeviceProfile
from autocompress.errors import SearchError
from autocompress.evaluate import Evaluator, Extras
from autocompress.evaluation import Evaluation
from autocompress.files import write_json
from autocompress.measure.host import host_of
from autocompress.measure.host_interface import Host
from autocompress.search.agenda import Agenda, Outcome
from autocompress.search.budget import Budget
from autocompress.search.columns import STOCK_INT8
from autocompress.search.context import SearchContext
from autocompress.search.engines import Engine, LocalEngine
from autocompress.search.finals import choose_finalists
from autocompress.search.front import Front, build_front
from autocompress.search.judge import Judge, expected_excess
from autocompress.search.judging import Judging
from autocompress.search.kept_models import keep_source
from autocompress.search.limits import parse_limits, satisfied, violations
from autocompress.search.paying_levels import keep_paying_levels
from autocompress.search.prepare import (
    Options,
    Prepared,
    builder_of,
    fill_bank,
    prepare,
    wanted_figures,
)
from autocompress.search.progress import Progress, Silent
from autocompress.search.record import VIOLATIONS
from autocompress.search.references import measure_references
from autocompress.search.refinement import refine_seeds
from autocompress.search.samplers import SamplerContext
from autocompress.search.starting import Start, find_start, guessed_start
from autocompress.search.storage import Storage, patience_with_storage, settle
from autocompress.search.study import RUNTIME, Sampling, Study
from autocompress.search.time_plan import Demand, Phase, TimePlan

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
    with ExitStack() as stack:
        engine, find_host = _engine(options, progress, stack)
        prepared = prepare(path, options, progress, find_host)
        set_up_s = time.monotonic() - begin - prepared.workload_s
        settings, run = prepared.experiment.search, prepared.folder
        budget = Budget(settings.trials, settings.time_s, run.seconds_spent() + set_up_s)
        stack.enter_context(run.claim(prepared.identity))
        keep_source(run.path, path)
        storage = Storage(
            settle(run.path, options.storage, progress.note), patience_with_storage(progress.note)
        )
        prepared = keep_paying_levels(prepared, progress)
        bank = fill_bank(prepared, progress)
        evaluator = stack.enter_context(
            Evaluator(
                prepared.workload,
                builder_of(prepared, bank),
                prepared.device,
                run.path,
                _extras(prepared),
            )
        )
        device = stack.enter_context(ThreadPoolExecutor(1, "device"))
        context = SearchContext(prepared, bank, evaluator, device, budget, progress)
        return _Search(context, engine(), storage).run()


def _engine(
    options: Options, progress: Progress, stack: ExitStack
) -> tuple[Callable[[], Engine], Callable[[DeviceProfile], Host]]:
    """What works the search off, once the device is known, and where the device is.

    Args:
        stack: leaves a cluster when the search ends.
    """
    if options.engine == "local":
        return LocalEngine, host_of
    # Imported here: Ray takes seconds to import.
    from autocompress.search.cluster.connect import Cluster, joined
    from autocompress.search.cluster.engine import ClusterEngine

    clusters: list[Cluster] = []

    def find_host(profile: DeviceProfile) -> Host:
        progress.stage("join cluster")
        clusters.append(stack.enter_context(joined(options.address, profile, progress.note)))
        return clusters[0].nodes[0].host

    return (lambda: ClusterEngine(clusters[0], options.artifacts)), find_host


def _extras(prepared: Prepared) -> Extras:
    """The figures that the search goes by, or that a hard limit is put on."""
    wanted = wanted_figures(prepared.experiment)
    return Extras(
        coded="download_bytes" in wanted,
        energy=bool({"energy", "energy_mj"} & wanted),
        memory=any("memory" in name for name in wanted),
    )


@final
class _Search:
    """The stages after preparation: reference points, seeds, search, survivors, judging."""

    def __init__(self, context: SearchContext, engine: Engine, storage: Storage) -> None:
        self._context, self._budget, self._engine = context, context.budget, engine
        self._limits = parse_limits(context.settings.limits)
        sampling = Sampling(
            context.settings.sampler, context.settings.seed, _sampler_context(len(self._limits))
        )
        self._study = Study(
            context.folder.path,
            context.prepared.space,
            context.prepared.profile,
            context.objectives,
            sampling,
            storage,
        )
        self._references: list[Evaluation] = []
        self._judged: list[Evaluation] = []
        self._judging = Judging(
            context.prepared,
            context.evaluator,
            context.device,
            self._judged,
            lambda: context.budget.remaining_s,
            context.progress,
        )
        self._plan = TimePlan(context.budget.time_s, context.budget.spent_s)
        self._written = -math.inf

    def run(self) -> Front:
        self._references += measure_references(self._context)
        self._judged += self._judged_before()
        self._plan = replace(self._plan, demand=self._demand())
        if self._budget.time_s is not None:
            self._context.progress.note(self._plan.text())
        self._explore()
        if not self._study.evaluations:
            raise self._nothing_found()
        self._train()
        return self._judge()

    def _judged_before(self) -> list[Evaluation]:
        known = [e.candidate for e in (*self._references, *self._study.evaluations)]
        found = [self._context.folder.evaluation(name, "test") for name in known]
        return [e for e in found if e is not None]

    def _demand(self) -> Demand:
        """What the phases that are still to come will need."""
        settings = self._context.settings
        return Demand(
            final_s=self._judging.one_final_s(self._references),
            finalists=settings.finalists + len(self._references),
            trains=settings.survivors and self._context.prepared.workload.train is not None,
        )

    def _explore(self) -> None:
        """Find seeds, then search until the time or the trials are used up."""
        original = self._references[0]
        start = self._start()
        outcome = Outcome(
            self._allowed,
            self._finished_one,
            lambda evaluation: violations(self._limits, evaluation, original),
            lambda: self._budget.spent_s,
            lambda estimates: expected_excess(self._limits, estimates, original),
        )
        for evaluation in self._study.evaluations:
            if evaluation.candidate not in self._study.trained:
                start.costs.observe(self._study.indices_of(evaluation.candidate), evaluation)
        limit_s = self._seconds_until("search")
        self._context.progress.stage("search", self._budget.trials, limit_s=limit_s)
        self._context.progress.advance(self._study.finished)
        judge = Judge(self._context.objectives, original)
        agenda = Agenda(self._study, judge, start.costs, original, outcome)
        self._engine.explore(
            self._context,
            agenda,
            lambda keep_busy: refine_seeds(
                self._context, self._study, start, keep_busy, self._search_left
            ),
        )
        if agenda.judged_plans:
            self._context.progress.note(
                f"{agenda.judged_plans} plans were judged on a sample; in all "
                f"{self._study.finished} were built and measured"
            )
        self._plan = self._plan.after("search", self._budget.spent_s)
        self._show(write=True)

    def _start(self) -> Start:
        if not self._context.settings.seeds or self._search_over():
            return guessed_start(self._context, self._references)
        return find_start(self._context, self._study, self._references)

    def _search_over(self) -> bool:
        return not self._allowed(self._study.finished)

    def _search_left(self) -> float:
        """Seconds that the search may still take; infinite without a time limit."""
        left = self._seconds_until("search")
        return 0.0 if self._search_over() else math.inf if left is None else left

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
        self._context.folder.save_seconds_spent(self._budget.spent_s)
        self._context.progress.advance()
        on_front = evaluation is not None and evaluation in self._study.evaluations_on_front
        if on_front or time.monotonic() - self._written > _WRITE_EVERY_S:
            self._show(write=True)

    def _train(self) -> None:
        """Train survivors, if there are training data and time for it."""
        settings, progress = self._context.settings, self._context.progress
        if settings.survivors and self._context.prepared.workload.train is None:
            progress.note("no survivors are trained: the workload has no train split")
        seconds = self._plan.seconds("survivors")
        # Without a time limit nothing says how long to train.
        if seconds and self._demand().trains:
            self._engine.train(
                self._context,
                self._study,
                self._references[0],
                lambda: self._show(write=True),
                seconds,
            )
            self._plan = self._plan.after("survivors", self._budget.spent_s)

    def _nothing_found(self) -> SearchError:
        self._show(write=True)
        reasons = list(self._study.failures.values())
        return SearchError(
            f"None of {len(reasons)} candidates could be finished.",
            given=reasons[0] if reasons else "no candidate was tried",
            advice="see failures.json in the run folder",
        )

    def _judge(self) -> Front:
        known = self._study.evaluations
        within = [e for e in known if satisfied(self._limits, e, self._references[0])]
        if not within:
            self._context.progress.note(
                "no candidate keeps all hard limits; the nearest trade-offs are judged"
            )
        finalists = choose_finalists(
            within or known,
            self._references[0],
            self._context.objectives,
            self._context.settings.finalists,
            next((e for e in self._references if e.candidate == STOCK_INT8), None),
        )
        original, *others = self._references
        wanted = [original, *finalists[:1], *others, *finalists[1:]]
        self._judging.judge(wanted, lambda: self._show(write=True))
        self._context.folder.save_seconds_spent(self._budget.spent_s)
        return self._show(complete=True, write=True)

    def _show(self, *, complete: bool = False, write: bool) -> Front:
        searched = [*self._references, *self._study.evaluations]
        folder, objectives = self._context.folder.path, self._context.objectives
        front = build_front(folder, objectives, searched, self._judged, complete=complete)
        if self._study.failures:
            write_json(folder / "failures.json", dict(self._study.failures))
        if self._study.evaluations and write:
            front.save()
            self._context.progress.show_front(front.table(), objectives)
            self._written = time.monotonic()
        return front


def _sampler_context(limits: int) -> SamplerContext:
    def excesses(trial: FrozenTrial) -> Sequence[float]:
        # Plans that were only judged are not known to keep any limit.
        return trial.user_attrs.get(VIOLATIONS) or [1.0] * limits

    return SamplerContext(excesses if limits else None, None, frozenset({RUNTIME}))
