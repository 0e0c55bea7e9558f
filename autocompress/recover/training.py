"""The training loop that fine-tuning, distillation and the other recoveries share."""

from __future__ import annotations

import math
import time
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from autocompress.errors import OutOfTimeError, PlanError, WorkloadError
from autocompress.recover.autocast import takes_bf16
from autocompress.recover.checkpoint import (
    CheckpointFile,
    TrainingState,
    copy_of,
    restore,
    tensors_of,
)
from autocompress.recover.layout import channels_last, takes_channels_last
from autocompress.recover.optimization import freeze_norms, make_optimizer, masked_weights
from autocompress.recover.schedule import (
    derived_generator,
    derived_seed,
    epoch_batches,
    learning_rate_share,
    split_off,
)
from autocompress.recover.training_types import (
    Batch,
    Inputs,
    Loss,
    TrainingContext,
    TrainingReport,
    TrainingSettings,
)
from autocompress.workload import Split

__all__ = [
    "Batch",
    "Inputs",
    "Loss",
    "TrainingContext",
    "TrainingReport",
    "TrainingSettings",
    "train",
]

_CHECKPOINT_EVERY_S = 60.0


def train(
    network: nn.Module,
    split: Split,
    loss: Loss,
    settings: TrainingSettings,
    context: TrainingContext | None = None,
) -> TrainingReport:
    """Train a network in place; it is left in evaluation mode.

    Weights at which a layer's bool buffer `weight_mask` (shape of the weight, not persistent) is
    False stay zero. The global random state is left as it was.

    Raises:
        WorkloadError: the split has too few samples, or nothing of the network can be trained.
        PlanError: the loss is not finite.
        OutOfTimeError: `context.stop` said so; the checkpoint is written.
        RunFolderError: the checkpoint is of another network.
    """
    if settings.epochs == 0:
        network.eval()
        return TrainingReport(0, 0.0, (), (), 0, False, False)
    loop = _Loop(network, split, loss, settings, context or TrainingContext())
    try:
        with torch.random.fork_rng():
            return loop.run()
    finally:
        network.eval()
        network.zero_grad(set_to_none=True)


@final
class _Loop:
    """One training under way."""

    def __init__(
        self,
        network: nn.Module,
        split: Split,
        loss: Loss,
        settings: TrainingSettings,
        context: TrainingContext,
    ) -> None:
        if len(split) <= settings.holdout:
            raise WorkloadError(
                "The train split has no samples left to train on.",
                given=f"{len(split)} samples, {settings.holdout} of them held out",
                advice="give more samples as `train`",
            )
        self._network, self._split, self._loss = network, split, loss
        self._settings, self._context = settings, context
        self._modules = (network, loss.extra)
        self._parameters = [p for m in self._modules for p in m.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._parameters, settings)
        self._masked = masked_weights(network)
        self._device = self._parameters[0].device
        self._samples, held_out = split_off(len(split), settings.holdout, settings.seed)
        lengths = context.padding.lengths(split.inputs)
        self._lengths = lengths if context.padding.axes else None
        self._held_out = held_out[lengths[held_out].argsort(stable=True)]
        self._per_epoch = _steps_per_epoch(len(split), settings)
        self._steps = step_count(len(split), settings)
        self._order: tuple[int, tuple[Tensor, ...]] = (-1, ())
        self._first_step = round(settings.epochs_before * self._per_epoch)
        self._channels_last = False
        self._file = CheckpointFile(
            context.folder, context.identity, repr(settings), str(len(split))
        )
        bf16 = takes_bf16(network, split.inputs) if settings.bf16 == "auto" else settings.bf16
        self._state = TrainingState(bf16)
        self._saved_at = self._counted_at = time.monotonic()

    def run(self) -> TrainingReport:
        """Go through the epochs, from the start or from a checkpoint."""
        state = self._state = self._resume()
        self._channels_last = not state.finished and self._tries_channels_last()
        while not state.finished:
            # Not from the step: a training may have been stopped before the epoch was judged.
            epoch = len(state.train_losses)
            if len(state.held_out_losses) == 0:
                self._judge()
            end = min((epoch + 1) * self._per_epoch, self._steps)
            while state.step < end:
                self._step(self._next_samples())
                self._pause()
            state.train_losses.append(state.loss_sum / (end - epoch * self._per_epoch))
            state.loss_sum = 0.0
            self._judge()
            if state.stopped_early or state.step == self._steps:
                self._finish()
            self._save()
        return self._report()

    def _next_samples(self) -> Tensor:
        """Samples of the step to come; a later training goes on where one before it ended."""
        epoch, position = divmod(self._first_step + self._state.step, self._per_epoch)
        if self._order[0] != epoch:
            settings = self._settings
            self._order = (
                epoch,
                epoch_batches(
                    self._samples, settings.batch_size, settings.seed, epoch, self._lengths
                ),
            )
        return self._order[1][position]

    def _pause(self) -> None:
        """Write a checkpoint if it is time; stop if the caller wants it."""
        stops = self._state.step < self._steps and self._context.stop()
        if stops or time.monotonic() - self._saved_at > _CHECKPOINT_EVERY_S:
            self._save()
        if stops:
            kept = self._context.folder is not None
            raise OutOfTimeError(
                "A training was stopped before its end.",
                given=f"{self._state.step} of {self._steps} steps done",
                advice="run it again with more time: it goes on from its checkpoint"
                if kept
                else "run it again with more time, and give it a folder for its checkpoint",
            )

    def _step(self, samples: Tensor) -> None:
        state, settings = self._state, self._settings
        self._context.before_step(state.step, self._steps)
        self._network.train()
        if state.step >= settings.norms_frozen_from * self._steps:
            freeze_norms(self._network)
        # A seed per step, on every device, so that a resumed training draws what it would have.
        torch.manual_seed(derived_seed(settings.seed, "step", self._first_step + state.step))
        share = learning_rate_share(state.step, self._steps, settings.warmup_share)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        loss = self._evaluate(self._batch(samples, augmented=True))
        value = self._finite(float(loss.detach()))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm is not None:
            clip_grad_norm_(self._parameters, settings.clip_norm)
        self._optimizer.step()
        with torch.no_grad():
            for weight, mask in self._masked:
                weight.mul_(mask)
        state.loss_sum += value
        state.step += 1
        self._context.advance()

    def _evaluate(self, batch: Batch) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._state.bf16):
            return self._loss(self._network, batch).float()

    def _batch(self, samples: Tensor, *, augmented: bool) -> Batch:
        part = self._split.subset(samples)
        inputs, augment = self._context.padding.cut(part.inputs), self._context.augment
        if augmented and augment is not None:
            number = self._first_step + self._state.step
            inputs = augment(inputs, derived_generator(self._settings.seed, "augment", number))
        inputs = tuple(x.to(self._device) for x in inputs)
        return Batch(
            channels_last(inputs) if self._channels_last else inputs,
            None if part.targets is None else part.targets.to(self._device),
            None if augmented and augment is not None else samples,
        )

    def _tries_channels_last(self) -> bool:
        self._network.eval()
        part = self._batch(self._samples[:2], augmented=False)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._state.bf16):
            return takes_channels_last(self._network, part.inputs)

    def _judge(self) -> None:
        """Note the held-out loss after an epoch, and keep the weights if they are the best yet."""
        if len(self._held_out) == 0:
            return
        state, patience = self._state, self._settings.patience
        self._network.eval()
        total = 0.0
        with torch.no_grad():
            for samples in torch.split(self._held_out, self._settings.batch_size):
                loss = self._evaluate(self._batch(samples, augmented=False))
                total += self._finite(float(loss)) * len(samples)
        value = total / len(self._held_out)
        if value < min(state.held_out_losses, default=math.inf):
            state.best = copy_of(tensors_of(*self._modules))
        state.held_out_losses.append(value)
        waited = len(state.held_out_losses) - 1 - _best(state)
        state.stopped_early = patience is not None and waited >= patience

    def _finite(self, value: float) -> float:
        if math.isfinite(value):
            return value
        raise PlanError(
            "The training diverged: its loss is not finite.",
            given=f"loss {value} at step {self._state.step + 1} of {self._steps}, "
            f"learning rate {self._settings.learning_rate}",
            advice="lower the learning rate, or check the inputs for NaN",
        )

    def _resume(self) -> TrainingState:
        saved = self._file.load()
        if saved is None:
            return self._state
        state, tensors = saved
        restore(tensors, *self._modules)
        if state.optimizer is not None:
            self._optimizer.load_state_dict(state.optimizer)
        for _ in range(state.step):
            self._context.advance()
        return state

    def _save(self) -> None:
        now = time.monotonic()
        self._state.seconds += now - self._counted_at
        self._saved_at = self._counted_at = now
        if not self._state.finished:
            self._state.optimizer = self._optimizer.state_dict()
        self._file.save(self._state, tensors_of(*self._modules))

    def _finish(self) -> None:
        state = self._state
        if state.best is not None:
            restore(state.best, *self._modules)
        state.best, state.optimizer, state.finished = None, None, True

    def _report(self) -> TrainingReport:
        state = self._state
        return TrainingReport(
            steps=state.step,
            seconds=state.seconds,
            train_losses=tuple(state.train_losses),
            held_out_losses=tuple(state.held_out_losses),
            best_epoch=_best(state) if state.held_out_losses else len(state.train_losses),
            stopped_early=state.stopped_early,
            bf16=state.bf16,
        )


def step_count(samples: int, settings: TrainingSettings) -> int:
    """Steps of a training on a split of so many samples, if it does not stop early."""
    if settings.epochs == 0:
        return 0
    return max(1, round(settings.epochs * _steps_per_epoch(samples, settings)))


def _steps_per_epoch(samples: int, settings: TrainingSettings) -> int:
    return max((samples - settings.holdout) // settings.batch_size, 1)


def _best(state: TrainingState) -> int:
    return state.held_out_losses.index(min(state.held_out_losses))
