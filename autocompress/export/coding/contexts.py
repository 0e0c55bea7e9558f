"""What is known about an entry before it is coded: integer statistics of what went before."""

from __future__ import annotations

from math import isqrt
from typing import final

import numpy as np

from autocompress.export.coding.layout import Layout
from autocompress.export.coding.ranges import Ints

# Means have 16 binary places; their logarithms come in eighths of an octave.
_PLACES = 16
_PER_OCTAVE = 8
# Eighth roots of powers of two in integers, so that no platform rounds them otherwise.
_THRESHOLDS = np.array([isqrt(isqrt(isqrt(1 << k))) for k in range(46 * _PER_OCTAVE)], np.int64)
# Magnitudes count as at most this, so that sums stay far from overflow.
_LARGEST = 1 << 24
# Entries that a wider mean is worth when a narrower one has seen little.
_PRIOR = 4
_FINE, _ROUGH, _PHASES = 40, 10, 64
MAGNITUDE_CONTEXTS = (
    8, _FINE, _ROUGH * _ROUGH, _ROUGH * _ROUGH, 9 * _ROUGH, 9 * _ROUGH, _PHASES * _ROUGH,
)  # fmt: skip
# The first of these, for decisions that hardly depend on the rest.
DETAIL_CONTEXTS = 2
SIGN_CONTEXTS = (1, 9, 9, 27)


@final
class Past:
    """Sums over everything coded so far of one tensor.

    Args:
        layout: the order of coding.
        step: a typical magnitude, as in `steps`.
    """

    def __init__(self, layout: Layout, step: int) -> None:
        phases, channels = layout.phases, layout.channels
        self._step = step
        self._origin = _log(np.array(step << _PLACES))
        self._columns = np.zeros((phases, channels), np.int64)
        self._above = np.zeros((2, phases, channels), np.int64)
        self._rows_seen = 0
        self._total = self._count = 0
        self.start_group(0)

    def start_group(self, rows: int) -> None:
        """Begin with the next rows."""
        channels = self._columns.shape[1]
        self._row_sums, self._row_count = np.zeros(rows, np.int64), 0
        self._near = np.zeros((rows, channels), np.int64)
        self._last = np.zeros((2, rows, channels), np.int64)
        phases = len(self._columns)
        self._overall = _mean(np.array(self._total), self._count, 1 << _PLACES, _PRIOR)
        channel_means = _mean(self._columns.sum(0), self._rows_seen * phases, self._overall, _PRIOR)
        self._column_logs = _log(_mean(self._columns, self._rows_seen, channel_means, _PRIOR))

    def contexts(self, phase: int, start: int, stop: int) -> tuple[Ints, Ints]:
        """Contexts of the rows' entries in one phase, channels `start` to `stop`.

        Returns:
            Of magnitudes (7, n) and of signs (4, n), row after row.
        """
        overall = _log(self._overall)
        row_means = _mean(self._row_sums, self._row_count, self._overall, 2 * _PRIOR)
        rows = _log(row_means)[:, None] - self._origin
        columns = self._column_logs[phase, start:stop][None, :] - self._origin
        expected = rows + columns - (overall - self._origin)
        near = _log(_mean(self._near[:, start:stop], phase, row_means[:, None], 1)) - self._origin
        rough = _rough(expected)
        last, before = (_side(x[:, start:stop], self._step) for x in self._last)
        above, higher = (_side(x[phase, start:stop], self._step)[None, :] for x in self._above)
        size = near.shape
        magnitude = np.empty((len(MAGNITUDE_CONTEXTS), *size), np.int64)
        magnitude[0] = self._emptiness(phase, start, stop)
        magnitude[1] = np.clip((expected >> 1) + _FINE // 2, 0, _FINE - 1)
        magnitude[2] = _rough(rows) * _ROUGH + _rough(columns)
        magnitude[3] = _rough(near) * _ROUGH + rough
        magnitude[4] = (abs(last) * 3 + abs(before)) * _ROUGH + rough
        magnitude[5] = (abs(above) * 3 + abs(higher)) * _ROUGH + rough
        magnitude[6] = min(phase, _PHASES - 1) * _ROUGH + rough
        sign = np.empty((len(SIGN_CONTEXTS), *size), np.int64)
        a, b, c, d = (np.sign(x) + 1 for x in (last, before, above, higher))
        sign[0] = 0
        sign[1] = a * 3 + b
        sign[2] = c * 3 + d
        sign[3] = (a * 3 + b) * 3 + c
        return magnitude.reshape(len(magnitude), -1), sign.reshape(len(sign), -1)

    def _emptiness(self, phase: int, start: int, stop: int) -> Ints:
        """Whether row, column and kernel held only zeros so far: pruned ones do."""
        rows = (self._row_sums == 0)[:, None] * 4
        columns = (self._columns[phase, start:stop] == 0)[None, :] * 2
        kernels = self._near[:, start:stop] == 0
        return np.asarray(rows + columns + kernels, np.int64)

    def add(self, phase: int, start: int, values: Ints) -> None:
        """Take in the values (rows, n) of one phase from channel `start`."""
        stop = start + values.shape[1]
        sizes = np.minimum(abs(values), _LARGEST)
        self._row_sums += sizes.sum(1)
        self._row_count += values.shape[1]
        self._near[:, start:stop] += sizes
        self._last[1, :, start:stop] = self._last[0, :, start:stop]
        self._last[0, :, start:stop] = values
        self._columns[phase, start:stop] += sizes.sum(0)
        if len(values) > 1:
            self._above[:, phase, start:stop] = values[:-3:-1]
        else:
            self._above[1, phase, start:stop] = self._above[0, phase, start:stop]
            self._above[0, phase, start:stop] = values[0]

    def end_group(self) -> None:
        """Take the group's rows into the totals."""
        self._rows_seen += len(self._row_sums)
        self._total += int(self._row_sums.sum())
        self._count += self._row_count * len(self._row_sums)


def _mean(total: Ints, count: int, wider: Ints | int, prior: int) -> Ints:
    return np.asarray(((total << _PLACES) + wider * prior) // (count + prior), np.int64)


def _log(means: Ints) -> Ints:
    """Logarithm in eighths of an octave of numbers with 16 binary places."""
    return np.asarray(np.searchsorted(_THRESHOLDS, means, side="right"), np.int64)


def _rough(logs: Ints) -> Ints:
    octaves = (logs + _PER_OCTAVE // 2) // _PER_OCTAVE
    return np.asarray(np.minimum(np.maximum(octaves + _ROUGH // 2, 0), _ROUGH - 1), np.int64)


def _side(values: Ints, step: int) -> Ints:
    """-2 to 2: sign, and whether the magnitude is zero, small or large."""
    return np.asarray(np.sign(values) + (values > step) - (values < -step), np.int64)
