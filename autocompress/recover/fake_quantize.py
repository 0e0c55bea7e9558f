"""Fake quantization: rounded forward, straight-through backward, with learned step sizes.

Steps are learned as in LSQ (Esser et al. 2020), offsets of activations as in LSQ+ (Bhalgat et al.
2020), gradients are rounded stochastically as in DoReFa-Net (Zhou et al. 2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

# A step may shrink to this share of its first size and no further, so that it never crosses zero.
_SMALLEST_SHARE = 1 / 32
_SMALLEST_STEP = 1e-12
# Weights start on the grid: rounding errors must not make the outermost level count as clipped.
_TOLERANCE = 1e-3
# Shares of the observed range that are tried as the representable one.
_CLIP_RATIOS = torch.linspace(0.2, 1.0, 41, dtype=torch.float64)


@final
@dataclass(frozen=True)
class ActivationGrid:
    """The grid `scale * (q - zero_point)` of integers q from 0 to 2^bits - 1; zero is on it."""

    scale: float
    zero_point: int
    bits: int

    def as_signed(self) -> ActivationGrid:
        """The same grid with integers from -2^(bits-1) on."""
        return ActivationGrid(self.scale, self.zero_point - 2 ** (self.bits - 1), self.bits)

    def as_unsigned(self) -> ActivationGrid:
        """The inverse of `as_signed`."""
        return ActivationGrid(self.scale, self.zero_point + 2 ** (self.bits - 1), self.bits)


def full_range_grid(low: float, high: float, bits: int) -> ActivationGrid:
    """The grid over the values from low to high, and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = max((high - low) / levels, _SMALLEST_STEP)
    return ActivationGrid(scale, min(max(round(-low / scale), 0), levels), bits)


def least_error_grid(values: Tensor, low: float, high: float, bits: int) -> ActivationGrid:
    """The grid with the least squared error on values, its range a share of low to high."""
    sample = values.double()
    grids = [full_range_grid(low * r, high * r, bits) for r in _CLIP_RATIOS.tolist()]

    def error(grid: ActivationGrid) -> float:
        codes = (sample / grid.scale).round() + grid.zero_point
        rounded = (codes.clamp(0, 2**bits - 1) - grid.zero_point) * grid.scale
        return float((rounded - sample).square().sum())

    return min(grids, key=error)


@final
class WeightQuantizer(nn.Module):
    """A parametrization of a layer's weight by a symmetric grid with learned steps.

    Args:
        scale: shape (out, groups), positive; see `IntegerWeight` for its meaning.
        bits: integers run from -(2^(bits-1) - 1) to 2^(bits-1) - 1.
        group_size: columns that share a step; None for whole rows.
        per_tensor: one step for all rows; that of the first row is taken.
    """

    _floor: Tensor

    def __init__(
        self, scale: Tensor, bits: int, group_size: int | None, *, per_tensor: bool
    ) -> None:
        super().__init__()
        self._shape = scale.shape
        self._group_size = group_size
        self._bound = 2 ** (bits - 1) - 1
        first = (scale[:1, :1] if per_tensor else scale).detach().float()
        first = first.flatten().clamp(min=_SMALLEST_STEP)
        # One dimension, so that no weight decay shrinks it.
        self.step = nn.Parameter(first.clone())
        self.register_buffer("_floor", first * _SMALLEST_SHARE, persistent=False)

    @property
    def scale(self) -> Tensor:
        """The learned steps, shape (out, groups)."""
        step = _held(self.step, self._floor)
        return step.expand(self._shape.numel()).reshape(self._shape)

    def forward(self, latent: Tensor) -> Tensor:
        """The rounded weight, in the shape of the given one."""
        rows = latent.reshape(len(latent), -1)
        per_step = rows.numel() / len(self.step)
        rounded = _Quantize.apply(  # type: ignore[no-untyped-call]

            rows, self._spread(rows.shape[1]), None,
            (-self._bound, self._bound), 1 / math.sqrt(per_step * self._bound),
        )  # fmt: skip
        assert isinstance(rounded, Tensor)
        return rounded.reshape(latent.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight that the training starts from."""
        return weight

    def _spread(self, columns: int) -> Tensor:
        """The steps, to be broadcast over the weight's rows."""
        if self._group_size is None:
            return self.scale
        return self.scale.repeat_interleave(self._group_size, 1)[:, :columns]


@final
class ActivationQuantizer(nn.Module):
    """A grid of unsigned integers with a learned step, and offset if it begins below zero.

    A grid whose zero point is 0 keeps it: what a ReLU gives needs no other.

    Args:
        grid: the first one.
    """

    _floor: Tensor

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self._bits = grid.bits
        self.step = nn.Parameter(torch.tensor(max(grid.scale, _SMALLEST_STEP)))
        self.register_buffer("_floor", self.step.detach() * _SMALLEST_SHARE, persistent=False)
        lowest = torch.tensor(-grid.scale * grid.zero_point)
        self.offset = nn.Parameter(lowest) if grid.zero_point else None

    @property
    def grid(self) -> ActivationGrid:
        """The present grid."""
        step = _held(self.step, self._floor).detach()
        zero_point = _zero_point(step, self.offset, 2**self._bits - 1)
        return ActivationGrid(float(step), int(zero_point), self._bits)

    def forward(self, x: Tensor) -> Tensor:
        """The rounded activations; batch in dimension 0."""
        levels = 2**self._bits - 1
        features = x.numel() / max(len(x), 1)
        step = _held(self.step, self._floor)
        gradient_scale = 1 / math.sqrt(max(features, 1) * levels)
        rounded = _Quantize.apply(  # type: ignore[no-untyped-call]
            x, step, self.offset, (0, levels), gradient_scale
        )
        assert isinstance(rounded, Tensor)
        return rounded


@final
class BatchQuantizer(nn.Module):
    """Rounds to a grid over each batch's own range, as ONNX's `DynamicQuantizeLinear` does.

    Nothing is clipped, so gradients pass straight through.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._levels = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """The rounded activations."""
        with torch.no_grad():
            values = x.float()
            low, high = torch.aminmax(values)
            low, high = low.clamp(max=0), high.clamp(min=0)
            step = ((high - low) / self._levels).clamp(min=_SMALLEST_STEP)
            zero = (-low / step).round().clamp(0, self._levels)
            rounded = _rounded(values, step, zero, (0, self._levels)).to(x.dtype)
        straight = _PassThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
        assert isinstance(straight, Tensor)
        return straight


def stochastic_round(gradient: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Rounds to 2^bits levels between plus and minus each sample's largest magnitude, unbiased.

    Zhou et al. 2016 (DoReFa-Net), eq. 12.

    Args:
        gradient: batch in dimension 0.
        generator: on the gradient's device.
    """
    values = gradient.float()
    levels = 2**bits - 1
    peak = values.abs().reshape(len(values), -1).amax(1)
    peak = peak.clamp(min=torch.finfo(torch.float32).tiny)
    peak = peak.reshape(-1, *(1 for _ in values.shape[1:]))
    noise = torch.rand(values.shape, generator=generator, device=values.device)
    # Noise of one level's width below the next integer: floor then rounds as the paper does.
    codes = (values / peak).add_(1).mul_(levels / 2).add_(noise).floor_().clamp_(0, levels)
    return codes.mul_(2 / levels).sub_(1).mul_(peak).to(gradient.dtype)


def round_gradient(x: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """The same tensor, whose gradient is rounded by `stochastic_round`."""
    same = _RoundGradient.apply(x, bits, generator)  # type: ignore[no-untyped-call]
    assert isinstance(same, Tensor)
    return same


class _Quantize(torch.autograd.Function):
    """`step * (clamp(round(x / step) + z, low, high) - z)` with z = round(-offset / step).

    Gradients (LSQ eq. 2-5, LSQ+ eq. 4-6): of x, 1 within the range; of the step, round(v) - v
    within it with v = x / step, else the bound; of the offset, 1 outside. Those of step and offset
    are multiplied by the gradient scale.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None,
        bounds: tuple[int, int], gradient_scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, step, offset)
        ctx.bounds, ctx.gradient_scale = bounds, gradient_scale
        zero = None if offset is None else _zero_point(step, offset, bounds[1])
        return _rounded(x.float(), step, zero, bounds).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, step, offset = ctx.saved_tensors
        low, high = ctx.bounds
        gradient = gradients[0]
        position = x.float() / step
        if offset is not None:
            position += _zero_point(step, offset, high)
        bound = position.clamp(low, high)
        inside = (position - bound).abs_() <= _TOLERANCE
        straight = torch.where(inside, gradient, 0)
        slope = torch.where(inside, position.round().sub_(position), bound)
        to_step = slope.mul_(gradient).sum_to_size(step.shape) * ctx.gradient_scale
        to_offset = None
        if offset is not None:
            to_offset = (gradient.float().sum() - straight.float().sum()) * ctx.gradient_scale
        return straight, to_step, to_offset, None, None


class _PassThrough(torch.autograd.Function):
    """The second tensor, with the gradient going to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, generator: torch.Generator) -> Tensor:
        ctx.bits, ctx.generator = bits, generator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return stochastic_round(gradients[0], ctx.bits, ctx.generator), None, None


def _rounded(x: Tensor, step: Tensor, zero: Tensor | None, bounds: tuple[int, int]) -> Tensor:
    codes = (x / step).round_()
    if zero is None:
        return codes.clamp_(*bounds).mul_(step)
    return codes.add_(zero).clamp_(*bounds).sub_(zero).mul_(step)


def _zero_point(step: Tensor, offset: Tensor | None, levels: int) -> Tensor:
    if offset is None:
        return torch.zeros_like(step)
    return (-offset.detach() / step.detach()).round().clamp(0, levels)


def _held(step: Tensor, floor: Tensor) -> Tensor:
    """The step, at least its floor; the gradient passes, so that it may rise again."""
    return step + (torch.maximum(step, floor) - step).detach()
