"""Importance of a group's channels by the classic criteria: the least important goes first.

Every function gives one value per channel, shape (size,), float64. A coupled channel has several
layers that write or read it; each gives shares of its own mean over the channels, and the shares
are averaged: otherwise the layer with the largest weights, which is often just the one with the
widest kernel or a batch norm behind it to undo the scale, would decide alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autocompress.errors import PlanError
from autocompress.graph import Member
from autocompress.techniques.removal import consumer_columns
from autocompress.techniques.technique import GroupProblem, LayerStatistics

_TINY = 1e-30


def l1_importance(problem: GroupProblem) -> Tensor:
    """Sum of the absolute weights of a channel's filters (Li et al. 2017, section 3.1).

    Where grouped convolutions alone write the channels, the weights that read them are taken.
    """
    return _incoming(problem, 1)


def l2_importance(problem: GroupProblem) -> Tensor:
    """Euclidean norm of a channel's filters (He et al. 2018, soft filter pruning, eq. 2).

    Where grouped convolutions alone write the channels, the weights that read them are taken.
    """
    return _incoming(problem, 2)


def connection_importance(problem: GroupProblem) -> Tensor:
    """Norm of the weights that write a channel times the norm of those that read it.

    A channel scaled up by its writers and down by its readers keeps its value. Where grouped
    convolutions alone write the channels, or read them, the other side's norm is squared.
    """
    return _incoming(problem, 2) * _outgoing(problem, 2)


def taylor_importance(problem: GroupProblem) -> Tensor:
    """Squared change of the loss without a channel, to first order (Molchanov et al. 2019, eq. 8).

    Summed over the readers without their cross terms. The values are in units of the loss, so
    they need no shares.

    Raises:
        PlanError: no reader has gradients.
    """
    found = [
        reader.gradients.taylor.double()[_per_channel(member)].sum(1)
        for reader, member in problem.consumers
        if reader.gradients is not None
    ]
    return _stacked(found, problem, "gradients").sum(0)


def activation_importance(problem: GroupProblem) -> Tensor:
    """Mean magnitude E|x| of a channel's feature map, as its readers see it.

    Raises:
        PlanError: no reader has statistics.
    """
    found = [
        _shares(statistics.magnitude[columns].mean(1)) for statistics, columns in _observed(problem)
    ]
    return _stacked(found, problem, "statistics").mean(0)


def nonzero_importance(problem: GroupProblem) -> Tensor:
    """One minus the average percentage of zeros of a channel (Hu et al. 2016, APoZ, eq. 1).

    Padding adds the same share of zeros to every channel, which leaves their order alone.

    Raises:
        PlanError: no reader has statistics.
    """
    found = [
        1 - statistics.zero_share[columns].mean(1) for statistics, columns in _observed(problem)
    ]
    return _stacked(found, problem, "statistics").mean(0)


def ascending(*importances: Tensor) -> Tensor:
    """Channels from the least important, shape (size,), int64; later keys only break ties."""
    order = torch.arange(len(importances[0]))
    for key in reversed(importances):
        order = order[key[order].argsort(stable=True)]
    return order


def _incoming(problem: GroupProblem, power: int) -> Tensor:
    writers = [_norms(p.weight[_per_channel(m)], power) for p, m in problem.producers]
    if not writers:
        return _outgoing(problem, power)
    return torch.stack([_shares(norms) for norms in writers]).mean(0)


def _outgoing(problem: GroupProblem, power: int) -> Tensor:
    readers = [_norms(p.weight.T[consumer_columns(p, m)], power) for p, m in problem.consumers]
    if not readers and problem.producers:
        return _incoming(problem, power)
    return _stacked([_shares(norms) for norms in readers], problem, "dense layers").mean(0)


def _per_channel(member: Member) -> Tensor:
    """A side's indices of each group channel, shape (size, per_channel), int64."""
    return torch.as_tensor(member.indices).reshape(-1, member.per_channel)


def _norms(weights: Tensor, power: int) -> Tensor:
    """Norm of each channel's weights, all dimensions but the first together."""
    norms: Tensor = torch.linalg.vector_norm(weights.double().flatten(1), ord=power, dim=1)
    return norms


def _shares(values: Tensor) -> Tensor:
    return values / values.mean().clamp(min=_TINY)


def _observed(problem: GroupProblem) -> list[tuple[LayerStatistics, Tensor]]:
    """Statistics of every reader that has some, with the columns of each channel."""
    return [
        (reader.statistics, consumer_columns(reader, member))
        for reader, member in problem.consumers
        if reader.statistics is not None
    ]


def _stacked(values: Sequence[Tensor], problem: GroupProblem, missing: str) -> Tensor:
    if not values:
        raise PlanError(
            f"The channels of '{problem.group.name}' cannot be judged by this criterion.",
            given=f"no layer that reads them has {missing}",
            allowed="criteria l1 and l2, if a convolution or linear layer writes the channels",
        )
    return torch.stack(list(values))
