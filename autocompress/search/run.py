"""One search from an experiment file to a judged front, on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import final

from autocompress.build import Artifact, Builder
from autocompress.errors import (
    DeviceError,
    ExportError,
    MeasurementError,
    PlanError,
    SearchError,
)
from autocompress.evaluate import (
    Evaluation,
    Evaluator,
    Extras,
    SplitName,
)
from autocompress.files import write_json
from autocompress.plan import Plan, candidate_name, file_of
from autocompress.search.budget import Budget
from autocompress.search.columns import ORIGINAL, REFERENCES, STOCK_INT8
from autocompress.search.finals import choose_finalists
from autocompress.search.front import Front, build_front
from autocompress.search.paying_levels import keep_paying_levels
from autocompress.search.prepare import Options, Prepared, fill_bank, prepare
from autocompress.search.progress import Progress, Silent
from autocompress.search.seeds import uniform_seeds
from autocompress.search.study import Study
from autocompress.techniques import read_plan

# Final judging takes longer than planned now and then.
_RESERVE_MARGIN = 1.15
# Of a time limit, at most this share is kept for judging.
_LARGEST_RESERVE = 0.4
# If so many candidates fail one after another, something is wrong with all of them.
_HOPELESS = 10
_JUDGING_STEPS = ("metric", "latency", "memory", "energy", "code")
_SPLITS: tuple[SplitName, ...] = ("search", "test")


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
        extras = Extras("download_bytes" in objectives, "energy" in objectives)
        with Evaluator(
            prepared.workload, builder, prepared.profile, prepared.folder.path, extras
        ) as evaluator:
            return _Search(prepared, evaluator, budget, progress).run()


@final
class _Search:
    """The stages after preparation: reference points, trials, finalists."""

    def __init__(
        self, prepared: Prepared, evaluator: Evaluator, budget: Budget, progress: Progress
    ) -> None:
        settings = prepared.experiment.search
        self._prepared = prepared
        self._folder = prepared.folder
        self._objectives = prepared.experiment.objectives
        self._evaluator = evaluator
        self._budget = budget
        self._progress = progress
        self._study = Study(
            prepared.folder.database,
            prepared.space,
            prepared.profile,
            self._objectives,
            settings.sampler,
            settings.seed,
        )
        self._built: dict[str, Artifact] = {}
        self._references: list[Evaluation] = []
        self._judged: list[Evaluation] = []

    def run(self) -> Front:
        self._measure_references()
        self._judged += [
            found
            for evaluation in self._study.evaluations
            if (found := self._folder.evaluation(evaluation.candidate, "test")) is not None
        ]
        self._study.enqueue(uniform_seeds(self._prepared.space))
        self._try_plans()
        if not self._study.evaluations:
            raise self._nothing_found()
        return self._judge()

    def _measure_references(self) -> None:
        """Measure the original network in every runtime, and the stock tool's int8 in the first."""
        runtimes = self._prepared.profile.runtime_names
        wanted = [(ORIGINAL, runtimes[0]), (STOCK_INT8, runtimes[0])]
        wanted += [(ORIGINAL, runtime) for runtime in runtimes[1:]]
        self._progress.stage("reference points", len(_SPLITS) * len(wanted))
        for file, runtime in wanted:
            name = candidate_name(file, runtime, runtimes[0])
            for split in _SPLITS:
                found = self._folder.evaluation(name, split)
                if found is None:
                    try:
                        artifact = self._reference(file)
                        found = self._evaluator.measure(
                            artifact, Plan(), runtime, split, final=True
                        )
                    except (ExportError, MeasurementError) as reason:
                        if name == ORIGINAL:
                            raise
                        # What another tool or runtime fails at must not end the search.
                        self._progress.note(f"no reference point {name}: {reason}")
                        break
                    self._folder.save_evaluation(found)
                (self._references if split == "search" else self._judged).append(found)
                self._progress.advance()
            self._note_time()

    def _reference(self, file: str) -> Artifact:
        if file not in self._built:
            build = self._evaluator.build_original
            self._built[file] = build() if file == ORIGINAL else self._evaluator.build_stock(file)
        return self._built[file]

    def _try_plans(self) -> None:
        budget = self._budget
        self._progress.stage("search", budget.trials, limit_s=budget.remaining_s)
        self._progress.advance(self._study.finished)
        failed_in_a_row = 0
        # However short the time: without one candidate there would be nothing to show.
        while not self._study.finished or budget.allows_trial(
            self._study.finished, self._reserve_s()
        ):
            proposal = self._study.propose()
            if proposal is None:
                self._progress.note(
                    f"no new plan was found: {self._study.finished} were tried, and what is left "
                    "of the search space, if anything, is too rare to be drawn"
                )
                break
            self._folder.save_plan(proposal.plan)
            try:
                evaluation = self._evaluator.evaluate(proposal.plan, proposal.runtime)
            except (DeviceError, OSError):
                # The machine's fault, not the plan's: the trial stays open and is tried again.
                raise
            except Exception as cause:
                # Whatever one plan does to PyTorch or the runtime must not end a search of hours.
                self._study.fail(proposal, f"{type(cause).__name__}: {cause}")
                failed_in_a_row += 1
                self._stop_if_hopeless(failed_in_a_row, cause)
            else:
                self._study.succeed(proposal, evaluation)
                failed_in_a_row = 0
            self._note_time()
            self._progress.advance()
            self._show()

    def _stop_if_hopeless(self, failed: int, cause: Exception) -> None:
        if failed >= _HOPELESS:
            self._show()
            raise SearchError(
                f"The last {failed} candidates all failed; the search is given up.",
                given=f"{type(cause).__name__}: {cause}",
                advice="see failures.json in the run folder; --debug shows the last traceback",
            ) from cause

    def _nothing_found(self) -> SearchError:
        self._show()
        reasons = list(self._study.failures.values())
        return SearchError(
            f"None of {len(reasons)} candidates could be finished.",
            given=reasons[0] if reasons else "no candidate was tried",
            advice="see failures.json in the run folder",
        )

    def _judge(self) -> Front:
        """Measure the front's members again and take their metric on the test split."""
        finalists = self._finalists()
        self._progress.stage("judge finalists", len(finalists))
        done = {e.candidate for e in self._judged}
        for finalist in finalists:
            remaining = self._budget.remaining_s
            late = remaining is not None and remaining < self._one_final_s()
            if finalist.candidate in done or (late and any(e.plan for e in self._judged)):
                continue
            try:
                found = self._judge_one(finalist)
            except (MeasurementError, ExportError, PlanError) as reason:
                # It stays a candidate with the figures of the search.
                self._progress.note(f"finalist {finalist.candidate} failed: {reason}")
                continue
            self._folder.save_evaluation(found)
            self._judged.append(found)
            self._note_time()
            self._progress.advance()
            self._show()
        return self._show(complete=True)

    def _judge_one(self, finalist: Evaluation) -> Evaluation:
        plan = read_plan(finalist.plan)
        path = self._folder.path / finalist.artifact
        kept = Artifact(path, finalist.details, {})
        artifact = kept if path.is_file() else self._evaluator.artifact(plan)
        return self._evaluator.measure(artifact, plan, finalist.runtime, "test", final=True)

    def _one_final_s(self) -> float:
        """About how long one finalist takes, from the reference points' own final judging."""
        seconds = [
            sum(e.seconds.get(step, 0.0) for step in _JUDGING_STEPS)
            for e in self._judged
            if file_of(e.candidate) in REFERENCES
        ]
        return _RESERVE_MARGIN * min(seconds)

    def _reserve_s(self) -> float:
        """Seconds to keep for judging what would be judged now."""
        limit = self._budget.time_s
        if limit is None:
            return 0.0
        finalists = max(1, len(self._finalists()))
        return min(finalists * self._one_final_s(), _LARGEST_RESERVE * limit)

    def _finalists(self) -> list[Evaluation]:
        return choose_finalists(
            self._study.evaluations,
            self._references[0],
            self._objectives,
            self._prepared.experiment.search.finalists,
            next((e for e in self._references if e.candidate == STOCK_INT8), None),
        )

    def _note_time(self) -> None:
        self._folder.save_seconds_spent(self._budget.spent_s)

    def _show(self, *, complete: bool = False) -> Front:
        searched = [*self._references, *self._study.evaluations]
        front = build_front(
            self._folder.path, self._objectives, searched, self._judged, complete=complete
        )
        if self._study.failures:
            write_json(self._folder.path / "failures.json", dict(self._study.failures))
        if self._study.evaluations:
            front.save()
            self._progress.show_front(front.table())
        return front
