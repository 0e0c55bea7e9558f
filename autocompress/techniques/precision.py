"""Mixed precision: weights, inputs or both of single layers as integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast, final

import torch
from pydantic import model_validator
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.reconstruction import damped_moment
from autocompress.techniques.rounding import (
    Feedback,
    Grid,
    feedback_of,
    gptq,
    output_error,
    search_scale,
)
from autocompress.techniques.technique import (
    IntegerWeight,
    LayerProblem,
    LayerTechnique,
    Stage,
    Variant,
    bias_of,
)

GROUP_SIZE = 32
# At so few bits GPTQ moves weights by whole steps, and somewhat wider grids serve it better.
_FEW_BITS = 3
_WIDER = (1.0, 1.12, 1.25, 1.4)


@final
class Precision(Decision):
    """Store a layer's weight, and run its inputs, with so many bits; 32 is floating point.

    Attributes:
        weight_bits: integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1; at 2 bits -1, 0 and 1. 7
            bits are stored in 8: integer kernels that add two products in 16 bits need them.
        activation_bits: of the layer's inputs; needs a kernel of the device unless it is 32.
        granularity: what shares a scale: the whole weight (its batch norm folded), an output
            channel, or 32 columns of an output channel's unfolded weight.
        rounding: to the nearest value or by GPTQ; grouped convolutions have no statistics, and
            are rounded to the nearest.
        calibration: how a static range of the inputs is found.
        activation_range: found by calibration, or taken anew at each run (8 bits only).
        activation_sign: of the inputs' integers.
        bias_correction: whether the bias makes up for the mean of the rounding error.
    """

    technique: ClassVar[str] = "precision"
    weight_bits: Literal[32, 8, 7, 4, 3, 2]
    activation_bits: Literal[32, 16, 8]
    granularity: Literal["tensor", "channel", "group"] = "channel"
    rounding: Literal["nearest", "gptq"] = "gptq"
    calibration: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    activation_range: Literal["static", "dynamic"] = "static"
    activation_sign: Literal["unsigned", "signed"] = "unsigned"
    bias_correction: bool = True

    @model_validator(mode="after")
    def _check(self) -> Precision:
        """Refuse what no runtime has."""
        dynamic = self.activation_range == "dynamic"
        if dynamic and (self.activation_bits != 8 or self.weight_bits == 32):
            raise ValueError("a dynamic range needs activation_bits 8 and integer weights")
        if dynamic and self.activation_sign == "signed":
            raise ValueError("a dynamic range is unsigned")
        if (
            self.granularity == "group"
            and self.activation_bits == 8  # no kernel sums integers group by group
            and self.weight_bits < 32
        ):
            raise ValueError("with activation_bits 8 the granularity is tensor or channel")
        return self


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Widths of inputs for which the device has a kernel; weights are stored at any width.

    Of decisions that come to the same for the layer the first is kept.
    """
    operators = {"conv": ("Conv",), "linear": ("Gemm", "MatMul"), "embedding": ()}[layer.kind]
    listed = [set(device.kernels[name]) for name in operators if name in device.kernels]
    widths = {32} | (set.intersection(*listed) if listed else set[int]())
    distinct: dict[tuple[object, ...], Precision] = {}
    for decision in offered:
        assert isinstance(decision, Precision)
        changes = (decision.weight_bits, decision.activation_bits) != (32, 32)
        # Entries of a table are as different as words are: one scale for all of them serves none.
        changes &= layer.kind != "embedding" or decision.granularity != "tensor"
        if changes and decision.activation_bits in widths:
            distinct.setdefault(_effect(layer, decision), decision)
    return tuple(sorted(distinct.values(), key=_strength))


def _on_device(decision: Decision, device: DeviceProfile) -> Decision:
    """With weights of 7 bits in place of 8 for integer kernels whose sums saturate."""
    assert isinstance(decision, Precision)
    if decision.activation_bits == 8 and decision.weight_bits == 8:
        return decision.model_copy(update={"weight_bits": device.integer_weight_bits})
    return decision


def _effect(layer: Layer, decision: Precision) -> tuple[object, ...]:
    """Fields that make a difference for a layer."""
    weight: tuple[object, ...] = ()
    if decision.weight_bits < 32:
        whole = decision.granularity == "group" and layer.in_features <= GROUP_SIZE
        weight = (
            "channel" if whole else decision.granularity,
            decision.rounding if layer.dense else "nearest",
            decision.bias_correction,
        )
    activation: tuple[object, ...] = ()
    if decision.activation_bits < 32:
        static = decision.activation_range == "static"
        activation = (
            decision.activation_range,
            decision.activation_sign,
            decision.calibration if static else None,
        )
    return decision.weight_bits, decision.activation_bits, weight, activation


def _strength(decision: Precision) -> tuple[int, ...]:
    """Sorts decisions from the mildest to the strongest."""
    return (
        -decision.weight_bits,
        -decision.activation_bits,
        ("group", "channel", "tensor").index(decision.granularity),
        ("gptq", "nearest").index(decision.rounding),
    )


def _grid(decision: Precision) -> Grid:
    group = GROUP_SIZE if decision.granularity == "group" else None
    return Grid(decision.weight_bits, group, decision.granularity == "tensor")


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    """`weight` on its grid, `scale` (out, groups), and the mean `shift` (out,) that was lost."""
    assert isinstance(decision, Precision)
    weight, statistics = problem.weight, problem.statistics
    rows = len(weight)
    if decision.weight_bits == 32:
        return {"weight": weight, "scale": torch.ones(rows, 1), "shift": torch.zeros(rows)}
    grid = _grid(decision)
    if statistics is None:
        scale = search_scale(weight, grid)
        return {
            "weight": grid.nearest(weight, scale), "scale": scale, "shift": torch.zeros(rows),
        }  # fmt: skip
    # Without a norm and without the correction nothing makes up for a shift of the mean.
    absorbed = problem.free_bias and (problem.bias is None or decision.bias_correction)
    moment = damped_moment(statistics, absorbed)
    scale = search_scale(weight, grid, moment.diagonal())
    if decision.rounding == "nearest":
        rounded = grid.nearest(weight, scale)
    else:
        rounded, scale = _gptq(problem, grid, scale, feedback_of(moment))
    shift = (weight - rounded).double() @ statistics.mean
    return {"weight": rounded, "scale": scale, "shift": shift.float()}


def _gptq(
    problem: LayerProblem, grid: Grid, scale: Tensor, feedback: Feedback
) -> tuple[Tensor, Tensor]:
    """GPTQ on the best of a few grids, by row, or for all rows where they share their scale."""
    weight, frozen = problem.weight, problem.frozen
    best = gptq(weight, grid, scale, feedback, frozen)
    error = output_error(weight - best, feedback)
    best_scale = scale
    for wider in _WIDER[1:] if grid.bits <= _FEW_BITS else ():
        found = gptq(weight, grid, scale * wider, feedback, frozen)
        found_error = output_error(weight - found, feedback)
        better = found_error < error
        if grid.per_tensor:
            better = (found_error.sum() < error.sum()).expand(len(weight))
        error = torch.where(better, found_error, error)
        best = torch.where(better[:, None], found, best)
        best_scale = torch.where(better[:, None], scale * wider, best_scale)
    return best, best_scale


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    """Put the rounded weight in its place and say how it is to be stored and run.

    Batch-norm folding multiplies the scale with the weight, so the export finds the same integers.
    """
    assert isinstance(decision, Precision)
    if (decision.weight_bits, decision.activation_bits) == (32, 32):
        return module
    weight, bias = cast(Tensor, module.weight), bias_of(module)
    with torch.no_grad():
        weight.copy_(variant["weight"].reshape(weight.shape))
        if bias is not None and decision.bias_correction:
            bias.add_(variant["shift"])
    grid = _grid(decision)
    module.register_buffer("weight_scale", variant["scale"].clone(), persistent=False)
    module.integer_weight = IntegerWeight(  # type: ignore[assignment]
        bits=decision.weight_bits,
        group_size=grid.group_size,
        per_tensor=grid.per_tensor,
        activation_bits=decision.activation_bits,
        dynamic=decision.activation_range == "dynamic",
        signed=decision.activation_sign == "signed",
        calibration=decision.calibration,
    )
    return module


def _stored_bytes(layer: Layer, decision: Decision, multiple: int) -> int:
    """A byte per weight where an integer kernel reads it, else packed codes; and the scales."""
    assert isinstance(decision, Precision)
    weights = layer.out_channels * layer.in_features
    if decision.weight_bits == 32:
        return 4 * weights
    grid = _grid(decision)
    scales = 1 if grid.per_tensor else layer.out_channels * grid.groups(layer.in_features)
    # Three bits are stored as four.
    per_byte = {8: 1, 7: 1, 4: 2, 3: 2, 2: 4}[decision.weight_bits]
    return -(-weights // (1 if decision.activation_bits == 8 else per_byte)) + 4 * scales


PRECISION = LayerTechnique(
    name=Precision.technique,
    decision=Precision,
    stage=Stage.QUANTIZE,
    identity=Precision(weight_bits=32, activation_bits=32),
    levels=(),
    choices=_choices,
    on_device=_on_device,
    solve=_solve,
    install=_install,
    stored_bytes=_stored_bytes,
    kinds=("conv", "linear", "embedding"),
    folds_norm=lambda decision: (
        isinstance(decision, Precision)
        and decision.granularity == "tensor"
        and decision.weight_bits < 32
    ),
)
