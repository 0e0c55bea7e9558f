"""Tucker-2: a convolution between two pointwise ones, on fewer channels on both sides."""

from __future__ import annotations

import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor

from autocompress.techniques.factors import (
    SplitLayer,
    alternate,
    balance,
    column_moment,
    feature_moment,
    fit_second,
    split_layer,
)
from autocompress.techniques.technique import LayerProblem

_ITERATIONS = 50
_TOLERANCE = 1e-4


def tucker_factors(problem: LayerProblem, ranks: tuple[int, int]) -> tuple[Tensor, ...]:
    """Weights of a pointwise convolution, the core, and another pointwise one.

    Higher-order orthogonal iteration on the two channel modes (Kim et al. 2016). For the data, the
    weight's input channels are first whitened by their moments; then core and last part are the
    reduced-rank regression of the layer's output on what the first part gives (Izenman 1975), and
    the first part is fitted to these, in turn.

    Args:
        ranks: channels that the core reads and gives.

    Returns:
        Shapes (r1, c, 1...), (r2, r1, *kernel) and (out, r2, 1...), float32.
    """
    kernel = problem.layer.kernel_size
    split = split_layer(problem, column_moment(problem), len(kernel))
    out, channels, _ = split.weight.shape
    root = torch.linalg.cholesky(split.first_moment())
    whitened = torch.einsum("oaj,ab->obj", split.weight, root)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, (last, inner)), _ = partial_tucker(
            whitened, rank=[ranks[1], ranks[0]], modes=[0, 1],
            n_iter_max=_ITERATIONS, tol=_TOLERANCE,
        )  # fmt: skip
    first = torch.linalg.solve_triangular(root, inner.T, upper=False, left=False)
    if problem.statistics is not None:
        first, _ = alternate(
            split, first, lambda guess: _merge(*reduced_regression(split, guess, ranks[1]))
        )
        core, last = reduced_regression(split, first, ranks[1])
    first, core = balance(first, core)
    core, last = balance(core, last)
    ones = tuple(1 for _ in kernel)
    return (
        first.reshape(ranks[0], channels, *ones).float().contiguous(),
        core.reshape(ranks[1], ranks[0], *kernel).float().contiguous(),
        last.reshape(out, ranks[1], *ones).float().contiguous(),
    )


def reduced_regression(split: SplitLayer, first: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best second factor of that rank for a first one: core (rank, r, j) and last (out, rank).

    The unrestricted fit's outputs are projected on their leading principal directions.
    """
    moment = feature_moment(split, first)
    free = fit_second(split, first, moment).flatten(1)
    values, vectors = torch.linalg.eigh(free @ moment @ free.T)
    last = vectors[:, values.argsort(descending=True)[:rank]]
    return (last.T @ free).reshape(rank, len(first), -1), last


def _merge(core: Tensor, last: Tensor) -> Tensor:
    return torch.einsum("os,srj->orj", last, core)
