"""Least-squares reconstruction of a layer's output after input columns are removed.

For weight W (out x in) and damped input moments H, removing columns M at the least squared output
error costs `sum_i W_iM ([H^-1]_MM)^-1 W_iM^T` (Hassibi & Stork 1993, optimal brain surgeon; groups
of columns as in Kurtic et al. 2023, ZipLM, eq. 3 and 4). `removal` finds which columns those are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.techniques.technique import LayerProblem, LayerStatistics

DAMPING = 1e-2
_ROUNDING = 1e-10
# Smaller squares are lost in fp32, in which inputs are multiplied.
_LEAST = 1e-34


def damped_moment(statistics: LayerStatistics, free_bias: bool) -> Tensor:
    """H of the module's docstring, shape (in, in), float64, positive definite.

    With a free bias the inputs are centred: a constant shift of the output costs nothing then.
    """
    moment = _moment(statistics, free_bias)
    damping = DAMPING * moment.diagonal().mean()
    # What is left of inputs that hardly vary may be rounding alone, which is not positive.
    damping = torch.maximum(damping, _ROUNDING * statistics.moment.diagonal().mean())
    if not damping > _LEAST:
        damping = torch.ones_like(damping)
    return moment + damping * torch.eye(len(moment), dtype=moment.dtype)


def dead_columns(statistics: LayerStatistics, free_bias: bool) -> Tensor:
    """Which inputs never vary (with a free bias) or are always zero, shape (in,), bool."""
    diagonal = _moment(statistics, free_bias).diagonal()
    return diagonal <= 1e-12 * diagonal.max().clamp(min=1e-30)


def _moment(statistics: LayerStatistics, free_bias: bool) -> Tensor:
    if not free_bias:
        return statistics.moment
    return statistics.moment - torch.outer(statistics.mean, statistics.mean)


def refit(problem: LayerProblem, keep: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weights of the kept input columns that reproduce the layer's output best.

    Args:
        problem: with statistics.
        keep: the columns that stay, in order.

    Returns:
        Weight of shape (out, len(keep)) and the shift of the output's mean, shape (out,), that a
        bias has to add; both float32. The minimiser is W H_:K (H_KK)^-1.
    """
    statistics = problem.statistics
    assert statistics is not None
    weight = problem.weight.double()
    index = torch.as_tensor(list(keep))
    h = damped_moment(statistics, problem.free_bias)
    factor = torch.linalg.cholesky(h[index][:, index])
    kept = torch.cholesky_solve(h[index] @ weight.T, factor).T
    shift = weight @ statistics.mean - kept @ statistics.mean[index]
    return kept.float(), shift.float()
