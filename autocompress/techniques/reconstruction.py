"""Least-squares reconstruction of a layer's output after input columns are removed.

For weight W (out x in) and damped input moments H, removing columns M at the least squared output
error costs `sum_i W_iM ([H^-1]_MM)^-1 W_iM^T` (Hassibi & Stork 1993, optimal brain surgeon; groups
of columns as in Kurtic et al. 2023, ZipLM, eq. 3 and 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.graph import Member
from autocompress.techniques.technique import GroupProblem, LayerProblem, LayerStatistics

DAMPING = 1e-2


def damped_moment(statistics: LayerStatistics, free_bias: bool) -> Tensor:
    """H of the module's docstring, shape (in, in), float64, positive definite.

    With a free bias the inputs are centred: a constant shift of the output costs nothing then.
    """
    moment = _moment(statistics, free_bias)
    damping = DAMPING * moment.diagonal().mean()
    if not damping > 0:
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


def removal_order(problem: GroupProblem) -> Tensor:
    """Greedy order in which a group's channels are removed, shape (size,), int64.

    Costs of several consumers are summed, each as a share of that consumer's output energy, since
    batch norms and later layers see relative errors.
    """
    size = problem.group.size
    states = [_ConsumerState(consumer, member) for consumer, member in problem.consumers]
    alive = torch.ones(size, dtype=torch.bool)
    order = torch.empty(size, dtype=torch.int64)
    for step in range(size):
        cost = torch.stack([state.costs() for state in states]).sum(0)
        cost[~alive] = torch.inf
        channel = int(cost.argmin())
        alive[channel] = False
        order[step] = channel
        for state in states:
            state.remove(channel)
    return order


def consumer_columns(problem: LayerProblem, member: Member) -> Tensor:
    """Weight columns of each group channel, shape (group size, columns), int64."""
    width = problem.layer.columns_per_channel
    channels = torch.as_tensor(member.indices)
    columns = channels[:, None] * width + torch.arange(width)
    return columns.reshape(-1, member.per_channel * width)


class _ConsumerState:
    """One consumer's weight and inverse moments while channels go, one after another; float64."""

    def __init__(self, problem: LayerProblem, member: Member) -> None:
        statistics = problem.statistics
        assert statistics is not None
        h = damped_moment(statistics, problem.free_bias)
        self._columns = consumer_columns(problem, member)
        self._weight = problem.weight.double().clone()
        # A dead column costs nothing: its damping alone would price a large weight.
        self._weight[:, dead_columns(statistics, problem.free_bias)] = 0
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        self._energy = ((self._weight @ h) * self._weight).sum().clamp(min=1e-30)
        self._alive = torch.ones(len(self._columns), dtype=torch.bool)

    def costs(self) -> Tensor:
        """Output error of removing each channel now, as a share of the energy, shape (size,)."""
        columns = self._columns[self._alive]
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        weights = self._weight[:, columns].movedim(0, 1)
        solved = torch.linalg.solve(blocks, weights.transpose(1, 2))
        result = torch.zeros(len(self._alive), dtype=torch.float64)
        result[self._alive] = (weights.transpose(1, 2) * solved).sum((1, 2)) / self._energy
        return result

    def remove(self, channel: int) -> None:
        """Take a channel's columns out: update the weight, downdate the inverse."""
        columns = self._columns[channel]
        rows = self._inverse[columns]
        solved = torch.linalg.solve(rows[:, columns], rows)
        self._weight -= self._weight[:, columns] @ solved
        self._inverse -= rows.T @ solved
        self._alive[channel] = False
