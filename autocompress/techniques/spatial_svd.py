"""Spatial SVD: a k x k convolution as a column of weights and then a row of them."""

from __future__ import annotations

import torch
from torch import Tensor

from autocompress.techniques.factors import (
    alternate,
    balance,
    column_moment,
    feature_moment,
    fit_second,
    split_layer,
)
from autocompress.techniques.technique import LayerProblem


def spatial_factors(problem: LayerProblem, rank: int) -> tuple[Tensor, ...]:
    """Weights of a (kh, 1) convolution and of the (1, kw) convolution after it.

    The singular vectors of the (c kh, out kw) matrix (Jaderberg et al. 2014, scheme 2; Tai et al.
    2016, closed form); for the data, of that matrix whitened by the moments of what the first part
    reads, and then both parts fitted in turn to the layer's output.

    Returns:
        Shapes (rank, c, kh, 1) and (out, rank, 1, kw), float32.
    """
    split = split_layer(problem, column_moment(problem), 1)
    out, rows, width = split.weight.shape
    root = torch.linalg.cholesky(split.first_moment())
    folded = torch.einsum("oaj,ab->boj", split.weight, root).reshape(rows, -1)
    u, s, vt = torch.linalg.svd(folded, full_matrices=False)
    first = torch.linalg.solve_triangular(root, u[:, :rank].T, upper=False, left=False)
    if problem.statistics is not None:
        first, second = alternate(
            split, first, lambda guess: fit_second(split, guess, feature_moment(split, guess))
        )
    else:
        second = (s[:rank, None] * vt[:rank]).reshape(rank, out, width).transpose(0, 1)
    first, second = balance(first, second)
    height = problem.layer.kernel_size[0]
    return (
        first.reshape(rank, -1, height, 1).float().contiguous(),
        second.reshape(out, rank, 1, width).float().contiguous(),
    )
