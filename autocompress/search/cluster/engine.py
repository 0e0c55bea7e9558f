"""The engine `ray`: stages of a search worked off by a cluster."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import final

import ray

from autocompress.build import BASELINE
from autocompress.evaluation import Evaluation
from autocompress.files import write_json
from autocompress.search.agenda import Agenda
from autocompress.search.cluster.artifacts import Location
from autocompress.search.cluster.candidate import SharedReference
from autocompress.search.cluster.connect import Cluster
from autocompress.search.cluster.explorer import ClusterExplorer
from autocompress.search.cluster.rounds import Rounds, race_shapes
from autocompress.search.cluster.tuning import modes_of
from autocompress.search.cluster.workshop import Shared, carried, keep_off, new_token
from autocompress.search.context import SearchContext
from autocompress.search.engines import Engine, Refine
from autocompress.search.study import Study
from autocompress.search.survivors import (
    ROUNDS,
    RoundReport,
    Trained,
    choose_shapes,
    first_epochs,
    halve,
    report_round,
    shapes_for,
)
from autocompress.search.training import REPORTS
from autocompress.techniques import read_plan, technique_of


@final
class ClusterEngine(Engine):
    """Builds and judges on all nodes, and measures where the device is.

    Args:
        cluster: joined by this process.
        artifacts: a location that all nodes see; None for the run folder.
    """

    def __init__(self, cluster: Cluster, artifacts: str | None) -> None:
        self._cluster, self._artifacts = cluster, artifacts

    def explore(self, context: SearchContext, agenda: Agenda, refine: Refine) -> None:
        """See `ClusterExplorer`; seeds are refined here meanwhile."""
        folder, location = context.folder.path, self._location(context)
        shared = _share(context, self._cluster, location, trains=_space_trains(context))
        explorer = ClusterExplorer(
            agenda,
            self._cluster,
            shared,
            context,
            lambda evaluation: _bring(location, evaluation, folder),
        )
        keep_off(_pinned(self._cluster).get(platform.node(), ()))
        refining = Thread(target=lambda: refine(lambda: None), daemon=True)
        refining.start()
        try:
            explorer.run()
        finally:
            # It stops by itself once the search is over.
            refining.join()

    def train(
        self,
        context: SearchContext,
        study: Study,
        original: Evaluation,
        show: Callable[[], object],
        seconds: float,
    ) -> None:
        """See `rounds.race_shapes`."""
        ClusterTraining(context, self._cluster, self._location(context), study, show).run(
            original, seconds
        )

    def _location(self, context: SearchContext) -> Location:
        return Location.claimed(self._artifacts or str(context.folder.path.resolve()))


@final
class ClusterTraining:
    """The survivors' rounds of one search on a cluster; what is trained is kept.

    Args:
        study: gets the trained candidates.
        show: called after every round of a network.
    """

    def __init__(
        self,
        context: SearchContext,
        cluster: Cluster,
        location: Location,
        study: Study,
        show: Callable[[], object],
    ) -> None:
        self._context, self._cluster, self._location = context, cluster, location
        self._study, self._show = study, show

    def run(self, original: Evaluation, seconds: float) -> None:
        """Train for at most so long."""
        context = self._context
        untrained = [e for e in self._study.evaluations if e.candidate not in self._study.trained]
        count, epochs = shapes_for(seconds, None), first_epochs(context.epoch_steps)
        shapes = choose_shapes(
            untrained, original, context.objectives, count, context.chance, epochs
        )
        end_s = context.budget.spent_s + seconds
        rounds = Rounds(
            shapes,
            len(self._cluster.nodes),
            time.time() + seconds,
            lambda trained: halve(trained, original, context.objectives),
            self._done,
            lambda: context.budget.spent_s > end_s,
        )
        context.progress.stage("train survivors", len(shapes), limit_s=seconds)
        shared = _share(context, self._cluster, self._location, trains=True)
        storage = f"{self._location.url}/tune"
        race_shapes(rounds, self._cluster, shared, storage, modes_of(context.objectives))
        # What is trained is in the location; Tune's own files are never read again.
        shutil.rmtree(context.folder.path / "tune", ignore_errors=True)
        self._report(rounds)

    def _done(self, number: int, trained: Trained) -> None:
        context = self._context
        for evaluation in trained.evaluations:
            if evaluation.candidate in self._study.trained:
                continue
            _bring(self._location, evaluation, context.folder.path)
            context.folder.save_plan(read_plan(evaluation.plan))
            self._study.keep_trained(evaluation, context.budget.spent_s)
        context.folder.save_seconds_spent(context.budget.spent_s)
        if number == 0:
            context.progress.advance()
        self._show()

    def _report(self, rounds: Rounds) -> None:
        before = {str(i): shape.metric for i, shape in enumerate(rounds.shapes)}
        reports: list[RoundReport] = []
        for number in range(ROUNDS):
            finished = rounds.rungs.finished(number)
            ranks = [before[name] for name in finished]
            reports.append(report_round(list(finished.values()), ranks, number))
            before |= {name: trained.metric for name, trained in finished.items()}
        write_json(self._context.folder.path / REPORTS, [asdict(report) for report in reports])
        for report in reports:
            if report.trained:
                self._context.progress.note(report.text())


def _share(
    context: SearchContext, cluster: Cluster, location: Location, *, trains: bool
) -> SharedReference:
    """Put into Ray's object store what the processes of a cluster need."""
    prepared, evaluator = context.prepared, context.evaluator
    workload = prepared.workload if trains else replace(prepared.workload, train=None)
    shared = Shared(
        new_token(),
        workload,
        prepared.graph,
        prepared.exporter,
        context.bank.state(),
        prepared.profile,
        prepared.experiment.calibration,
        evaluator.extras,
        context.settings.seed,
        evaluator.builder.path(BASELINE).read_bytes(),
        tuple(node.actor for node in cluster.nodes),
        location,
        _pinned(cluster),
    )
    with carried():
        return SharedReference(shared.token, ray.put(shared))


def _pinned(cluster: Cluster) -> dict[str, tuple[int, ...]]:
    """By a machine's name its cores that measure; several nodes may be one machine."""
    found: dict[str, tuple[int, ...]] = {}
    for node in cluster.nodes:
        found[node.name] = (*found.get(node.name, ()), *node.cores)
    return found


def _space_trains(context: SearchContext) -> bool:
    return any(technique_of(s.decision).stage.trains for s in context.prepared.space.steps())


def _bring(location: Location, evaluation: Evaluation, folder: Path) -> None:
    """Fetch a candidate's files into the run folder, if they are elsewhere."""
    location.bring(evaluation.artifact, folder)
    location.bring(f"measurements/{evaluation.candidate}-{evaluation.split}.json", folder)
