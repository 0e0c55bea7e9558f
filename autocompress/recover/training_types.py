"""What a training is given and what it reports: settings, batch, loss, context, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, final

import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError
from autocompress.workload import NO_PADDING, Padding

Inputs = tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained; equal settings give equal weights on one machine.

    Attributes:
        epochs: 0.5 is half an epoch; 0 leaves the network as it is.
        learning_rate: the peak, after the warm-up and before the cosine.
        weight_decay: of tensors with two or more dimensions; norms and biases have none.
        momentum: Nesterov's, of SGD; AdamW has its own constants.
        warmup_share: share of the steps in which the learning rate rises.
        clip_norm: largest norm of the whole gradient; None clips nothing.
        holdout: samples, drawn at random, that only judge: the weights of the epoch with the least
            loss on them are kept, those from before the training included; 0 keeps the last.
        patience: epochs without a lower held-out loss after which the training stops; None never.
        norms_frozen_from: share of the steps after which batch norms keep their statistics; 1
            never, 0 always.
        bf16: autocast to bf16; "auto" where the device has bf16 arithmetic (`bf16_pays`), which is
            the same in every call on one machine but may differ between machines.
        epochs_before: of earlier trainings of the same network: the order of samples and the random
            numbers go on from there, and the held-out samples stay the same.
    """

    epochs: float
    learning_rate: float
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup_share: float = 0.05
    clip_norm: float | None = 5.0
    holdout: int = 0
    patience: int | None = None
    norms_frozen_from: float = 1.0
    bf16: bool | Literal["auto"] = "auto"
    seed: int = 0
    epochs_before: float = 0.0

    def __post_init__(self) -> None:
        patience = self.patience
        if patience is not None and (self.holdout < 1 or patience < 1):
            raise ConfigError(
                "A training can stop early only if samples are held out.",
                given=f"patience {patience}, holdout {self.holdout}",
                allowed="patience and holdout of 1 or more, or patience None",
            )


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss sees of the data.

    Attributes:
        inputs: one tensor per network input, each of shape (batch, ...).
        targets: shape (batch, ...), or None.
        samples: the samples' numbers in the split, shape (batch,), int64, on the CPU; None where
            the inputs are augmented, so that nothing of them may be remembered.
    """

    inputs: Inputs
    targets: Tensor | None
    samples: Tensor | None


class Loss(Protocol):
    """What is minimised."""

    @property
    def extra(self) -> nn.Module:
        """Holds what is trained beside the network (adapters); an empty module if nothing."""
        ...

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """Run the network on the batch; a scalar of shape (), the mean over the batch.

        Called under autocast where the training uses bf16, so losses convert outputs to float32.
        """
        ...


@final
@dataclass(frozen=True)
class TrainingContext:
    """What surrounds a training without being one of its settings.

    Attributes:
        folder: for checkpoints, after every epoch and every minute; None keeps none. A call with
            the same settings and identity goes on where the last one was killed, or returns at
            once what it ended with.
        identity: must differ between trainings that differ in network, data or loss.
        advance: called after every step, also for those that a resumed training has behind it.
        before_step: called with a step's number, from 0, and the number of all steps; whatever it
            changes in the network must follow from these two alone.
        augment: changes inputs by random numbers of the given generator only.
        stop: asked after every step; where it says so, the training writes its checkpoint and
            raises `OutOfTimeError`.
        padding: of the inputs, which is left out; samples of about the same length share a batch.
    """

    folder: Path | None = None
    identity: str = ""
    advance: Callable[[], None] = lambda: None
    before_step: Callable[[int, int], None] = lambda step, steps: None
    augment: Callable[[Inputs, torch.Generator], Inputs] | None = None
    stop: Callable[[], bool] = lambda: False
    padding: Padding = NO_PADDING


@final
@dataclass(frozen=True)
class TrainingReport:
    """How a training went.

    Attributes:
        seconds: all calls together, if it was resumed.
        train_losses: mean over each epoch's steps.
        held_out_losses: before the training and after each epoch; empty without held-out samples.
        best_epoch: whose weights the network has; 0 those from before the training.
    """

    steps: int
    seconds: float
    train_losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    best_epoch: int
    stopped_early: bool
    bf16: bool
