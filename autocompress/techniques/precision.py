"""Mixed precision: integer weights and activations for single layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.technique import LayerProblem, LayerTechnique, Stage, Variant

# Shares of a channel's largest weight that are tried as the largest representable one.
_CLIP_RATIOS = torch.linspace(0.80, 1.0, 21)


@final
class Precision(Decision):
    """Run a layer with integer weights (one scale per output channel) and activations."""

    technique: ClassVar[str] = "precision"
    weight_bits: Literal[8]
    activation_bits: Literal[8]


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Widths for which the device has a kernel for the layer's operator."""
    operators = ("Conv",) if layer.kind == "conv" else ("Gemm", "MatMul")
    listed = [set(device.kernels[name]) for name in operators if name in device.kernels]
    widths = set.intersection(*listed) if listed else set[int]()
    return tuple(
        d for d in offered
        if isinstance(d, Precision) and {d.weight_bits, d.activation_bits} <= widths
    )  # fmt: skip


def symmetric_scale(weight: Tensor, bits: int) -> Tensor:
    """Scales with the least squared rounding error, shape (out,), by grid search per row.

    Args:
        weight: shape (out, in).
        bits: integers run from -(2^(bits-1) - 1) to 2^(bits-1) - 1.
    """
    largest = 2.0 ** (bits - 1) - 1
    peak = weight.abs().amax(1).clamp(min=1e-12)
    best_error = torch.full_like(peak, torch.inf)
    best = peak / largest
    for ratio in _CLIP_RATIOS:
        scale = peak * ratio / largest
        error = (round_to_grid(weight, scale, bits) - weight).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best


def round_to_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest representable weights; weight (out, ...), scale (out,)."""
    largest = 2.0 ** (bits - 1) - 1
    steps = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    return (weight / steps).round().clamp(-largest, largest) * steps


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    assert isinstance(decision, Precision)
    return {"scale": symmetric_scale(problem.weight, decision.weight_bits)}


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    """Round the weight to its grid and leave the scale as the buffer `weight_scale`.

    Batch-norm folding multiplies the scale with the weight, so the export finds the same integers.
    """
    assert isinstance(decision, Precision)
    scale = variant["scale"]
    weight = cast(Tensor, module.weight)
    with torch.no_grad():
        weight.copy_(round_to_grid(weight, scale, decision.weight_bits))
    module.register_buffer("weight_scale", scale.clone(), persistent=False)
    return module


PRECISION = LayerTechnique(
    name=Precision.technique,
    decision=Precision,
    stage=Stage.QUANTIZE,
    levels=(),
    choices=_choices,
    solve=_solve,
    install=_install,
)
