"""The trainings of one workload's candidates: kept, resumed, watched, and timed."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file, save
from torch import nn

from autocompress.bank import Bank, Stitched, apply_stage, stitch
from autocompress.errors import PlanError
from autocompress.files import write_whole
from autocompress.graph.layers import observe_layers
from autocompress.plan import Plan, Step
from autocompress.recover.checkpoint import restore, tensors_of
from autocompress.recover.codebook_tuning import tune_codebooks
from autocompress.recover.gradual import gradual
from autocompress.recover.normalization import BatchNormRepair
from autocompress.recover.pace import Pace
from autocompress.recover.qat import train_quantized
from autocompress.recover.recovery import (
    RecoveryContext,
    find_teacher_outputs,
    recover_network,
    step_count_of,
    training_identity,
)
from autocompress.recover.teacher import TeacherOutputs
from autocompress.recover.training_types import TrainingReport
from autocompress.techniques import Stage, technique_of
from autocompress.techniques.codebook_tuning import TuneCodebooks
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover, cycle_epochs
from autocompress.techniques.weight_prune import WeightPrune, eased
from autocompress.workload import Split, Workload

# Times the body of a `with` statement under a name.
Timed = Callable[[str], AbstractContextManager[None]]


@final
@dataclass(frozen=True)
class Watch:
    """How a caller follows trainings, and ends them in time.

    Attributes:
        stop: asked after every step; where it says so, the training writes its checkpoint and
            raises `OutOfTimeError`. A later call for the same plan goes on from there.
        advance: called after every step, also for those that a resumed training has behind it.
    """

    stop: Callable[[], bool] = lambda: False
    advance: Callable[[], None] = lambda: None


@final
class Trainer:
    """Trains candidates, on a GPU if there is one; what was trained once is read from then on.

    Args:
        bank: calibrated.
        repair: of the bank's network.
        workload: whose train split the trainings see.
        folder: gets trained networks, checkpoints and the original network's outputs.
    """

    def __init__(
        self, bank: Bank, repair: BatchNormRepair, workload: Workload, folder: Path
    ) -> None:
        self._bank, self._repair, self._workload = bank, repair, workload
        self._folder = folder
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._teacher = bank.network
        if self._device.type != "cpu":
            self._teacher = copy.deepcopy(bank.network).to(self._device)
        self._pace = Pace()
        self._outputs: TeacherOutputs | None = None

    def recover(self, stitched: Stitched, plan: Plan, timed: Timed, watch: Watch) -> None:
        """Repair and train a stitched network in place, as a plan's `Recover` step says.

        A plan of several cycles goes on from what the same plan with fewer ended with.

        Args:
            plan: up to its training.

        Raises:
            PlanError: there is no train split, or the training diverged.
            OutOfTimeError: `watch.stop` said so.
        """
        network, decision = stitched.network, recovery_of(plan)
        assert decision is not None
        files = self._kept_files(network, plan, decision)
        done = _cycles_done(files)
        if done:
            # Masks too: pruning in rounds leaves others than pruning at once.
            restore(load_file(files[done - 1]), network)
        else:
            with timed("repair"):
                self._repair(network, stitched.kept_channels)
        for cycle in range(done, decision.cycles):
            part = _with_cycles(plan, decision, cycle + 1)
            with timed("recover"):
                trained = self._train_cycle(stitched, part, cycle, watch)
            state = {name: x.contiguous() for name, x in tensors_of(trained).items()}
            write_whole(files[cycle], save(state))
            # Of pruning in rounds another network comes out; the next cycle starts as from disk.
            restore(state, network)
            self.forget_checkpoints(part)

    def retrain(self, network: nn.Module, plan: Plan, timed: Timed, watch: Watch) -> None:
        """Train a network after its quantization, in place, where the plan says so.

        Raises:
            PlanError: there is no train split, or the training diverged.
            OutOfTimeError: `watch.stop` said so.
        """
        teacher, calibration = self._teacher, self._workload.calibration.inputs
        for step in _retrainings(plan):
            kind, decision = step.decision.technique, step.decision
            context = self._context(plan.hash, watch)
            with timed(kind), self._noting(kind, network) as note, self._moved(network):
                if isinstance(decision, Qat):
                    note(
                        train_quantized(
                            network, teacher, self._train, decision, context, calibration
                        )
                    )
                elif isinstance(decision, TuneCodebooks):
                    note(tune_codebooks(network, teacher, self._train, decision, context))

    def seconds(self, network: nn.Module, plan: Plan) -> float | None:
        """An estimate of how long the trainings of a plan will take, early stops left out.

        By the steps per second of earlier trainings in this process, of the same kind if there
        were any, scaled by multiply-accumulates. What is on disk takes no time; checkpoints and
        the teacher's first pass are not counted.

        Args:
            network: stitched by the plan; as long as it is not trained.

        Returns:
            0 where there is nothing to train; None before any training.

        Raises:
            PlanError: the plan trains, and there is no train split.
        """
        macs = self._macs(network)
        parts = [
            self._pace.seconds(kind, macs, steps) for kind, steps in self._steps_left(network, plan)
        ]
        return None if None in parts else sum(part for part in parts if part is not None)

    def files(self, network: nn.Module, plan: Plan) -> list[Path]:
        """Where what each cycle of a plan's recovery ends with is kept; not all need be there.

        Args:
            network: stitched by the plan; as long as it is not trained.
        """
        decision = recovery_of(plan)
        return [] if decision is None else self._kept_files(network, plan, decision)

    def forget_checkpoints(self, plan: Plan) -> None:
        """Remove what a finished plan's trainings would have gone on from."""
        for checkpoint in self._folder.glob(f"{plan.hash}*.checkpoint"):
            shutil.rmtree(checkpoint)

    def _steps_left(self, network: nn.Module, plan: Plan) -> Iterator[tuple[str, int]]:
        decision = recovery_of(plan)
        if decision is not None:
            shape = _until_recovery(plan)
            done = _cycles_done(self._kept_files(network, shape, decision))
            samples = len(self._train)
            steps = sum(
                step_count_of(network, samples, cycle_epochs(decision, cycle))
                for cycle in range(done, decision.cycles)
            )
            yield _kind(decision), steps
        for step in _retrainings(plan):
            epochs = step.decision.model_dump()["epochs"]
            yield step.decision.technique, step_count_of(network, len(self._train), epochs)

    def _train_cycle(self, stitched: Stitched, plan: Plan, cycle: int, watch: Watch) -> nn.Module:
        """Train in place, or prune and train in rounds where the plan removes single weights."""
        decision = recovery_of(plan)
        assert decision is not None
        sparse = plan.of(WeightPrune.technique)
        rounds = decision.pruning_rounds
        if cycle > 0 or rounds == 1 or not sparse:
            context = self._context(plan.hash, watch, cycle)
            self._recover_once(stitched.network, decision, context)
            return stitched.network
        dense = stitch(self._bank, _without(plan, WeightPrune.technique))
        self._repair(dense.network, dense.kept_channels)

        def prune(network: nn.Module, share: float) -> None:
            steps = tuple(
                Step(target, eased(d, share))
                for target, d in sparse.items()
                if isinstance(d, WeightPrune)
            )
            apply_stage(self._bank, dense, Plan(steps), Stage.SPARSIFY)

        def train(network: nn.Module, number: int) -> None:
            part = decision.model_copy(update={"epochs": decision.epochs / rounds})
            self._recover_once(network, part, self._context(f"{plan.hash}-{number}", watch))

        gradual(dense.network, prune, rounds, train)
        return dense.network

    def _recover_once(
        self, network: nn.Module, decision: Recover, context: RecoveryContext
    ) -> None:
        with self._noting(_kind(decision), network) as note, self._moved(network):
            note(recover_network(network, self._teacher, self._train, decision, context))

    @contextmanager
    def _moved(self, network: nn.Module) -> Iterator[None]:
        """A network on the device that trains, and afterwards back where files are made of it."""
        network.to(self._device)
        try:
            yield
        finally:
            network.to("cpu")

    @contextmanager
    def _noting(self, kind: str, network: nn.Module) -> Iterator[Callable[[TrainingReport], None]]:
        """Keep the teacher's outputs however a training ends, and its pace if it ended well."""
        macs, shared = self._macs(network), self._teacher_outputs()
        teaching = shared.seconds

        def note(report: TrainingReport) -> None:
            own = report.seconds - (shared.seconds - teaching)
            self._pace.note(kind, macs, report.steps, own)

        try:
            yield note
        finally:
            shared.keep()

    def _kept_files(self, network: nn.Module, plan: Plan, decision: Recover) -> list[Path]:
        """Where each cycle's result of training a network from its present state is kept."""
        networks, key = (network, self._bank.network), self._workload.padding.key
        identity = training_identity(networks, self._train, *key)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        plans = [_with_cycles(plan, decision, n + 1) for n in range(decision.cycles)]
        return [self._folder / f"{each.hash}-{digest}.safetensors" for each in plans]

    def _context(self, name: str, watch: Watch, cycle: int = 0) -> RecoveryContext:
        return RecoveryContext(
            folder=self._folder / f"{name}.checkpoint",
            advance=watch.advance,
            class_scores=self._workload.class_scores,
            cycle=cycle,
            stop=watch.stop,
            teacher_outputs=self._teacher_outputs(),
            padding=self._workload.padding,
        )

    def _teacher_outputs(self) -> TeacherOutputs:
        if self._outputs is None:
            self._outputs = find_teacher_outputs(
                self._teacher,
                self._train,
                RecoveryContext(padding=self._workload.padding),
                self._folder,
            )
        return self._outputs

    def _macs(self, network: nn.Module) -> int:
        layers = observe_layers(network, self._workload.example_inputs)
        return sum(layer.macs for layer in layers)

    @property
    def _train(self) -> Split:
        if self._workload.train is None:
            raise PlanError(
                "A plan trains, and the workload has no train split.",
                advice="give Workload(train=Split(inputs, targets)); distillation needs no targets",
            )
        return self._workload.train


def recovery_of(plan: Plan) -> Recover | None:
    """How a plan trains before quantization; None if it does not."""
    found = [d for d in plan.of(Recover.technique).values() if isinstance(d, Recover)]
    return found[0] if found and found[0].epochs > 0 else None


def _kind(decision: Recover) -> str:
    return f"{decision.technique} {decision.method}"


def _retrainings(plan: Plan) -> list[Step]:
    return [
        step
        for step in plan.steps
        if isinstance(step.decision, (Qat, TuneCodebooks)) and step.decision.epochs > 0
    ]


def _cycles_done(files: Sequence[Path]) -> int:
    return max((n for n, file in enumerate(files, 1) if file.is_file()), default=0)


def _with_cycles(plan: Plan, decision: Recover, cycles: int) -> Plan:
    changed = decision.model_copy(update={"cycles": cycles})
    return Plan(tuple(Step(s.target, changed) if s.decision == decision else s for s in plan.steps))


def _until_recovery(plan: Plan) -> Plan:
    return Plan(tuple(s for s in plan.steps if technique_of(s.decision).stage <= Stage.RECOVER))


def _without(plan: Plan, technique: str) -> Plan:
    return Plan(tuple(s for s in plan.steps if s.decision.technique != technique))
