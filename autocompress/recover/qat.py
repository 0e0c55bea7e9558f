"""Quantization-aware training: a quantized network trained with its rounding in the forward pass.

Batch norms stay layers of their own: a grid with one step per output channel keeps its integers
when a norm is folded, since its steps are multiplied by the norm's factors.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from autocompress.bank.store import tensors_hash
from autocompress.errors import PlanError, WorkloadError
from autocompress.recover.distillation import LabelLoss
from autocompress.recover.frozen import frozen_weights
from autocompress.recover.quantizers import (
    FLOAT_BITS,
    GradientRounding,
    fake_quantized,
    integer_weight,
    quantized_layers,
)
from autocompress.recover.recovery import (
    RETRAIN_TEMPERATURE,
    RecoveryContext,
    recovery_settings,
    response_loss,
    training_identity,
    with_fitting_steps,
)
from autocompress.recover.schedule import derived_seed
from autocompress.recover.training import train
from autocompress.recover.training_types import (
    Inputs,
    Loss,
    TrainingReport,
    TrainingSettings,
)
from autocompress.techniques.qat import Qat
from autocompress.workload import Split

# In the last part the weights learn to live with the norms' statistics that will be folded.
_NORMS_FROZEN_FROM = 0.7


def train_quantized(
    network: nn.Module,
    teacher: nn.Module,
    split: Split,
    decision: Qat,
    context: RecoveryContext,
    calibration: Inputs,
) -> TrainingReport:
    """Train a quantized network in place; it is left in evaluation mode and in the same form.

    Its weights are then on the grids of the trained `weight_scale`. Layers with static integer
    inputs have the buffers `input_scale` (float32) and `input_zero_point` (int32), both of shape
    () and not persistent: the grid of their inputs. The weights with the least loss on held-out
    samples are kept, those from before included.

    Args:
        network: after quantization, all modules in evaluation mode.
        teacher: the original, in evaluation mode; not changed.
        split: its targets may be None if the decision distils.
        calibration: inputs from which the first ranges are taken.

    Raises:
        PlanError: no layer is quantized, or the training diverged.
        WorkloadError: there are no targets to learn from, or targets or outputs do not fit.
        OutOfTimeError: `context.stop` said so.
    """
    network.eval()
    layers = quantized_layers(network)
    if not layers:
        raise PlanError(
            "No layer of the network is quantized, so there is nothing to train by 'qat'.",
            given="layers in floating point only",
            allowed="a plan with integer weights or inputs for some layer",
            advice="add a `precision` step to the plan, or recover by `recover`",
        )
    loss = _make_loss(teacher, split, decision, context)
    settings = _settings(network, len(split), decision, context)
    identity = _identity(network, teacher, split, calibration, (decision, context))
    if decision.epochs == 0:
        return train(network, split, loss, settings)
    gradients = GradientRounding(decision.gradient_bits, next(network.parameters()).device)

    def reseed(step: int, steps: int) -> None:
        gradients.generator.manual_seed(derived_seed(context.seed, "gradients", step))

    surroundings = replace(context.surroundings(identity), before_step=reseed)
    with (
        frozen_weights(network, "codebook_weight"),
        fake_quantized(network, calibration, gradients, context.padding),
    ):
        # Within, since the rounding of the inputs is part of the distance.
        settings = with_fitting_steps(settings, (network, teacher), split, context)
        return train(network, split, loss, settings, surroundings)


def _make_loss(teacher: nn.Module, split: Split, decision: Qat, context: RecoveryContext) -> Loss:
    if decision.distil:
        return response_loss(teacher, split, decision.epochs, RETRAIN_TEMPERATURE, context)
    if split.targets is None:
        raise WorkloadError(
            "Quantization-aware training on labels needs targets, but the train split has none.",
            given="distil false",
            allowed="distil true, which learns the original network's outputs",
            advice="set distil to true, or give the train split targets",
        )
    return LabelLoss()


def _settings(
    network: nn.Module, samples: int, decision: Qat, context: RecoveryContext
) -> TrainingSettings:
    layers = quantized_layers(network).values()
    fine = any(8 < integer_weight(layer).activation_bits < FLOAT_BITS for layer in layers)
    pace = (decision.epochs, decision.learning_rate)
    return replace(
        recovery_settings(network, samples, pace, context),
        patience=None,
        norms_frozen_from=_NORMS_FROZEN_FROM,
        # A bf16 number has 8 bits of precision: it cannot tell a finer grid's levels apart.
        bf16=False if fine else context.bf16,
    )


def _identity(
    network: nn.Module,
    teacher: nn.Module,
    split: Split,
    calibration: Inputs,
    how: tuple[Qat, RecoveryContext],
) -> str:
    decision, context = how
    if context.folder is None:
        return ""
    layers = quantized_layers(network)
    buffers = tuple(b for layer in layers.values() for b in layer.buffers())
    return training_identity(
        (network, teacher),
        split,
        "qat",
        {name: repr(integer_weight(layer)) for name, layer in layers.items()},
        tensors_hash(buffers),
        tensors_hash(calibration),
        decision.model_dump(mode="json"),
        context.class_scores,
        *context.padding.key,
    )
