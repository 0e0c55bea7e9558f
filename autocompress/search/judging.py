"""The last judgement of a search: finalists measured again, on data that the search never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import final

from autocompress.build import Artifact
from autocompress.errors import ExportError, MeasurementError, PlanError
from autocompress.evaluate import Evaluation, Evaluator
from autocompress.plan import Plan, file_of
from autocompress.search.columns import REFERENCES
from autocompress.search.prepare import Prepared
from autocompress.search.progress import Progress
from autocompress.techniques import read_plan

_JUDGING_STEPS = ("metric", "latency", "memory", "energy", "code")
# Final judging takes longer than planned now and then.
_MARGIN = 1.1
# Sampling of a final measurement takes about this share of its limit.
_USUAL_SHARE = 0.5


@final
class Judging:
    """Judges reference points and finalists one after another; what is judged is kept at once.

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

    def _too_late(self, finalist: Evaluation) -> bool:
        remaining = self._remaining_s()
        if remaining is None or remaining >= self.one_final_s([finalist]):
            return False
        if file_of(finalist.candidate) in REFERENCES:
            # Drops are told against the original's own judgement.
            return bool(self._judged)
        return any(e.plan for e in self._judged)

    def _judge_one(self, finalist: Evaluation) -> None:
        plan = read_plan(finalist.plan) if finalist.plan else Plan()
        path = self._prepared.folder.path / finalist.artifact
        try:
            artifact = Artifact(path, finalist.details, {})
            if not path.is_file():
                artifact = self._evaluator.artifact(plan)
            found = self._device.submit(
                self._evaluator.measure, artifact, plan, finalist.runtime, "test", final=True
            ).result()
        except (MeasurementError, ExportError, PlanError) as reason:
            # It stays a candidate with the figures of the search.
            self._progress.note(f"finalist {finalist.candidate} failed: {reason}")
            return
        self._prepared.folder.save_evaluation(found)
        self._judged.append(found)

    @staticmethod
    def _seconds(evaluation: Evaluation) -> float:
        found = sum(evaluation.seconds.get(step, 0.0) for step in _JUDGING_STEPS)
        return found if math.isfinite(found) else 0.0
