"""Weights rounded to few values: scales, the nearest grid point, and rounding with feedback.

For a layer with damped input moments H = V Vᵀ, V upper triangular, the squared error of the output
is `||(W - Ŵ) V||²`, a sum over columns. Column by column each weight is rounded after what earlier
columns have lost is added to it (Frantar et al. 2023, GPTQ). Written with V instead of the inverse
of H this is LDLQ of Chee et al. 2023 (QuIP, theorem 6 shows that the two are the same).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

# Shares of the largest weight that are tried as the largest representable one.
_FINE_RATIOS = torch.linspace(0.80, 1.0, 21)
_COARSE_RATIOS = torch.linspace(0.10, 1.0, 46)
_BLOCK = 128
_SMALLEST_PEAK = 1e-12
_SMALLEST_POWER = 1e-30

Rounder = Callable[[slice, Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True)
class Grid:
    """Integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1, times a scale.

    Attributes:
        bits: of a weight.
        group_size: columns that share a scale; None for whole rows. A last group may be shorter.
        per_tensor: whether all rows have the same scale.
    """

    bits: int
    group_size: int | None = None
    per_tensor: bool = False

    @property
    def largest(self) -> float:
        """The largest integer."""
        return 2.0 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """How many scales a row of that many columns has."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def expand(self, scale: Tensor, columns: int) -> Tensor:
        """Scales of single weights, shape (out, columns), from those of groups, (out, groups)."""
        if self.group_size is None:
            return scale.expand(-1, columns)
        return scale.repeat_interleave(self.group_size, 1)[:, :columns]

    def nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest representable weights; weight (out, in), scale (out, groups)."""
        steps = self.expand(scale, weight.shape[1])
        return (weight / steps).round().clamp(-self.largest, self.largest) * steps


def search_scale(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """Scales with the least weighted squared rounding error, shape (out, groups), by grid search.

    Args:
        weight: shape (out, in).
        importance: weight of each column's squared error, shape (in,); None for equal ones.
    """
    importance = torch.ones(weight.shape[1]) if importance is None else importance.to(weight)
    peak = _per_scale(weight.abs(), grid, "amax").clamp(min=_SMALLEST_PEAK)
    best_error = torch.full_like(peak, torch.inf)
    best = peak / grid.largest
    for ratio in _FINE_RATIOS if grid.bits >= 8 else _COARSE_RATIOS:
        scale = peak * ratio / grid.largest
        error = (grid.nearest(weight, scale) - weight).square() * importance
        error = _per_scale(error, grid, "sum")
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best


def _per_scale(values: Tensor, grid: Grid, how: str) -> Tensor:
    """The sum or the largest of nonnegative values (out, in) under each scale, (out, groups)."""
    rows, columns = values.shape
    groups = grid.groups(columns)
    width = grid.group_size or columns
    padded = torch.nn.functional.pad(values, (0, groups * width - columns))
    blocks = padded.reshape(rows, groups, width)
    found = blocks.amax(2) if how == "amax" else blocks.sum(2)
    if grid.per_tensor:
        found = (found.amax(0) if how == "amax" else found.sum(0)).expand(rows, -1)
    return found.clone()


@final
@dataclass(frozen=True)
class Feedback:
    """H = V Vᵀ in the order in which columns are rounded.

    Attributes:
        order: columns, shape (in,), int64; the first can be made up for by all the others.
        factor: V, upper triangular, shape (in, in), float32.
    """

    order: Tensor
    factor: Tensor

    @property
    def pivots(self) -> Tensor:
        """What a unit error of each column costs when later columns make up, shape (in,).

        In the layer's own order of columns.
        """
        pivots = torch.empty(len(self.order), dtype=self.factor.dtype)
        pivots[self.order] = self.factor.diagonal().square()
        return pivots


def feedback_of(moment: Tensor, width: int = 1) -> Feedback:
    """The feedback of a layer: columns in the order of falling variance (GPTQ's act-order).

    Args:
        moment: H, shape (in, in), positive definite.
        width: so many neighbouring columns stay together and are rounded at once.
    """
    size = len(moment)
    energy = moment.diagonal().reshape(-1, width).sum(1)
    starts = energy.argsort(descending=True, stable=True) * width
    order = (starts[:, None] + torch.arange(width)).reshape(-1)
    moment = moment.double()[order][:, order]
    # The factor of the mirrored matrix, mirrored: upper triangular instead of lower.
    factor = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    assert factor.shape == (size, size)
    return Feedback(order, factor.float())


def round_with_feedback(
    weight: Tensor, feedback: Feedback, rounder: Rounder, width: int = 1
) -> Tensor:
    """Weights rounded one after another, each with what earlier ones have lost added to it.

    Args:
        weight: shape (out, in).
        feedback: with groups of at least `width` columns.
        rounder: given a slice of columns in the feedback's order, their targets (out, width) and
            the diagonal block of V (width, width), the rounded weights (out, width).
        width: columns that are rounded at once.
    """
    factor = feedback.factor
    weight = weight.float()[:, feedback.order]
    rounded = torch.empty_like(weight)
    lost = torch.zeros_like(weight)
    size = weight.shape[1]
    for start in range(0, size, _BLOCK):
        end = min(size, start + _BLOCK)
        # What columns before this block have lost, for all of its columns at once.
        before = lost[:, :start] @ factor[:start, start:end]
        for column in range(start, end, width):
            part = slice(column, column + width)
            block = factor[part, part]
            owed = before[:, column - start : column - start + width]
            owed = owed + lost[:, start:column] @ factor[start:column, part]
            if width == 1:
                owed = owed / block
            else:
                owed = torch.linalg.solve_triangular(block, owed, upper=True, left=False)
            rounded[:, part] = rounder(part, weight[:, part] + owed, block)
            lost[:, part] = weight[:, part] - rounded[:, part]
    result = torch.empty_like(rounded)
    result[:, feedback.order] = rounded
    return result


def gptq(
    weight: Tensor, grid: Grid, scale: Tensor, feedback: Feedback, frozen: Tensor | None = None
) -> Tensor:
    """Weights on the grid with a small error of the output, shape (out, in).

    Rows for which the nearest grid points are better keep those.

    Args:
        scale: shape (out, groups), fixed before any column is rounded.
        frozen: which weights are zero and stay so, shape of weight, bool.
    """
    steps = grid.expand(scale, weight.shape[1])[:, feedback.order]
    frozen = torch.zeros_like(weight, dtype=torch.bool) if frozen is None else frozen
    alive = ~frozen[:, feedback.order]

    def rounder(part: slice, target: Tensor, block: Tensor) -> Tensor:
        step = steps[:, part]
        codes = (target / step).round().clamp(-grid.largest, grid.largest)
        return codes * step * alive[:, part]

    found = round_with_feedback(weight, feedback, rounder)
    nearest = grid.nearest(weight, scale)
    better = output_error(weight - found, feedback) <= output_error(weight - nearest, feedback)
    return torch.where(better[:, None], found, nearest)


def output_error(error: Tensor, feedback: Feedback) -> Tensor:
    """The mean squared error of each output, e H eᵀ, shape (out,); error (out, in)."""
    return (error[:, feedback.order].float() @ feedback.factor).square().sum(1)


def fitted_ratio(weight: Tensor, rounded: Tensor, feedback: Feedback) -> Tensor:
    """By what each row is to be multiplied for the least error of the output, shape (out, 1).

    Always positive: rows that point elsewhere are left as they are.
    """
    wanted = weight[:, feedback.order].float() @ feedback.factor
    given = rounded[:, feedback.order].float() @ feedback.factor
    ratio = (wanted * given).sum(1) / given.square().sum(1).clamp(min=_SMALLEST_POWER)
    return torch.where(ratio > 0, ratio, 1.0)[:, None]
