"""The survivors' rounds of one search: time, checkpoints, and what is told of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import final

from autocompress.evaluation import Evaluation
from autocompress.files import write_json
from autocompress.plan import Plan, candidate_name
from autocompress.recover import Watch
from autocompress.search.agenda import reason_of
from autocompress.search.context import SearchContext
from autocompress.search.study import Study
from autocompress.search.survivors import (
    MOST_ROUNDS,
    ROUNDS,
    RoundReport,
    Shape,
    Told,
    Trained,
    choose_shapes,
    first_epochs,
    halve,
    plan_of,
    report_round,
    retrains,
    run_round,
    shapes_for,
)
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover

# What a run folder keeps of how the rounds went.
REPORTS = "survivors.json"
# Steps of a candidate's making.
_TRAININGS = (Recover.technique, Qat.technique)
# Of a training's expected time: files are made and measured, too.
_MARGIN = 1.1


@final
class SurvivorTraining:
    """Distils members of the front in rounds within a time limit; what is trained is kept.

    Args:
        context: the search.
        study: gets the trained candidates.
        original: figures of the original network on the search split.
        show: called after every trained network.
    """

    def __init__(
        self,
        context: SearchContext,
        study: Study,
        original: Evaluation,
        show: Callable[[], object],
    ) -> None:
        self._context, self._study = context, study
        self._original, self._show = original, show
        self._told = Told(self._done, self._failed)
        self._reasons: set[str] = set()
        self._deadline_s = 0.0

    def run(self, seconds: float) -> None:
        """Train for at most so long; what was trained by an earlier call is not trained again."""
        self._deadline_s = self._context.budget.spent_s + seconds
        shapes = self._shapes(seconds)
        if len(shapes) > 1 and not self._pace(shapes) and (first := self._untimed(shapes)):
            # One training tells how long they take, and so how many there is time for.
            self._context.progress.stage("train the first one", 1, limit_s=seconds)
            run_round(first, 0, self._measure, self._told)
            shapes = self._shapes(seconds)
        before = {shape.steps.hash: shape.metric for shape in shapes}
        reports: list[RoundReport] = []
        for number in range(MOST_ROUNDS):
            if number >= ROUNDS and not self._has_time_for(shapes, number):
                break
            self._begin(number, len(shapes))
            trained, whole = run_round(shapes, number, self._measure, self._told)
            while number == 0 and whole and (further := self._further(trained, seconds)):
                # The pace was worse than it is: there is time for more.
                self._begin(number, len(further))
                more, whole = run_round(further, number, self._measure, self._told)
                before |= {t.shape.steps.hash: t.shape.metric for t in more}
                trained += more
                if len(more) < len(further):
                    break
            ranks = [before[t.shape.steps.hash] for t in trained]
            reports.append(report_round(trained, ranks, number))
            before |= {t.shape.steps.hash: t.metric for t in trained}
            if not whole or not trained:
                break
            shapes = halve(trained, self._original, self._context.objectives)
        write_json(self._context.folder.path / REPORTS, [asdict(report) for report in reports])
        for report in reports:
            if report.trained:
                self._context.progress.note(report.text())

    def _begin(self, number: int, shapes: int) -> None:
        limit_s = max(0.0, self._deadline_s - self._context.budget.spent_s)
        name = f"train, round {number + 1}" + (f" of {ROUNDS}" if number < ROUNDS else "")
        self._context.progress.stage(name, shapes, limit_s=limit_s)

    def _shapes(self, seconds: float) -> list[Shape]:
        """As many of the front's shapes as there is time for, by the pace of a first training."""
        untrained = [e for e in self._study.evaluations if e.candidate not in self._study.trained]
        objectives = self._context.objectives
        count, epochs = shapes_for(seconds, None), first_epochs(self._context.epoch_steps)
        chance = self._context.chance
        most = choose_shapes(untrained, self._original, objectives, count, chance, epochs)
        pace = self._pace(most)
        if not pace:
            return most
        return most[: shapes_for(seconds, pace, self._measuring_s(most))]

    def _measuring_s(self, shapes: Sequence[Shape]) -> float:
        """About how long a shape's files take once it is trained, in seconds; 0 if not known."""
        took = [
            sum(s for step, s in e.seconds.items() if step not in _TRAININGS)
            for e in self._study.trained.values()
        ]
        ways = sum(len(shape.ways) for shape in shapes) / len(shapes)
        return ways * sum(took) / len(took) if took else 0.0

    def _further(self, trained: Sequence[Trained], seconds: float) -> list[Shape]:
        """Shapes that there is time for beside those that were trained."""
        known = {t.shape.steps.hash for t in trained}
        wanted = self._shapes(seconds)
        others = [shape for shape in wanted if shape.steps.hash not in known]
        return others[: max(0, len(wanted) - len(known))]

    def _has_time_for(self, shapes: Sequence[Shape], number: int) -> bool:
        """Whether a further round will end in time, by the pace of those before."""
        paces = self._paces(shapes, number)
        needed = sum(math.inf if pace is None else pace for pace in paces)
        return _MARGIN * needed <= self._deadline_s - self._context.budget.spent_s

    def _pace(self, shapes: Sequence[Shape]) -> float:
        """About how long the first round takes for each, in seconds; 0 if not known."""
        known = [pace for pace in self._paces(shapes, 0) if pace]
        return sum(known) / len(known) if known else 0.0

    def _untimed(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The first one whose training takes nobody knows how long; those on disk take no time."""
        pairs = zip(shapes, self._paces(shapes, 0), strict=True)
        return [shape for shape, pace in pairs if pace is None][:1]

    def _paces(self, shapes: Sequence[Shape], number: int) -> list[float | None]:
        """About how long a round's trainings take for each, in seconds; None if not known."""
        return [self._seconds(shape, number) for shape in shapes]

    def _seconds(self, shape: Shape, number: int) -> float | None:
        """Of its recovery, and of what each way that is not measured yet trains after it."""
        estimate = self._context.evaluator.builder.training_seconds
        recovery = estimate(plan_of(shape, Plan(), number))
        plans = {
            plan.hash: plan
            for way, runtime in shape.ways
            if retrains(plan := plan_of(shape, way, number)) and not self._known(plan, runtime)
        }
        whole = [estimate(plan) for plan in plans.values()]
        if recovery is None or None in whole:
            return None
        return recovery + sum(seconds - recovery for seconds in whole if seconds is not None)

    def _known(self, plan: Plan, runtime: str) -> Evaluation | None:
        """What was measured of a trained plan before."""
        name = candidate_name(plan.hash, runtime, self._context.runtimes[0])
        return self._study.trained.get(name)

    def _measure(self, plan: Plan, runtime: str) -> Evaluation:
        context = self._context
        known = self._known(plan, runtime)
        if known is not None:
            return known
        watch = Watch(stop=lambda: context.budget.spent_s > self._deadline_s)
        artifact = context.evaluator.artifact(plan, None, watch)
        evaluation = context.measure(artifact, plan, runtime).result()
        context.folder.save_plan(plan)
        context.folder.save_seconds_spent(context.budget.spent_s)
        self._study.keep_trained(evaluation, context.budget.spent_s)
        return evaluation

    def _done(self, trained: Trained) -> None:
        self._context.progress.advance()
        self._show()

    def _failed(self, cause: Exception) -> None:
        reason = reason_of(cause)
        # All files of a shape whose training fails do so for the same reason.
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._context.progress.note(f"a training of survivors failed: {reason}")
