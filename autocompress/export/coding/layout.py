"""The order in which a tensor's entries are coded, so that much is known when each comes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import final

import numpy as np

from autocompress.export.coding.ranges import Ints

# A block is predicted from earlier blocks only: larger is faster, smaller adapts sooner.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 128, 2048
_WIDEST_BLOCK = 8192
_FIRST_RANGE = 12
_FIRST_BLOCK = 16
_BLOCKS = 48
_PHASES = 8
_MOST_PHASES = 64


@final
@dataclass(frozen=True)
class Layout:
    """A tensor seen as rows (output channels) of `phases` times `channels` entries.

    In a convolution the phases are the kernel positions, so that a kernel's earlier positions are
    known when its next one is coded, for all input channels at once. In a matrix neighbouring
    columns take the part of a kernel. The last channel may be short of its last phases.

    Args:
        shape: the tensor's shape as given.
        swapped: dimensions 0 and 1 are exchanged first: weights stored as (in, out).
    """

    shape: tuple[int, ...]
    swapped: bool

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._turned[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Entries per row."""
        return prod(self.shape) // self.rows if self.rows else 0

    @property
    def phases(self) -> int:
        """Steps in which a group of rows is coded."""
        kernel = prod(self._turned[2:]) if len(self.shape) > 2 else 1
        if 1 < kernel <= _MOST_PHASES:
            return kernel
        wanted = min(_PHASES, self.columns // 16) if self.rows > _PHASES else self.columns // 128
        return max(1, min(wanted, self.columns, _MOST_PHASES))

    @property
    def channels(self) -> int:
        """Columns of a phase, rounded up."""
        return -(-self.columns // self.phases)

    def width(self, phase: int) -> int:
        """Columns of one phase."""
        return (self.columns - phase - 1) // self.phases + 1

    def matrix(self, tensor: Ints) -> Ints:
        """The tensor as (rows, columns); column j is phase j % phases of channel j // phases."""
        turned = tensor.reshape(self.shape)
        if self.swapped:
            turned = turned.swapaxes(0, 1)
        matrix: Ints = turned.reshape(self.rows, self.columns)
        return matrix

    def tensor(self, matrix: Ints) -> Ints:
        """The flat tensor of `matrix`."""
        if not self.swapped:
            return np.ravel(matrix)
        tensor: Ints = matrix.reshape(self._turned).swapaxes(0, 1).reshape(-1)
        return tensor

    def row_groups(self) -> list[tuple[int, int]]:
        """First and last-but-one rows that are coded together: few at first, then more."""
        block = min(max(self.rows * self.columns // _BLOCKS, _SMALLEST_BLOCK), _LARGEST_BLOCK)
        most = max(1, block // max(self.channels, 1))
        groups, start, size = [], 0, min(most, max(1, _FIRST_BLOCK // max(self.channels, 1)))
        while start < self.rows:
            stop = min(start + size, self.rows)
            groups.append((start, stop))
            size = min(most, max(size, stop // 2))
            start = stop
        return groups

    def spans(self, phase: int) -> list[tuple[int, int]]:
        """Channel ranges of a phase that are coded at once.

        The first phase comes in short ranges, since of a row nothing is known before it.
        """
        width = self.width(phase)
        size = _WIDEST_BLOCK if phase else _FIRST_RANGE
        spans, start = [], 0
        while start < width:
            stop = min(start + size, width)
            spans.append((start, stop))
            start, size = stop, min(2 * size, _WIDEST_BLOCK)
        return spans

    @property
    def _turned(self) -> tuple[int, ...]:
        if not self.swapped:
            return self.shape
        return (self.shape[1], self.shape[0], *self.shape[2:])


def layouts(shape: tuple[int, ...]) -> tuple[Layout, ...]:
    """The layouts worth trying for a tensor."""
    if len(shape) > 1 and min(shape[:2]) > 1:
        return Layout(shape, False), Layout(shape, True)
    return (Layout(shape, False),)
