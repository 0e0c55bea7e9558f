"""Integer grids for entropy coding: steps by what an error costs, rounding by what a code costs.

A coder spends few bits on integers that are mostly zero, so not their range counts but their
entropy. At high rates the least loss for so many bits has the same expected loss per weight
everywhere (equal slopes); steps follow the Fisher information. Rounding with feedback weighs the
error against the bits of each candidate, as in the rate-distortion optimised quantization of
DeepCABAC (Wiedemann et al. 2020, section III), but with the data's own moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.codebook import feedback_for
from autocompress.techniques.rounding import (
    Feedback,
    fitted_ratio,
    output_error,
    round_with_feedback,
)
from autocompress.techniques.technique import (
    IntegerWeight,
    LayerGradients,
    LayerProblem,
    LayerStatistics,
    LayerTechnique,
    Stage,
    Variant,
    bias_of,
)

_LARGEST = 127
# Twice the loss in nats, times 12, that rounding a weight at a step of 1 is expected to cost.
_UNIT_LOSS = 1e-6
# Noise in a layer's output, as a share of its energy, that may cost as much: where a network is
# sure of its outputs, gradients vanish, and say nothing of changes that are not small.
_UNIT_NOISE = 0.05
_LEAST_NOISE = 1e-30
# Few samples cannot tell a row without influence from one that was not needed yet.
_SMALLEST_SHARE = 0.02
# Wider steps, as shares of a row's largest weight, would only cost digits.
_WIDEST = 4.0
_SCALE_BITS = 8
# What a bit is worth in squared steps where the error of a uniform grid, step² / 12, is optimal.
_SLOPE = math.log(2) / 6


@final
class EntropyGrid(Decision):
    """Round a layer's weights to integers that take few bits once they are coded.

    Attributes:
        step: of 1 costs an expected 4e-8 nats of the network's log-likelihood per weight or 5 %
            of the energy of the layer's output, or part of both, and that goes with the square; 0
            leaves the layer as it is.
        rate_weight: how much bits count in the rounding; 1 is the slope of the high-rate theory,
            0 rounds to the nearest. Small values are best, since later columns pay for zeros.
    """

    technique: ClassVar[str] = "entropy_grid"
    step: float = Field(ge=0, le=4)
    rate_weight: float = Field(default=0.15, ge=0, le=10)


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Every grid, from the finest to the coarsest."""
    found = [d for d in dict.fromkeys(offered) if isinstance(d, EntropyGrid) and d.step]
    return tuple(sorted(found, key=lambda d: (d.step, d.rate_weight)))


def steps(problem: LayerProblem, feedback: Feedback) -> Tensor:
    """The step of every row for `step` 1, shape (out, 1).

    The loss of a row is half its curvature times the error of its output, e H eᵀ, and rounding
    with feedback leaves `step² / 12` times the mean pivot per weight. A row's curvature is the
    quotient of Fisher information and input power, as in a Kronecker-factored approximation
    (Martens & Grosse 2015), drawn half-way to the layer's, for it is noisy. To it comes one by
    which a share of the output's energy costs as much in all layers: the energy of all rows
    together, or of each row of a grouped convolution, whose outputs differ much in size.
    """
    pivot = feedback.pivots.double().mean()
    energy = output_error(problem.weight, feedback).double()
    if problem.layer.groups == 1:
        energy = energy.mean().expand(len(energy))
    noise = 12 * _UNIT_NOISE * energy / problem.weight.shape[1]
    curvature = _UNIT_LOSS / noise.clamp(min=_LEAST_NOISE)
    if problem.gradients is not None and problem.statistics is not None:
        curvature = curvature + _fisher_curvature(problem.gradients, problem.statistics)
    return (_UNIT_LOSS / (curvature * pivot)).sqrt().float()[:, None]


def _fisher_curvature(gradients: LayerGradients, statistics: LayerStatistics) -> Tensor:
    """Of every row, shape (out,)."""
    fisher = gradients.fisher.double().sum(1)
    curvature = fisher / statistics.moment.diagonal().sum().clamp(min=1e-30)
    layer = curvature.mean().clamp(min=1e-30)
    return ((curvature + _SMALLEST_SHARE * layer) * layer).sqrt()


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    """`weight`, `scale` (out, 1), fitted to the codes, and the mean `shift` (out,) that was lost.

    Pruned weights stay zero.
    """
    assert isinstance(decision, EntropyGrid)
    if not decision.step:
        return {}
    weight = problem.weight
    feedback = feedback_for(problem, 1)
    largest = weight.abs().amax(1, keepdim=True).clamp(min=1e-12)
    scale = decision.step * steps(problem, feedback)
    scale = _short(torch.maximum(torch.minimum(scale, _WIDEST * largest), largest / _LARGEST))
    codes = _codes(problem, scale, feedback, decision.rate_weight * _SLOPE)
    scale = _short(scale * fitted_ratio(weight, scale * codes, feedback))
    shift = torch.zeros(len(weight))
    if problem.statistics is not None:
        shift = ((weight - scale * codes).double() @ problem.statistics.mean).float()
    return {"weight": scale * codes, "scale": scale, "shift": shift}


def _short(scale: Tensor) -> Tensor:
    """Scales of few digits: the others would cost a tenth of a small layer's bytes."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**_SCALE_BITS).round() / 2**_SCALE_BITS, exponent)


def _codes(problem: LayerProblem, scale: Tensor, feedback: Feedback, price: float) -> Tensor:
    """Integers, shape (out, in), with a small sum of squared errors and priced bits.

    A code costs as many bits as the layer's codes take that are rounded without a price. The
    candidates are the nearest integer, the next one towards zero, and zero.

    Args:
        price: of a bit, in squared steps.
    """
    weight, frozen = problem.weight, problem.frozen
    plain = (weight / scale).round().clamp(-_LARGEST, _LARGEST)
    bits = _code_bits(plain[~frozen]) * price
    # An error's own cost is its pivot; but what is fed back enlarges later codes.
    pivots = feedback.factor.diagonal()
    costs = (pivots / pivots.square().mean().sqrt()).tolist()
    alive = (~frozen)[:, feedback.order]
    step = scale[:, 0]

    def rounder(part: slice, target: Tensor, block: Tensor) -> Tensor:
        exact = target[:, 0] / step
        nearest = exact.round().clamp(-_LARGEST, _LARGEST)
        best, cost = nearest, torch.full_like(nearest, torch.inf)
        for code in (nearest, nearest - nearest.sign(), torch.zeros_like(nearest)):
            found = costs[part.start] * (exact - code).square() + bits[code.long() + _LARGEST]
            best = torch.where(found < cost, code, best)
            cost = torch.minimum(found, cost)
        return (best * alive[:, part.start] * step)[:, None]

    return (round_with_feedback(weight, feedback, rounder) / scale).round()


def _code_bits(codes: Tensor) -> Tensor:
    """Bits of each code from -127 to 127 by its share of the codes, shape (255,)."""
    count = torch.bincount((codes + _LARGEST).long().reshape(-1), minlength=2 * _LARGEST + 1)
    share = count + 0.5
    return -(share / share.sum()).log2()


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    assert isinstance(decision, EntropyGrid)
    if not decision.step:
        return module
    weight, bias = cast(Tensor, module.weight), bias_of(module)
    with torch.no_grad():
        weight.copy_(variant["weight"].reshape(weight.shape))
        if bias is not None:
            bias.add_(variant["shift"])
    module.register_buffer("weight_scale", variant["scale"].clone(), persistent=False)
    module.integer_weight = IntegerWeight(  # type: ignore[assignment]
        bits=8,
        group_size=None,
        per_tensor=False,
        activation_bits=32,
        dynamic=False,
        signed=False,
        calibration="mse",
    )
    return module


def _stored_bytes(layer: Layer, decision: Decision, multiple: int) -> int:
    """A byte per weight and a scale per row; coding comes after."""
    assert isinstance(decision, EntropyGrid)
    weights = layer.out_channels * layer.in_features
    return weights + 4 * layer.out_channels if decision.step else 4 * weights


ENTROPY_GRID = LayerTechnique(
    name=EntropyGrid.technique,
    decision=EntropyGrid,
    stage=Stage.QUANTIZE,
    identity=EntropyGrid(step=0),
    levels=(),
    choices=_choices,
    solve=_solve,
    install=_install,
    stored_bytes=_stored_bytes,
    kinds=("conv", "linear", "embedding"),
    uses_gradients=lambda decision: isinstance(decision, EntropyGrid) and decision.step > 0,
)
