"""Single weights removed from a layer: by a score, or by the optimal brain surgeon with update.

For weight W (out x in) and damped input moments H the rows are independent of each other. Removing
weight p of a row at the least squared output error costs `w_p² / [H⁻¹]_pp`, and the others move by
`-w_p [H⁻¹]_p,: / [H⁻¹]_pp` (Hassibi & Stork 1993, optimal brain surgeon; row by row as in Frantar &
Alistarh 2022, OBC, eq. 3 to 5). Whatever the order, the weights that stay are those of a
least-squares refit, `W H_:K (H_KK)⁻¹`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

# A row's weights go in so many blocks: between two of them the scores are taken anew.
_BLOCKS = 32
# Numbers in the inverses that are held at a time: few enough for a processor's cache.
_HELD = 1 << 20
# Removed columns are carried along until they are this share; then the others are packed.
_SLACK = 0.1


@final
@dataclass(frozen=True)
class Groups:
    """Groups of a row's weights that lose `drop` of their `size` each.

    A group is `size` consecutive input channels at one kernel position (Mishra et al. 2021,
    Accelerating sparse deep neural networks). With groups of one weight a row is free.

    Attributes:
        width: columns of the unfolded weight that belong to one input channel.
    """

    drop: int
    size: int
    width: int

    def split(self, values: Tensor) -> Tensor:
        """Values by column, shape (out, in), by group: shape (out, in / size, size)."""
        parts = values.reshape(len(values), -1, self.size, self.width)
        return parts.transpose(2, 3).reshape(len(values), -1, self.size)

    def column(self, group: Tensor, place: Tensor) -> Tensor:
        """The columns of places within groups; all of one shape, int64."""
        first = group.div(self.width, rounding_mode="floor") * self.size
        return (first + place) * self.width + group % self.width


FREE = Groups(1, 1, 1)


@final
@dataclass(frozen=True)
class Removal:
    """The removal of a layer's weights, one after another.

    Attributes:
        columns: of each row, in the order of removal, shape (out, removed), int64.
        costs: what each removal adds to the row's squared output error, up to a factor that the
            layer's rows share, shape (out, removed), float64.
        ends: the numbers of removed weights, from 0, at which the weights are known.
        weights: those that are left then, updated, shape (len(ends), out, in), float32.
    """

    columns: Tensor
    costs: Tensor
    ends: tuple[int, ...]
    weights: Tensor


def by_score(score: Tensor) -> Tensor:
    """Flat indices of all weights, from the smallest score to the largest; score (out, in)."""
    return score.reshape(-1).argsort(stable=True)


def by_group_score(score: Tensor, groups: Groups) -> Tensor:
    """Flat indices of the weights with the smallest scores in their groups; score (out, in)."""
    place = groups.split(score).argsort(dim=2, stable=True)[:, :, : groups.drop]
    group = torch.arange(place.shape[1])[:, None].expand(place.shape)
    return flat(groups.column(group, place).reshape(len(score), -1), score.shape[1])


def flat(columns: Tensor, width: int) -> Tensor:
    """Flat indices of each row's columns, row after row; columns (out, n), rows of that width."""
    return (columns + width * torch.arange(len(columns))[:, None]).reshape(-1)


def remove(weight: Tensor, moment: Tensor, groups: Groups = FREE) -> Removal:
    """Remove weights of every row, those first that cost least, and update the others.

    The costs are exact for the order; the order is greedy up to a block of a 32nd of the row.

    Args:
        weight: shape (out, in).
        moment: H of the module's docstring, shape (in, in), float64, positive definite.
    """
    # Single precision needs numbers near one.
    moment = moment / moment.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment)).float()
    rows = max(1, _HELD // weight.shape[1] ** 2)
    parts = [_remove(part.float(), inverse, groups) for part in torch.split(weight, rows)]
    return Removal(
        torch.cat([part.columns for part in parts]),
        torch.cat([part.costs for part in parts]),
        parts[0].ends,
        torch.cat([part.weights for part in parts], 1),
    )


def merged(removal: Removal) -> Tensor:
    """Flat indices of all rows' weights, from the cheapest to the dearest.

    A row's blocks keep their order and stay whole: a block counts with the mean cost of its weights
    or, if that is more, of an earlier block.
    """
    sizes = [end - start for start, end in zip(removal.ends, removal.ends[1:], strict=False)]
    means = torch.stack([block.mean(1) for block in torch.split(removal.costs, sizes, 1)], 1)
    price = means.cummax(1).values.repeat_interleave(torch.tensor(sizes), 1)
    cheapest = price.reshape(-1).argsort(stable=True)
    return flat(removal.columns, removal.weights.shape[2])[cheapest]


def refitted(weight: Tensor, moment: Tensor, removal: Removal, gone: Tensor) -> Tensor:
    """The weights once some are gone, the others refitted; shape (out, in), float32.

    Args:
        weight: as it was given to `remove`, and `moment` too.
        gone: flat indices, of every row the first in its order of removal.
    """
    out, width = weight.shape
    counts = torch.bincount(gone.div(width, rounding_mode="floor"), minlength=out)
    ends = torch.tensor(removal.ends)
    known = torch.searchsorted(ends, counts, right=True) - 1
    result = removal.weights[known, torch.arange(out)]
    for row in (ends[known] < counts).nonzero()[:, 0].tolist():
        kept = torch.ones(width, dtype=torch.bool)
        kept[removal.columns[row, : counts[row]]] = False
        result[row] = least_squares(weight[row], moment, kept)
    return result


def least_squares(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """One row's weights, zero where not kept, that reproduce its output best.

    Args:
        weight: shape (in,).
        moment: shape (in, in), float64.
        kept: shape (in,), bool.

    Returns:
        Shape (in,), float32.
    """
    factor = torch.linalg.cholesky(moment[kept][:, kept])
    result = torch.zeros(len(weight))
    wanted = moment[kept] @ weight.double()
    result[kept] = torch.cholesky_solve(wanted[:, None], factor)[:, 0].float()
    return result


def _remove(weight: Tensor, inverse: Tensor, groups: Groups) -> Removal:
    """Every group loses one weight in each of `drop` rounds; a round goes block by block."""
    count = weight.shape[1] // groups.size
    block = max(1, count * groups.drop // _BLOCKS)
    rows = _Rows(weight, inverse)
    columns, costs, ends, weights = [], [], [0], [rows.weights()]
    for _ in range(groups.drop):
        done = torch.zeros(len(weight), count, dtype=torch.bool)
        for start in range(0, count, block):
            score, place = groups.split(rows.scores()).min(2)
            score = score.masked_fill(done, torch.inf)
            chosen = score.argsort(dim=1, stable=True)[:, : min(block, count - start)]
            done.scatter_(1, chosen, True)
            columns.append(groups.column(chosen, place.gather(1, chosen)))
            costs.append(rows.remove(columns[-1]))
            ends.append(ends[-1] + chosen.shape[1])
            weights.append(rows.weights())
    return Removal(torch.cat(columns, 1), torch.cat(costs, 1), tuple(ends), torch.stack(weights))


@final
class _Rows:
    """Weights and inverse moments of some rows, each of which loses columns of its own.

    After columns M are gone, `inverse` of a row is (H_KK)⁻¹ on the columns K that stay; those in M
    are carried along until the next packing.
    """

    def __init__(self, weight: Tensor, inverse: Tensor) -> None:
        rows, self._width = weight.shape
        self._weight = weight.clone()
        self._inverse = inverse.repeat(rows, 1, 1)
        self._columns = torch.arange(self._width).repeat(rows, 1)
        self._alive = torch.ones(weight.shape, dtype=torch.bool)

    def weights(self) -> Tensor:
        """By column, zero where they are gone, shape (rows, in)."""
        return torch.zeros(self._whole()).scatter_(1, self._columns, self._weight)

    def scores(self) -> Tensor:
        """Cost of removing each weight next, infinite where it is gone, shape (rows, in)."""
        diagonal: Tensor = self._inverse.diagonal(dim1=1, dim2=2)
        scores = self._weight.square() / diagonal
        scores = scores.masked_fill(~self._alive, torch.inf)
        result = torch.full(self._whole(), torch.inf)
        return result.scatter_(1, self._columns, scores)

    def remove(self, gone: Tensor) -> Tensor:
        """Remove some columns of each row, shape (rows, n), in this order; returns their costs.

        With [H⁻¹]_MM = L Lᵀ, the costs one by one are the squares of L⁻¹ w_M.
        """
        at = self._places(gone)
        row = torch.arange(len(at))[:, None]
        lines = self._inverse[row, at]
        square = lines.gather(2, at[:, None, :].expand(-1, at.shape[1], -1))
        factor = torch.linalg.cholesky(square)
        lines = torch.linalg.solve_triangular(factor, lines, upper=False)
        weight = self._weight.gather(1, at)[:, :, None]
        parts: Tensor = torch.linalg.solve_triangular(factor, weight, upper=False)
        self._weight -= (parts.transpose(1, 2) @ lines)[:, 0]
        self._inverse.baddbmm_(lines.transpose(1, 2), lines, alpha=-1)
        self._alive.scatter_(1, at, False)
        self._weight.masked_fill_(~self._alive, 0)
        self._pack()
        return parts[:, :, 0].double().square()

    def _places(self, columns: Tensor) -> Tensor:
        """Where columns that are still held stand, both of shape (rows, n), int64."""
        places = torch.arange(self._columns.shape[1]).expand_as(self._columns)
        by_column = torch.zeros(self._whole(), dtype=torch.int64)
        return by_column.scatter_(1, self._columns, places).gather(1, columns)

    def _whole(self) -> tuple[int, int]:
        return len(self._weight), self._width

    def _pack(self) -> None:
        rows, held = self._alive.shape
        left = int(self._alive[0].sum())
        if left > (1 - _SLACK) * held:
            return
        kept = self._alive.nonzero()[:, 1].reshape(rows, left)
        pairs = zip(self._inverse, kept, strict=True)
        self._inverse = torch.stack([m.index_select(0, k).index_select(1, k) for m, k in pairs])
        self._weight = self._weight.gather(1, kept)
        self._columns = self._columns.gather(1, kept)
        self._alive = torch.ones(kept.shape, dtype=torch.bool)
