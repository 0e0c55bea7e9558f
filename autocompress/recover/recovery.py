"""Recovery of a compressed network by training, as a `Recover` decision says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final
from weakref import WeakKeyDictionary

from torch import nn

from autocompress.bank.store import make_key, network_hash, tensors_hash
from autocompress.errors import WorkloadError
from autocompress.recover.distillation import LabelLoss, ResponseLoss, ResponseTerm
from autocompress.recover.features import Adapters, FeatureLoss, find_maps
from autocompress.recover.optimization import manner_of
from autocompress.recover.step_size import rate_share
from autocompress.recover.teacher import Teacher, TeacherOutputs, chunks_in_order_of_use
from autocompress.recover.training import step_count, train
from autocompress.recover.training_types import (
    Loss,
    TrainingContext,
    TrainingReport,
    TrainingSettings,
)
from autocompress.techniques.recovery import Recover, cycle_epochs
from autocompress.workload import NO_PADDING, Padding, Split

# Held out is this share of the samples, but no more than so many.
_HOLDOUT_SHARE = 0.1
_HOLDOUT = 1000
# Under a cosine the loss falls late: an early stop waits for a good part of the training.
_PATIENCE_SHARE = 0.4
_LEAST_PATIENCE = 5
# Samples on which network and teacher are compared before a training.
_COMPARED = 128
# Of the distillation into weights that are quantized already.
RETRAIN_TEMPERATURE = 4.0
# Splits are frozen, and hashing hundreds of megabytes takes longer than stitching a network.
_split_hashes: WeakKeyDictionary[Split, str] = WeakKeyDictionary()


@final
@dataclass(frozen=True)
class RecoveryContext:
    """What surrounds a recovery.

    Attributes:
        class_scores: the first output is class scores along axis 1, as the metrics `accuracy` and
            `agreement` need it; False where the metric is the user's own.
        folder: for checkpoints; None keeps none. The same recovery of the same network goes on
            there, or returns at once if it had ended.
        advance: called after every step.
        cycle: which of the decision's training cycles this is, from 0.
        stop: asked after every step; where it says so, the training writes its checkpoint and
            raises `OutOfTimeError`.
        teacher_outputs: the teacher's on the train split, computed once for all trainings; None
            computes them anew.
        padding: of the train split's inputs, which is left out.
    """

    seed: int = 0
    folder: Path | None = None
    advance: Callable[[], None] = lambda: None
    class_scores: bool = True
    bf16: bool | Literal["auto"] = "auto"
    cycle: int = 0
    stop: Callable[[], bool] = lambda: False
    teacher_outputs: TeacherOutputs | None = None
    padding: Padding = NO_PADDING

    def surroundings(self, identity: str) -> TrainingContext:
        """The context of a training that the identity tells from others."""
        return TrainingContext(
            self.folder, identity, self.advance, stop=self.stop, padding=self.padding
        )


def recover_network(
    network: nn.Module,
    teacher: nn.Module,
    split: Split,
    decision: Recover,
    context: RecoveryContext | None = None,
) -> TrainingReport:
    """Train a compressed network in place for one cycle; it is left in evaluation mode.

    The weights with the least loss on held-out samples are kept, those from before included. The
    decision's `pruning_rounds` (see `gradual`) and `cycles` are the caller's: a later cycle gets
    the network that the one before it left.

    Args:
        network: compressed, all modules in evaluation mode.
        teacher: the original, in evaluation mode; not changed.
        split: its targets may be None, except to fine-tune.

    Raises:
        WorkloadError: there are no targets to fine-tune on, or targets or outputs do not fit.
        PlanError: the training diverged, or there are no maps for a distillation of features.
        OutOfTimeError: `context.stop` said so.
    """
    context = context or RecoveryContext()
    network.eval()
    settings = cycle_settings(network, len(split), decision, context)
    settings = with_fitting_steps(settings, (network, teacher), split, context)
    loss = make_loss(network, teacher, split, decision, context)
    identity = ""
    if context.folder is not None:
        how = decision.model_dump(mode="json", exclude={"pruning_rounds", "cycles"})
        identity = training_identity(
            (network, teacher), split, how, context.class_scores, *context.padding.key
        )
    return train(network, split, loss, settings, context.surroundings(identity))


def training_identity(networks: tuple[nn.Module, ...], split: Split, *how: object) -> str:
    """What tells a training of some networks on some data from others.

    Args:
        networks: with all that a `state_dict` holds of them; buffers that it leaves out belong
            into `how`.
        how: whatever else the training depends on; JSON-like.
    """
    if split not in _split_hashes:
        targets = () if split.targets is None else (split.targets,)
        _split_hashes[split] = tensors_hash((*split.inputs, *targets))
    return make_key(*map(network_hash, networks), _split_hashes[split], *how)


def make_loss(
    network: nn.Module,
    teacher: nn.Module,
    split: Split,
    decision: Recover,
    context: RecoveryContext,
) -> Loss:
    """The loss of a decision's method.

    Raises:
        WorkloadError: there are no targets to fine-tune on.
        PlanError: there are no maps for a distillation of features.
    """
    if decision.method == "fine_tune":
        if split.targets is None:
            raise WorkloadError(
                "Fine-tuning needs targets, but the train split has none.",
                given="method fine_tune",
                allowed="response, feature, response_feature",
                advice="choose a method without labels, or give the train split targets",
            )
        return LabelLoss()
    if decision.method == "response":
        return response_loss(
            teacher, split, cycle_epochs(decision, context.cycle), decision.temperature, context
        )
    response = ResponseTerm(decision.temperature, context.class_scores)
    maps = find_maps(network, teacher, split.subset(2).inputs)
    return FeatureLoss(
        teacher=Teacher(teacher),
        maps=maps,
        extra=Adapters(maps, context.seed),
        response=response if decision.method == "response_feature" else None,
        class_scores=context.class_scores,
    )


def response_loss(
    teacher: nn.Module, split: Split, epochs: float, temperature: float, context: RecoveryContext
) -> ResponseLoss:
    """The distillation of the teacher's outputs."""
    shared = context.teacher_outputs
    # Up to one epoch few samples come up twice, so there is nothing to be gained.
    if shared is None and epochs > 1:
        shared = find_teacher_outputs(teacher, split, context)
    response = ResponseTerm(temperature, context.class_scores)
    return ResponseLoss(Teacher(teacher, shared), response)


def find_teacher_outputs(
    teacher: nn.Module, split: Split, context: RecoveryContext, folder: Path | None = None
) -> TeacherOutputs:
    """The teacher's outputs on a train split, to be computed as trainings ask for them.

    Args:
        folder: keeps them in a file; None only in memory.
    """
    chunks = chunks_in_order_of_use(len(split), held_out(len(split)), context.seed)
    return TeacherOutputs(teacher, split.inputs, chunks, folder, context.bf16, context.padding)


def cycle_settings(
    network: nn.Module, samples: int, decision: Recover, context: RecoveryContext
) -> TrainingSettings:
    """The settings of the context's cycle of a decision."""
    epochs = cycle_epochs(decision, context.cycle)
    before = sum(cycle_epochs(decision, number) for number in range(context.cycle))
    settings = recovery_settings(network, samples, (epochs, decision.learning_rate), context)
    return replace(settings, epochs_before=before)


def recovery_settings(
    network: nn.Module, samples: int, pace: tuple[float, float], context: RecoveryContext
) -> TrainingSettings:
    """The settings for a network and a train split of so many samples, some of them held out.

    Args:
        pace: a decision's epochs and learning rate.
    """
    holdout, manner = held_out(samples), manner_of(network)
    epochs, learning_rate = pace
    patience = max(_LEAST_PATIENCE, round(_PATIENCE_SHARE * epochs))
    return TrainingSettings(
        epochs=epochs,
        learning_rate=learning_rate * manner.rate,
        batch_size=manner.batch_size,
        optimizer=manner.optimizer,
        weight_decay=manner.weight_decay,
        holdout=holdout,
        patience=patience if holdout else None,
        bf16=context.bf16,
        seed=context.seed,
    )


def with_fitting_steps(
    settings: TrainingSettings,
    networks: tuple[nn.Module, nn.Module],
    split: Split,
    context: RecoveryContext,
) -> TrainingSettings:
    """Settings with a learning rate that suits the distance between network and teacher."""
    if settings.optimizer != "adamw" or settings.epochs == 0:
        return settings
    network, teacher = networks
    device = next(network.parameters()).device
    inputs = context.padding.cut(split.subset(_COMPARED).inputs)
    share = rate_share(network, teacher, tuple(x.to(device) for x in inputs))
    return replace(settings, learning_rate=settings.learning_rate * share)


def step_count_of(network: nn.Module, samples: int, epochs: float) -> int:
    """Steps of any recovery of so many epochs on a split of so many samples, no early stop."""
    settings = recovery_settings(network, samples, (epochs, 1.0), RecoveryContext())
    return step_count(samples, settings)


def held_out(samples: int) -> int:
    """How many of a split's samples only judge."""
    return min(_HOLDOUT, int(_HOLDOUT_SHARE * samples))
