"""Adaptive binary probabilities: counts in many contexts, mixed in the logistic domain.

Each decision is predicted by several contexts, each from counts of zeros and ones in that context;
the log-odds are summed with learned weights (M. Mahoney, "Adaptive weighing of context models for
lossless data compression", 2005, eq. for logistic mixing). Decisions come in blocks: all of a
block are predicted from earlier blocks, so that whole blocks are array operations, and the
weights follow by one Newton step per block on everything seen (online logistic regression).

Everything that reaches a probability is integer arithmetic or Python's own IEEE float operations
in a fixed order: reader and writer agree on every machine.
"""

from __future__ import annotations

import math
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.export.coding.ranges import PROBABILITY_BITS, Bools, Coder, Ints

# Log-odds are integers in units of 1/256; their limit is where a probability is 2**-17.
_UNIT = 256
_LARGEST = int(17 * math.log(2) * _UNIT)
_COUNT_LIMIT = 1 << 15
_WEIGHT_BITS = 16
_HALF = 32
_LOW = (1 << _HALF) - 1
_BOTH_HALVED = ~(1 << (_HALF - 1))
# ln (2 k + 1) for counts k.
_LOG = np.array([round(math.log(2 * k + 1) * _UNIT) for k in range(_COUNT_LIMIT)], np.int32)
_ONES = np.array(
    [
        round((1 << PROBABILITY_BITS) / (1 + math.exp(-x / _UNIT)))
        for x in range(-_LARGEST, _LARGEST + 1)
    ],
    np.int64,
)
_FIRST_WEIGHT = 0.2
# Curvature that the first weights are worth, in decisions: more makes the weights slower.
_STIFFNESS = 32.0
_LEARN_ALL, _LEARN_SHARE = 24, 4


@final
class Mixer:
    """Predicts and codes one kind of decision.

    Args:
        sizes: the number of values of each context, (m,).
        nodes: the number of different decisions; each context has counts for each.
        sets: the number of weight sets.
    """

    def __init__(self, sizes: tuple[int, ...], nodes: int, sets: int) -> None:
        self._nodes = nodes
        starts = np.cumsum([0, *sizes])
        self._starts = (starts[:-1, None] * nodes).astype(np.int64)
        cells = int(starts[-1]) * nodes
        # Zeros in the low half, ones in the high half: one table to look up and to add to.
        self._counts = np.zeros(cells, np.int64)
        self._coded = 0
        self._odds = np.zeros(cells, np.int32)
        self._weights = [_Weights(len(sizes)) for _ in range(sets)]

    def code(
        self,
        coder: Coder,
        wanted: Bools | None,
        contexts: Ints,
        nodes: Ints,
        which: int,
    ) -> Ints:
        """Code a block of decisions, then learn from it.

        Args:
            wanted: the bits, (n,); None where they are read.
            contexts: (m, n), each row under its size.
            nodes: which decision each is, (n,).
            which: the weight set.

        Returns:
            The bits, (n,).
        """
        cells = contexts * self._nodes + (nodes + self._starts)
        odds = self._odds[cells]
        weights = self._weights[which]
        mixed = (odds * weights.whole[:, None]).sum(0) >> _WEIGHT_BITS
        ones = _ONES[np.minimum(np.maximum(mixed, -_LARGEST), _LARGEST) + _LARGEST]
        bits = coder.bits(wanted, ones)
        if weights.due():
            weights.learn(odds, bits, ones)
        self._count(cells, bits)
        return bits

    def _count(self, cells: Ints, bits: Ints) -> None:
        flat = cells.reshape(-1)
        added = np.empty_like(cells)
        added[:] = np.where(bits == 1, 1 << _HALF, 1)
        np.add.at(self._counts, flat, added.reshape(-1))
        counts = self._counts[flat]
        self._coded += len(bits)
        if self._coded >= _COUNT_LIMIT:
            counts = self._halved(flat, counts)
        # The estimator of Krichevsky and Trofimov, as log-odds: ln (2 ones + 1) / (2 zeros + 1).
        self._odds[flat] = _LOG[counts >> _HALF] - _LOG[counts & _LOW]

    def _halved(self, flat: Ints, counts: Ints) -> Ints:
        while True:
            full = flat[np.maximum(counts >> _HALF, counts & _LOW) >= _COUNT_LIMIT]
            if not full.size:
                return counts
            full = np.unique(full)
            self._counts[full] = (self._counts[full] >> 1) & _BOTH_HALVED
            counts = self._counts[flat]


@final
class _Weights:
    """Weights of m log-odds, by online Newton steps on the coding cost."""

    def __init__(self, size: int) -> None:
        self._weights = [_FIRST_WEIGHT] * size
        self._curvature = [[_STIFFNESS * (i == j) for j in range(size)] for i in range(size)]
        self.whole = self._rounded()
        self._calls = 0

    def due(self) -> bool:
        """Whether to learn from this block: from all at first, later from a share."""
        self._calls += 1
        return self._calls <= _LEARN_ALL or self._calls % _LEARN_SHARE == 0

    def learn(self, odds: NDArray[np.int32], bits: Ints, ones: Ints) -> None:
        """Step towards lower cost on the block (m, n) just coded."""
        error = (bits << PROBABILITY_BITS) - ones
        spread = (ones * ((1 << PROBABILITY_BITS) - ones)) >> (2 * PROBABILITY_BITS - 12)
        # Whole numbers under 2**53 in float64: sums are exact in whatever order BLAS takes them.
        values = odds.astype(np.float64)
        slope = (odds.astype(np.int64) @ error).tolist()
        curve = ((values * spread) @ values.T).tolist()
        per_slope = 1.0 / (_UNIT << PROBABILITY_BITS)
        per_curve = 1.0 / (_UNIT * _UNIT * 4096)
        for i, row in enumerate(curve):
            for j, value in enumerate(row):
                self._curvature[i][j] += value * per_curve
        step = _solve(self._curvature, [x * per_slope for x in slope])
        self._weights = [
            min(max(w + s, -1.0), 2.0) for w, s in zip(self._weights, step, strict=True)
        ]
        self.whole = self._rounded()

    def _rounded(self) -> Ints:
        return np.array([round(w * (1 << _WEIGHT_BITS)) for w in self._weights], np.int64)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small positive definite system by Cholesky's method, in a fixed order."""
    size = len(right)
    factor = [[0.0] * size for _ in range(size)]
    middle = [0.0] * size
    for i in range(size):
        row = factor[i]
        for j in range(i):
            other = factor[j]
            total = matrix[i][j]
            for k in range(j):
                total -= row[k] * other[k]
            row[j] = total / other[j]
        total, value = matrix[i][i], right[i]
        for k in range(i):
            total -= row[k] * row[k]
            value -= row[k] * middle[k]
        row[i] = math.sqrt(max(total, 1e-9))
        middle[i] = value / row[i]
    for i in reversed(range(size)):
        value = middle[i]
        for k in range(i + 1, size):
            value -= factor[k][i] * middle[k]
        middle[i] = value / factor[i][i]
    return middle
