"""Integers whose order means nothing: one adaptive histogram."""

from __future__ import annotations

import numpy as np

from autocompress.export.coding.ranges import Coder, Ints

LARGEST_ALPHABET = 1 << 12
_FIRST_BLOCK, _LARGEST_BLOCK = 16, 4096


def code_histogram(coder: Coder, wanted: Ints | None, count: int, alphabet: int) -> Ints:
    """Code symbols by their counts so far (R. Krichevsky and V. Trofimov, 1981).

    Args:
        wanted: symbols under `alphabet`, (count,); None where they are read.
    """
    result = np.zeros(count, np.int64)
    weights = np.ones(alphabet, np.int64)
    start, size = 0, _FIRST_BLOCK
    while start < count:
        stop = min(start + size, count)
        block = coder.symbols(None if wanted is None else wanted[start:stop], weights, stop - start)
        result[start:stop] = block
        weights += 2 * np.bincount(block, minlength=alphabet)
        start, size = stop, min(2 * size, _LARGEST_BLOCK)
    return result


def entropy_bytes(symbols: Ints) -> float:
    """Zero-order empirical entropy of symbols from 0, in bytes: no histogram needs less."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float((counts * np.log2(len(symbols) / counts)).sum()) / 8
