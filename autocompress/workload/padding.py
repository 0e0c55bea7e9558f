"""Padding at the end of samples, which may be cut off where nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class Padding:
    """Which axis of each input ends in padding that the network's outputs do not depend on.

    A sample's padding is what follows the last position at which any of these inputs differs from
    its own end. One position of it always stays.

    Attributes:
        axes: per input, None where it has no such axis; empty where nothing can be cut off.
        shortest: positions that always stay, since the network is not known to take fewer.
    """

    axes: tuple[int | None, ...] = ()
    shortest: int = 1

    @property
    def key(self) -> tuple[int | None, ...]:
        """What tells it from others in the names of files; empty without padding."""
        return (*self.axes, self.shortest) if self.axes else ()

    def lengths(self, inputs: Inputs) -> Tensor:
        """Positions of each sample that have to stay, shape (n,), int64; zeros without padding."""
        lengths = torch.zeros(len(inputs[0]), dtype=torch.long)
        for x, axis in zip(inputs, self.axes, strict=False):
            if axis is not None:
                rows = x.movedim(axis, 1).reshape(len(x), x.shape[axis], -1)
                other = (rows != rows[:, -1:]).any(2)
                places = torch.arange(1, x.shape[axis] + 1, device=x.device)
                ends = (other * places).amax(1) + 1
                # Samples that are shorter as a whole stay whole.
                ends = ends.clamp(min=self.shortest).clamp(max=x.shape[axis])
                lengths = torch.maximum(lengths, ends.cpu())
        return lengths

    def cut(self, inputs: Inputs) -> Inputs:
        """A batch without what is padding in all of its samples."""
        if not self.axes:
            return inputs
        longest = int(self.lengths(inputs).max())
        return tuple(
            x if axis is None else x.narrow(axis, 0, longest)
            for x, axis in zip(inputs, self.axes, strict=True)
        )

    def positions(self, inputs: Inputs) -> int:
        """Samples of a batch; with padding times their positions."""
        pairs = zip(inputs, self.axes, strict=False)
        return len(inputs[0]) * max((x.shape[a] for x, a in pairs if a is not None), default=1)

    def batches(self, inputs: Inputs, size: int) -> Iterator[Inputs]:
        """Samples in their order; with padding by rising length, and without most of it."""
        if not self.axes:
            yield from zip(*(torch.split(x, size) for x in inputs), strict=True)
            return
        for part in self.parts(inputs, size):
            yield self.cut(tuple(x[part] for x in inputs))

    def parts(self, inputs: Inputs, size: int) -> tuple[Tensor, ...]:
        """Samples' numbers by rising length, so many together; in their order without padding."""
        return torch.split(self.lengths(inputs).argsort(stable=True), size)


NO_PADDING = Padding()
