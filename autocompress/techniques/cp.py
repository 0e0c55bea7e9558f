"""Canonical polyadic decomposition: pointwise, depthwise along each kernel dimension, pointwise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from autocompress.errors import PlanError
from autocompress.techniques.factors import (
    SplitLayer,
    alternate,
    column_moment,
    solve_positive,
    split_layer,
)
from autocompress.techniques.technique import LayerProblem

_SEED = 0
_ITERATIONS = 40
_TOLERANCE = 1e-4
# Weight decay on a tensor of norm one: it keeps the components bounded and costs no accuracy.
_DECAY = 1e-3
# Channel modes are compressed to this size before the iterations; the final fit sees all of them.
_LARGEST_MODE = 96
# Sound fits of trained layers have components of up to 5 times the tensor's energy, cosines above
# -0.5 between them (0.6 to 46 times and -0.83 without weight decay).
_MOST_ENERGY = 100.0
_LEAST_COSINE = -0.95
_ROUNDING = 1e-6


def cp_factors(problem: LayerProblem, rank: int) -> tuple[Tensor, ...]:
    """Weights of a pointwise, one depthwise per kernel dimension above one, and a pointwise part.

    Alternating least squares on the weight (Lebedev et al. 2015) with a weight decay, which bounds
    the components (Phan et al. 2020 bound their norms too). The channel factors are then fitted in
    turn to the layer's output on the data, or to its weight.

    Returns:
        Shapes (rank, c, 1...), (rank, 1, ...) for each dimension, and (out, rank, 1...), float32.

    Raises:
        PlanError: the fit is degenerate; see `check_fit`.
    """
    kernel = problem.layer.kernel_size
    split = split_layer(problem, column_moment(problem), len(kernel))
    out, channels, _ = split.weight.shape
    wide = [size for size in kernel if size > 1]
    tensor = split.weight.reshape(out, channels, *wide)
    outputs, inputs = _leading(tensor, 0), _leading(tensor, 1)
    small = torch.einsum("oc...,op,cq->pq...", tensor, outputs, inputs)
    norm = small.norm().clamp(min=1e-30)
    what = f"{problem.layer.name} at rank {rank}"
    try:
        last, first, *along = fit_cp(small / norm, rank)
    except LinAlgError as cause:
        raise _degenerate(f"{what}: {cause}", "normal equations that can be solved") from cause
    check_fit(small / norm, [last, first, *along], what)
    taps = _khatri_rao(along)
    first, second = alternate(
        split, (inputs @ first).T, lambda guess: _fit_last(split, guess, taps)[:, :, None] * taps.T
    )
    # The tap factors have unit columns, so the last part's weights are a projection on them.
    last = (second * taps.T).sum(2)
    return _parts(problem, _even([first.T, *along, last]))


def fit_cp(tensor: Tensor, rank: int) -> list[Tensor]:
    """Factors of a tensor of norm one, each (size, rank), float64.

    All but the first two have columns of norm one; deterministic.
    """
    with warnings.catch_warnings(), tensorly.backend_context("pytorch", local_threadsafe=True):
        # Ranks above a mode's size are meant to be: TensorLy warns and fills up with random ones.
        warnings.simplefilter("ignore", UserWarning)
        found = parafac(
            tensor.float(), rank=rank, init="svd", random_state=_SEED, n_iter_max=_ITERATIONS,
            tol=_TOLERANCE, l2_reg=_DECAY / math.sqrt(rank),
        )  # fmt: skip
    last, first, *along = [factor.double() for factor in found.factors]
    norms = [factor.norm(dim=0).clamp(min=1e-30) for factor in along]
    last = last * torch.stack([found.weights.double(), *norms]).prod(0)
    units = [factor / norm for factor, norm in zip(along, norms, strict=True)]
    return [last, first, *units]


def check_fit(tensor: Tensor, factors: Sequence[Tensor], what: str) -> None:
    """Refuse degenerate factors of a tensor of norm one.

    Components that grow while they cancel each other have no best approximation to converge to
    (Krijnen, Dijkstra & Stegeman 2008); a fit may also simply fail.

    Args:
        what: layer and rank, for the error.

    Raises:
        PlanError: factors that are not finite; components that cancel each other (cosine near -1)
            or with too much energy; an error no smaller than a closed-form fit's of half the rank.
    """
    rank = factors[0].shape[1]
    norms = [factor.norm(dim=0) for factor in factors]
    energy = float(torch.stack(norms).square().prod(0).sum())
    cosines = torch.ones(rank, rank, dtype=torch.float64)
    for factor, norm in zip(factors, norms, strict=True):
        unit = factor / norm.clamp(min=1e-30)
        cosines = cosines * (unit.T @ unit)
    cosine = float(cosines.fill_diagonal_(0).min())
    error = _error(tensor, factors)
    limit = max(slices_error(tensor, rank // 2), _ROUNDING)
    sound = energy <= _MOST_ENERGY and cosine >= _LEAST_COSINE and error < limit
    if not (sound and math.isfinite(error + energy + cosine)):
        raise _degenerate(
            f"{what}: squared error {error:.3g} of the weight's energy, components of "
            f"{energy:.3g} times that energy, least cosine between two {cosine:.3g}",
            f"an error below {limit:.3g} (a closed form of half the rank), components of at most "
            f"{_MOST_ENERGY:g} times the energy, cosines of at least {_LEAST_COSINE:g}",
        )


def _degenerate(given: str, allowed: str) -> PlanError:
    return PlanError(
        "The CP decomposition of a layer is degenerate.",
        given=given,
        allowed=allowed,
        advice="take another rank_ratio, lower or higher, or kind tucker, which always has a fit",
    )


def slices_error(tensor: Tensor, rank: int) -> float:
    """Relative squared error of a CP of that rank in closed form, with orthogonal components.

    The kernel's dimensions are rotated to their principal axes; the largest singular values of all
    slices (out, c) are kept.
    """
    core = tensor
    for mode in range(2, tensor.dim()):
        rotation = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False)[0]
        core = torch.tensordot(core, rotation, ([mode], [0])).movedim(-1, mode)
    values = torch.linalg.svdvals(core.flatten(2).permute(2, 0, 1)).flatten().square()
    lost = values.sort(descending=True)[0][rank:].sum()
    return float(lost / values.sum().clamp(min=1e-30))


def _leading(tensor: Tensor, mode: int) -> Tensor:
    """An orthonormal basis of a mode's leading directions, at most `_LARGEST_MODE` of them."""
    size = tensor.shape[mode]
    if size <= _LARGEST_MODE:
        return torch.eye(size, dtype=tensor.dtype)
    unfolding = tensor.movedim(mode, 0).flatten(1)
    _, vectors = torch.linalg.eigh(unfolding @ unfolding.T)
    leading: Tensor = vectors[:, -_LARGEST_MODE:]
    return leading


def _error(tensor: Tensor, factors: Sequence[Tensor]) -> float:
    last, first, *along = factors
    taps = _khatri_rao(along)
    product = torch.einsum("or,cr,jr->ocj", last, first, taps)
    return float((tensor.flatten(2) - product).square().sum())


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Columns' outer products, shape (product of sizes, rank)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor[None]).flatten(0, 1)
    return product


def _fit_last(split: SplitLayer, first: Tensor, taps: Tensor) -> Tensor:
    """The best last factor for the others, shape (out, rank)."""
    features = (first[:, :, None] * taps.T[:, None, :]).flatten(1)
    seen = features @ split.moment
    return solve_positive(seen @ features.T, split.matrix @ seen.T)


def _even(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same product with components of equal norm in every factor."""
    norms = [factor.norm(dim=0).clamp(min=1e-30) for factor in factors]
    each = torch.stack(norms).log().mean(0).exp()
    return [f / norm * each for f, norm in zip(factors, norms, strict=True)]


def _parts(problem: LayerProblem, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Factors (c, r), one (k, r) per kernel dimension above one, and (out, r) as conv weights."""
    kernel = problem.layer.kernel_size
    first, *along, last = factors
    ones = [1 for _ in kernel]
    parts = [first.T.reshape(*first.T.shape, *ones)]
    wide = [dimension for dimension, size in enumerate(kernel) if size > 1]
    for dimension, factor in zip(wide, along, strict=True):
        shape = list(ones)
        shape[dimension] = kernel[dimension]
        parts.append(factor.T.reshape(len(factor.T), 1, *shape))
    parts.append(last.reshape(*last.shape, *ones))
    return tuple(part.float().contiguous() for part in parts)
