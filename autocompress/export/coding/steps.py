"""Magnitudes as yes/no questions: a tree of thresholds in the manner of Golomb's code.

Small magnitudes are asked for one by one, larger ones in steps that grow, then halved. Questions of
the form "at least t?" depend smoothly on the scale of the surroundings, which is what the contexts
of `ordered` know (as DeepCABAC's binarization: S. Wiedemann et al., arXiv:1907.11900, section III).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from autocompress.export.coding.ranges import PROBABILITY_BITS, Coder, Ints

# Steps of one size before the size doubles.
_STEPS_PER_SIZE = 4
# An interval is halved this often, far ones less; the bits below are coded evenly.
_PART_BITS, _FAR_PART_BITS = 5, 2
_NEAR = 2 * _STEPS_PER_SIZE
LARGEST_MAGNITUDE = 1 << 34


@final
@dataclass(frozen=True, eq=False)
class StepTree:
    """Questions and leaves; nodes under `questions` ask, the others are leaves.

    Args:
        thresholds: per question, (q,); a magnitude of at least this goes to `children[:, 1]`.
        children: next nodes, (q, 2); q and above are leaves, leaf k is q + k.
        bases: least magnitude of each leaf, (l,).
        even_bits: bits of each leaf that are coded evenly, (l,).
        chain: number of questions that are asked first, one step after another.
    """

    thresholds: Ints
    children: Ints
    bases: Ints
    even_bits: Ints
    chain: int

    @property
    def questions(self) -> int:
        """Number of questions."""
        return len(self.thresholds)


def step_size(magnitudes: Ints) -> int:
    """The first step for magnitudes of this mean: Golomb's parameter for a geometric law."""
    size = max(1, (int(magnitudes.sum()) * 7) // (10 * max(magnitudes.size, 1)))
    return min(size, LARGEST_MAGNITUDE)


def step_tree(step: int, largest: int) -> StepTree:
    """The tree for magnitudes from 0 to `largest`."""
    edges, size = [0], step
    while edges[-1] <= largest:
        for _ in range(_STEPS_PER_SIZE):
            edges.append(edges[-1] + size)
        size *= 2
    edges = [e for e in edges if e <= largest]
    stops = [*edges[1:], largest + 1]
    builder = _Builder()
    builder.add(edges, stops)
    return builder.tree()


def _part_bits(interval: int) -> int:
    return _PART_BITS if interval < _NEAR else _FAR_PART_BITS


@final
class _Builder:
    def __init__(self) -> None:
        self._thresholds: list[int] = []
        self._children: list[tuple[int, int]] = []
        self._leaves: list[tuple[int, int]] = []
        self._chained = 0

    def add(self, edges: list[int], stops: list[int]) -> None:
        """A chain of questions over the intervals, each interval then halved."""
        self._chain(edges, stops)

    def tree(self) -> StepTree:
        count = len(self._thresholds)
        children = [tuple(c if c >= 0 else count - 1 - c for c in pair) for pair in self._children]
        bases, bits = zip(*self._leaves, strict=True)
        return StepTree(
            np.array(self._thresholds, np.int64),
            np.array(children, np.int64).reshape(-1, 2),
            np.array(bases, np.int64),
            np.array(bits, np.int64),
            self._chained,
        )

    def _chain(self, edges: list[int], stops: list[int]) -> None:
        self._chained = len(edges) - 1
        chain = []
        for threshold in edges[1:]:
            chain.append(len(self._thresholds))
            self._thresholds.append(threshold)
            self._children.append((0, 0))
        inner = [
            self._halve(a, b, max((b - a - 1).bit_length() - _part_bits(k), 0))
            for k, (a, b) in enumerate(zip(edges, stops, strict=True))
        ]
        for place, node in enumerate(chain):
            last = place + 1 == len(chain)
            self._children[node] = (inner[place], inner[-1] if last else chain[place + 1])

    def _halve(self, start: int, stop: int, even_bits: int) -> int:
        """The node for [start, stop); leaves are negative, -1 - k, until all are known."""
        if stop - start <= 1 << even_bits:
            self._leaves.append((start, even_bits))
            return -len(self._leaves)
        node = len(self._thresholds)
        units = -(-(stop - start) >> even_bits)
        middle = start + ((units // 2) << even_bits)
        self._thresholds.append(middle)
        self._children.append((0, 0))
        left = self._halve(start, middle, even_bits)
        self._children[node] = (left, self._halve(middle, stop, even_bits))
        return node


def code_even(coder: Coder, wanted: Ints | None, bits: Ints) -> Ints:
    """Numbers under 2**bits, all equally likely, bits (n,) may differ."""
    result = np.zeros(len(bits), np.int64)
    for place in range(int(bits.max(initial=0))):
        active = np.flatnonzero(bits > place)
        half = np.full(len(active), 1 << (PROBABILITY_BITS - 1), np.int64)
        bit = None if wanted is None else (wanted[active] >> place) & 1 == 1
        result[active] += coder.bits(bit, half) << place
    return result
