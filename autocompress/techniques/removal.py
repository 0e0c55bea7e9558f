"""The greedy order in which a group's channels are removed, for the layers that read them.

A channel's price is that of `reconstruction`'s equation: with W the weight, P the inverse of the
damped moments of the inputs and M the channel's columns, `tr(([P]_MM)^-1 [G]_MM)`, where G = WᵀW.
Removing it takes `P_:M ([P]_MM)^-1 P_M:` from P and `W_M ([P]_MM)^-1 P_M:` from W (Frantar and
Alistarh 2022, Optimal Brain Compression, eq. 5). Only P and G within the group are needed, so the
number of outputs does not matter, and both change by terms of low rank, which are gathered and
taken off together.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from autocompress.graph import Member
from autocompress.techniques.reconstruction import damped_moment, dead_columns
from autocompress.techniques.technique import GroupProblem, LayerProblem

# Columns whose terms are taken off P and G together.
_PANEL = 96


def removal_order(problem: GroupProblem) -> Tensor:
    """Greedy order in which a group's channels are removed, shape (size,), int64.

    Costs of several consumers are summed, each as a share of that consumer's output energy, since
    batch norms and later layers see relative errors.
    """
    size = problem.group.size
    states = [Consumer(consumer, member) for consumer, member in problem.consumers]
    order = torch.empty(size, dtype=torch.int64)
    for step in range(size):
        cost = torch.stack([state.costs() for state in states]).sum(0)
        channel = int(cost.argmin())
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


@final
class Consumer:
    """What one layer would lose by each channel, while channels go one after another; float64."""

    def __init__(self, problem: LayerProblem, member: Member) -> None:
        statistics = problem.statistics
        assert statistics is not None
        moment = damped_moment(statistics, problem.free_bias)
        weight = problem.weight.double().clone()
        # A dead column costs nothing: its damping alone would price a large weight.
        weight[:, dead_columns(statistics, problem.free_bias)] = 0
        energy = ((weight @ moment) * weight).sum().clamp(min=1e-30)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        columns = consumer_columns(problem, member)
        self._size, self._width = columns.shape
        flat = columns.reshape(-1)
        self._inverse = inverse[flat][:, flat]
        self._gram = weight[:, flat].T @ weight[:, flat] / energy
        self._channels = torch.arange(self._size)
        self._place = self._channels.clone()
        self._begin_panel()

    def costs(self) -> Tensor:
        """Output error of removing each channel now, as a share of the energy, shape (size,).

        Infinite for those that are gone.
        """
        result = torch.full((self._size,), torch.inf, dtype=torch.float64)
        alive = self._alive
        if self._width == 1:
            found = self._gram_blocks[alive, 0, 0] / self._inverse_blocks[alive, 0, 0]
        else:
            solved = torch.linalg.solve(self._inverse_blocks[alive], self._gram_blocks[alive])
            found = solved.diagonal(dim1=1, dim2=2).sum(1)
        result[self._channels[alive]] = found
        return result

    def remove(self, channel: int) -> None:
        """Take a channel's columns out."""
        place, width, end = int(self._place[channel]), self._width, self._filled
        mine = slice(place * width, (place + 1) * width)
        one, other = self._one[:, :end], self._other[:, :end]
        inverse = self._inverse[mine] - one[mine] @ one.T
        gram = self._gram[mine] - other[mine] @ one.T - one[mine] @ other.T
        root = torch.linalg.cholesky(torch.linalg.inv(inverse[:, mine]))
        # P loses a aᵀ, and G loses b aᵀ + a bᵀ.
        a = inverse.T @ root
        b = gram.T @ root - 0.5 * a @ (root.T @ gram[:, mine] @ root)
        self._one[:, end : end + width], self._other[:, end : end + width] = a, b
        self._filled += width
        a, b = (x.reshape(-1, width, width) for x in (a, b))
        self._inverse_blocks -= a @ a.mT
        cross = b @ a.mT
        self._gram_blocks -= cross + cross.mT
        self._alive[place] = False
        if self._filled + width > self._one.shape[1] and bool(self._alive.any()):
            self._end_panel()

    def _begin_panel(self) -> None:
        """Nothing is gathered yet; every channel that P and G hold is there."""
        count, width = len(self._channels), self._width
        shape = (count * width, max(_PANEL, width))
        self._one, self._other = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self._filled = 0
        self._alive = torch.ones(count, dtype=torch.bool)
        blocks = (count, width, count, width)
        self._inverse_blocks, self._gram_blocks = (
            matrix.reshape(blocks).diagonal(dim1=0, dim2=2).movedim(2, 0).clone()
            for matrix in (self._inverse, self._gram)
        )

    def _end_panel(self) -> None:
        """Take off what was gathered, and drop the channels that are gone."""
        keep = self._alive.repeat_interleave(self._width)
        one, other = self._one[keep, : self._filled], self._other[keep, : self._filled]
        cross = other @ one.T
        self._inverse = self._inverse[keep][:, keep] - one @ one.T
        self._gram = self._gram[keep][:, keep] - cross - cross.T
        self._channels = self._channels[self._alive]
        self._place[self._channels] = torch.arange(len(self._channels))
        self._begin_panel()
