"""One search from an experiment file to a judged front, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from autocompress.bank import Bank
from autocompress.bank.store import network_hash
from autocompress.config import (
    Experiment,
    SearchSettings,
    load_experiment,
    load_search_space,
    parse_duration,
)
from autocompress.device import DeviceProfile, fingerprint, load_profile
from autocompress.errors import AutocompressError, ConfigError, ExportError
from autocompress.evaluate import (
    ORIGINAL,
    STOCK_INT8,
    Artifact,
    Evaluation,
    Evaluator,
    SplitName,
)
from autocompress.graph import NetworkGraph, trace
from autocompress.measure.runtime import runtime_for
from autocompress.plan import Plan
from autocompress.search.budget import Budget
from autocompress.search.finals import choose_finalists
from autocompress.search.front import Front, build_front
from autocompress.search.progress import Progress, Silent
from autocompress.search.run_folder import Identity, RunFolder
from autocompress.search.seeds import uniform_seeds
from autocompress.search.space import Space, build_space
from autocompress.search.study import Study
from autocompress.techniques import read_plan
from autocompress.techniques.technique import GroupTechnique, LayerTechnique
from autocompress.workload import Workload, check_workload, load_workload

# Final judging takes longer than planned now and then.
_RESERVE_MARGIN = 1.15


@final
@dataclass(frozen=True)
class Options:
    """What a call may set beside the experiment file; None leaves the file's value."""

    run: Path | None = None
    trials: int | None = None
    time: str | None = None
    seed: int | None = None


@final
@dataclass(frozen=True)
class Prepared:
    """A checked experiment, before anything is written."""

    experiment: Experiment
    profile: DeviceProfile
    workload: Workload
    graph: NetworkGraph
    space: Space
    identity: Identity
    folder: RunFolder
    warnings: tuple[str, ...]


def prepare(path: Path, options: Options, progress: Progress) -> Prepared:
    """Load and check all that a search needs; writes nothing.

    Raises:
        AutocompressError: whatever is wrong with experiment, device, workload or network.
    """
    experiment = with_options(load_experiment(path), options)
    space_file = load_search_space(experiment.search_space, path)
    profile = load_profile(experiment.device, path)
    profile.pinned_cores()
    runtime_for(profile.runtime).check_available(profile.runtime)
    progress.stage("load workload")
    workload = load_workload(experiment.workload, path)
    progress.stage("check workload")
    warnings = check_workload(workload)
    progress.stage("trace network")
    graph = trace(workload.network, workload.example_inputs)
    space = build_space(graph, space_file, profile)
    identity = Identity(
        experiment, space_file, profile, fingerprint(profile), network_hash(workload.network)
    )
    folder = RunFolder(options.run or Path("runs") / experiment.name)
    return Prepared(
        experiment, profile, workload, graph, space, identity, folder, tuple(warnings)
    )


def with_options(experiment: Experiment, options: Options) -> Experiment:
    """The experiment with a call's own limits; a limit given in the call replaces the file's.

    Raises:
        ConfigError: there is no limit at all, or one that cannot be read.
    """
    settings = experiment.search.model_dump()
    if options.trials is not None or options.time is not None:
        settings |= {"trials": options.trials, "time_s": None}
    if options.trials is not None and options.trials < 1:
        raise ConfigError("There must be a trial.", given=options.trials, allowed=">= 1")
    if options.time is not None:
        settings["time_s"] = parse_duration(options.time)
    if options.seed is not None:
        settings["seed"] = options.seed
    if settings["trials"] is None and settings["time_s"] is None:
        raise ConfigError(
            "The search has no limit.",
            allowed="search.trials or search.time_s in the experiment, --trials N or --time 10m",
        )
    return experiment.model_copy(update={"search": SearchSettings(**settings)})


def run_search(path: Path, options: Options, progress: Progress | None = None) -> Front:
    """Search, judge the finalists, and return the front; the run folder holds everything.

    Calling it again with the same arguments goes on where the last call ended or was killed.

    Raises:
        AutocompressError: a bad experiment, device, workload, network or run folder.
    """
    progress = progress or Silent()
    torch.manual_seed(0)
    prepared = prepare(path, options, progress)
    spent = prepared.folder.seconds_spent()
    settings = prepared.experiment.search
    budget = Budget(settings.trials, settings.time_s, spent)
    with prepared.folder.claim(prepared.identity):
        bank = fill_bank(prepared, progress)
        with Evaluator(
            prepared.workload,
            prepared.graph,
            bank,
            prepared.profile,
            prepared.experiment.calibration,
            prepared.folder.path,
        ) as evaluator:
            return _Search(prepared, evaluator, budget, progress).run()


def fill_bank(prepared: Prepared, progress: Progress) -> Bank:
    """Calibrate and solve every variant of the original layers; what is on disk is read."""
    bank = Bank(
        prepared.workload.network,
        prepared.graph,
        prepared.profile.channel_multiple,
        prepared.folder.bank,
    )
    settings = prepared.experiment.calibration
    progress.stage("calibrate")
    bank.calibrate(prepared.workload.calibration.inputs, settings, progress.advance)
    parameters = prepared.space.parameters
    progress.stage("fill bank", len(parameters))
    for parameter in parameters:
        technique = parameter.technique
        if isinstance(technique, GroupTechnique):
            bank.order(prepared.graph.group(parameter.target), technique)
        elif isinstance(technique, LayerTechnique):
            problem = bank.problem(parameter.target)
            for decision in parameter.decisions:
                bank.solve(technique, decision, problem, "")
        progress.advance()
    return bank


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
            self._objectives,
            settings.sampler,
            settings.seed,
        )
        self._references: list[Evaluation] = []
        self._judged: list[Evaluation] = []

    def run(self) -> Front:
        self._measure_references()
        self._study.enqueue(uniform_seeds(self._prepared.space))
        self._try_plans()
        return self._judge()

    def _measure_references(self) -> None:
        """Build and measure the original network and the stock tool's int8 of it."""
        self._progress.stage("reference points", 4)
        for name, build in (
            (ORIGINAL, self._evaluator.build_original),
            (STOCK_INT8, self._evaluator.build_stock),
        ):
            artifact: Artifact | None = None
            for split in _SPLITS:
                found = self._folder.evaluation(name, split)
                if found is None:
                    try:
                        artifact = artifact or build()
                    except ExportError:
                        if name == ORIGINAL:
                            raise
                        # The stock tool's failure is its own: the search goes on without it.
                        break
                    found = self._evaluator.measure(
                        name, Plan(), artifact, split, final=True
                    )
                    self._folder.save_evaluation(found)
                (self._references if split == "search" else self._judged).append(found)
                self._progress.advance()
            self._note_time()

    def _try_plans(self) -> None:
        budget = self._budget
        self._progress.stage("search", budget.trials, limit_s=budget.remaining_s)
        self._progress.advance(self._study.finished)
        while budget.allows_trial(self._study.finished, self._reserve_s()):
            proposal = self._study.propose()
            if proposal is None:
                break
            self._folder.save_plan(proposal.plan)
            try:
                self._study.succeed(proposal, self._evaluator.evaluate(proposal.plan))
            except AutocompressError as reason:
                self._study.fail(proposal, str(reason))
            self._note_time()
            self._progress.advance()
            self._show()

    def _judge(self) -> Front:
        """Measure the front's members again and take their metric on the test split."""
        finalists = choose_finalists(
            self._study.evaluations,
            self._references[0],
            self._objectives,
            self._prepared.experiment.search.finalists,
        )
        self._progress.stage("judge finalists", len(finalists))
        for finalist in finalists:
            found = self._folder.evaluation(finalist.candidate, "test")
            remaining = self._budget.remaining_s
            if found is None and remaining is not None and remaining < self._one_final_s():
                if any(e.candidate != ORIGINAL and e.plan for e in self._judged):
                    continue
            if found is None:
                try:
                    found = self._judge_one(finalist)
                except AutocompressError:
                    # A finalist that fails now stays a candidate with its search figures.
                    continue
                self._folder.save_evaluation(found)
                self._note_time()
            self._judged.append(found)
            self._progress.advance()
        return self._show()

    def _judge_one(self, finalist: Evaluation) -> Evaluation:
        plan = read_plan(finalist.plan)
        path = self._folder.path / finalist.artifact
        kept = Artifact(path, finalist.details, {})
        artifact = kept if path.is_file() else self._evaluator.build(plan)
        return self._evaluator.measure(finalist.candidate, plan, artifact, "test", final=True)

    def _one_final_s(self) -> float:
        """About how long one finalist takes, from the reference points' own final judging."""
        seconds = [sum(e.seconds.values()) for e in self._judged if e.candidate in _REFERENCES]
        return _RESERVE_MARGIN * min(seconds)

    def _reserve_s(self) -> float:
        front = self._prepared.experiment.search.finalists
        return front * self._one_final_s()

    def _note_time(self) -> None:
        self._folder.save_seconds_spent(self._budget.spent_s)

    def _show(self) -> Front:
        searched = [*self._references, *self._study.evaluations]
        front = build_front(self._folder.path, self._objectives, searched, self._judged)
        if self._study.evaluations:
            front.save()
            self._progress.show_front(front.table())
        return front


_SPLITS: tuple[SplitName, ...] = ("search", "test")
_REFERENCES = (ORIGINAL, STOCK_INT8)
