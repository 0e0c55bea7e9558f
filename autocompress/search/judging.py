"""The last judgement of a search: finalists measured again, on data that the search never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import final

from autocompress.build import Artifact
from autocompress.errors import ExportError, MeasurementError, PlanError, WorkloadError
from autocompress.evaluate import NOT_CODED, Evaluator, Measured
from autocompress.evaluation import Evaluation
from autocompress.export.coding.beside import Coding
from autocompress.plan import Plan, file_of
from autocompress.search.columns import ORIGINAL, REFERENCES
from autocompress.search.final_codes import FinalCodes
from autocompress.search.prepare import Prepared
from autocompress.search.progress import Progress
from autocompress.search.undecided import Precision, describe_pairs, join, next_point, repeat_s
from autocompress.techniques import read_plan

_JUDGING_STEPS = ("metric", "latency", "memory", "energy")
# Final judging takes longer than planned now and then.
_MARGIN = 1.1
# Sampling of a final measurement takes about this share of its limit.
_USUAL_SHARE = 0.5
# Figures that are lost if the search is killed while their containers are made.
_MOST_UNCODED = 4
# A process of its own must start.
_START_S = 2.0


@final
class Judging:
    """Judges reference points and finalists one after another; what is judged is kept at once.

    Points that cannot be told apart then are measured again, see `undecided`. Containers are made
    beside what is measured. A search that goes by the coded size keeps no figures without it; for
    others they are made last, as far as there is time.

    Args:
        prepared: the search.
        evaluator: measures.
        device: the one thread that measures.
        judged: what earlier calls judged; gets all further ones.
        remaining_s: seconds left; None without a limit.
        progress: whom to tell.
    """

    def __init__(
        self,
        prepared: Prepared,
        evaluator: Evaluator,
        device: ThreadPoolExecutor,
        judged: list[Evaluation],
        remaining_s: Callable[[], float | None],
        progress: Progress,
    ) -> None:
        self._prepared, self._evaluator, self._device = prepared, evaluator, device
        self._judged, self._remaining_s, self._progress = judged, remaining_s, progress
        self._codes = FinalCodes(evaluator, self._add_code)
        self._coded = evaluator.extras.coded

    def one_final_s(self, searched: Sequence[Evaluation]) -> float:
        """About how long one finalist takes: as those before, or guessed from the search's own."""
        seconds = [self._seconds(e) for e in self._judged]
        if seconds:
            return _MARGIN * sum(seconds) / len(seconds)
        splits = self._prepared.workload.splits()
        share = len(splits["test_split"]) / len(splits["search_split"])
        metric = max((e.seconds.get("metric", 0.0) for e in searched), default=0.0)
        limit = self._prepared.profile.measuring.final_time_limit_s
        return _MARGIN * (_USUAL_SHARE * limit + metric * share + 1.0)

    def judge(self, finalists: Sequence[Evaluation], show: Callable[[], object]) -> None:
        """Judge those that are not judged yet, as long as there is time, the first ones at least.

        Args:
            finalists: references first, then the most important; the first one and the first
                candidate are judged however late it is.
            show: called after each.
        """
        done = {e.candidate for e in self._judged}
        self._progress.stage("judge finalists", len(finalists))
        for finalist in finalists:
            if finalist.candidate not in done and not self._too_late(finalist):
                self._judge_one(finalist)
                show()
            self._progress.advance()
        if self._coded:
            self._code(show, lambda: None)
        self._decide(finalists, show)
        if not self._coded:
            self._ask_for_codes()
            self._code(show, self._remaining_s)

    def _ask_for_codes(self) -> None:
        """Ask for the containers that an earlier call had no time for."""
        for e in self._judged:
            path = self._prepared.folder.path / e.artifact
            lacks = e.download_bytes is None and NOT_CODED not in e.details
            if lacks and e.candidate not in self._codes and path.is_file():
                self._codes.add(e.candidate, path)

    def _code(self, show: Callable[[], object], remaining_s: Callable[[], float | None]) -> None:
        """Wait for containers, as long as there is time."""
        self._codes.look()
        count = len(self._codes)
        if not count:
            return
        self._progress.stage("code finalists", count)
        while left := len(self._codes):
            seconds = remaining_s()
            if (seconds is not None and seconds <= 0) or not self._codes.wait(seconds):
                self._progress.note(f"no time was left for the coded sizes of {left} finalists")
                break
            self._progress.advance(left - len(self._codes))
        show()

    def _decide(self, finalists: Sequence[Evaluation], show: Callable[[], object]) -> None:
        """Measure close points again until they are told apart or nothing more can be done."""
        objectives = self._prepared.experiment.objectives
        precision = Precision.of(self._prepared.profile)
        searched = {e.candidate: e for e in finalists}
        failed: set[str] = set()
        begun = False
        while True:
            known = [e for e in self._judged if e.candidate in searched]
            # Choosing by the test split would spoil its verdict.
            points = [replace(e, metric=searched[e.candidate].metric) for e in known]
            index = next_point(points, objectives, precision, failed)
            if index is None or self._too_long(known[index]):
                break
            if not begun:
                self._progress.stage("measure close points again")
                begun = True
            if not self._measure_again(known[index]):
                failed.add(known[index].candidate)
            show()
            self._progress.advance()
        note = describe_pairs(points, objectives, precision)
        if note:
            self._progress.note(note)

    def _too_long(self, judged: Evaluation) -> bool:
        """Whether there is no time to measure a point once more.

        Without a time limit all repeats together may take as long as judging itself did.
        """
        needed = _MARGIN * (repeat_s(judged) + _START_S)
        remaining = self._remaining_s()
        if remaining is not None:
            return remaining < needed
        repeats = [single.seconds for e in self._judged for single in e.repeats[1:]]
        return sum(repeats) + needed > sum(map(self._seconds, self._judged))

    def _measure_again(self, judged: Evaluation) -> bool:
        """Join one more measurement with a point's earlier ones; whether that went well."""
        try:
            self._file_of(judged)
            again = self._device.submit(self._evaluator.measure_again, judged).result()
        except (MeasurementError, ExportError, PlanError) as reason:
            self._progress.note(f"{judged.candidate} could not be measured again: {reason}")
            return False
        found = join(judged, again)
        self._prepared.folder.save_evaluation(found)
        self._judged[self._judged.index(judged)] = found
        return True

    def _too_late(self, finalist: Evaluation) -> bool:
        remaining = self._remaining_s()
        if remaining is None or remaining >= self.one_final_s([finalist]):
            return False
        if file_of(finalist.candidate) in REFERENCES:
            # Drops are told against the original's own judgement.
            return bool(self._judged)
        return any(e.plan for e in self._judged)

    def _judge_one(self, finalist: Evaluation) -> None:
        """Measure a finalist while containers of earlier ones are made beside it.

        Raises:
            WorkloadError: the metric fails on the original's outputs.
        """
        try:
            artifact, plan = self._file_of(finalist), _plan_of(finalist)
            measured = self._device.submit(
                self._evaluator.measure_uncoded,
                artifact, plan, finalist.runtime, "test", final=True,
            ).result()  # fmt: skip
        except (MeasurementError, ExportError, PlanError, WorkloadError) as reason:
            if isinstance(reason, WorkloadError) and finalist.candidate == ORIGINAL:
                # On this split the metric would fail for everyone.
                raise
            self._tell(finalist, reason)
            return
        found = measured.evaluation
        if self._coded:
            # Until its container is made, the size known from the search keeps it on the front.
            found = replace(found, download_bytes=finalist.download_bytes)
        else:
            self._prepared.folder.save_evaluation(found)
        self._judged.append(found)
        self._codes.add(finalist.candidate, artifact.path)
        while self._coded and len(self._codes) > _MOST_UNCODED:
            self._codes.wait()

    def _add_code(self, candidate: str, coding: Coding, waited_s: float) -> None:
        """Add the coded size to a judged point, whose figures are whole then."""
        index = [e.candidate for e in self._judged].index(candidate)
        try:
            found = self._evaluator.with_code(Measured(self._judged[index], coding))
        except ExportError as reason:
            if self._coded:
                self._tell(self._judged.pop(index), reason)
            else:
                # A later call asks for it again.
                self._progress.note(f"finalist {candidate} has no coded size: {reason}")
            return
        if self._coded:
            found = replace(found, seconds={**found.seconds, "code": waited_s})
        self._prepared.folder.save_evaluation(found)
        self._judged[index] = found

    def _tell(self, finalist: Evaluation, reason: Exception) -> None:
        # It stays a candidate with the figures of the search.
        self._progress.note(f"finalist {finalist.candidate} failed: {reason}")

    def _file_of(self, evaluation: Evaluation) -> Artifact:
        """A candidate's file, built again if it is gone."""
        path = self._prepared.folder.path / evaluation.artifact
        if path.is_file():
            return Artifact(path, evaluation.details, {})
        return self._evaluator.artifact(_plan_of(evaluation))

    def _seconds(self, evaluation: Evaluation) -> float:
        steps = (*_JUDGING_STEPS, "code") if self._coded else _JUDGING_STEPS
        found = sum(evaluation.seconds.get(step, 0.0) for step in steps)
        return found if math.isfinite(found) else 0.0


def _plan_of(evaluation: Evaluation) -> Plan:
    return read_plan(evaluation.plan) if evaluation.plan else Plan()
