"""Range coding: one interface for writing and reading, so that a model is written only once.

A model calls the same methods in the same order on both sides; a writer is given the values, a
reader finds them. The coder is the range coder of constriction (R. Bamler, "Understanding entropy
coding with asymmetric numeral systems", arXiv:2201.01741; G. Martin, "Range encoding", 1979).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import constriction
import numpy as np
from numpy.typing import NDArray

from autocompress.errors import ExportError

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Probabilities are multiples of 2**-20: exact in every float format on the way to the coder.
PROBABILITY_BITS = 20
_SCALE = 2.0**-PROBABILITY_BITS
_WORD_BYTES = 4
_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)


class Coder(ABC):
    """What a model speaks to: a writer or a reader."""

    @abstractmethod
    def bits(self, wanted: Bools | None, ones: Ints) -> Ints:
        """Code one bit per probability.

        Args:
            wanted: the bits, (n,); None where they are read.
            ones: probabilities of a one in units of 2**-20, (n,), above 0 and under 2**20.

        Returns:
            The bits, (n,).
        """

    @abstractmethod
    def symbols(self, wanted: Ints | None, weights: Ints, count: int) -> Ints:
        """Code symbols of one distribution.

        Args:
            wanted: symbols from 0 to len(weights) - 1, (count,); None where they are read.
            weights: positive integers in proportion to the probabilities.
        """


@final
class Writer(Coder):
    """Codes into bytes."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def bits(self, wanted: Bools | None, ones: Ints) -> Ints:
        """Write bits; see `Coder`."""
        assert wanted is not None
        if wanted.size:
            self._encoder.encode(wanted.astype(np.int32), _BERNOULLI, ones * _SCALE)
        return wanted.astype(np.int64)

    def symbols(self, wanted: Ints | None, weights: Ints, count: int) -> Ints:
        """Write symbols; see `Coder`."""
        assert wanted is not None and len(wanted) == count
        if count and len(weights) > 1:
            self._encoder.encode(wanted.astype(np.int32), _categorical(weights))
        return wanted

    def finish(self) -> bytes:
        """The bytes, without the zeros that a reader appends by itself."""
        words = self._encoder.get_compressed()
        start, (low, width) = self._encoder.pos()
        tail = words[start:].astype(">u4").tobytes()
        # Any number of the last interval will do; where it wraps around, those before the wrap,
        # if the coder itself took one of these (it has then added no carry to earlier words).
        stop = min(low + width, 1 << 64)
        if 0 < len(tail) <= 8 and low <= int.from_bytes(tail.ljust(8, b"\0"), "big") < stop:
            tail = _shortest(low, stop)
        words = words[:start]
        whole: bytes = words.astype(">u4").tobytes() + tail
        return whole.rstrip(b"\0")


@final
class Reader(Coder):
    """Decodes bytes; wrong bytes give wrong values or an ExportError, nothing else."""

    def __init__(self, data: bytes) -> None:
        words = -(-len(data) // _WORD_BYTES)
        padded = np.frombuffer(data.ljust((words + 2) * _WORD_BYTES, b"\0"), ">u4")
        self._decoder = constriction.stream.queue.RangeDecoder(padded.astype(np.uint32))

    def bits(self, wanted: Bools | None, ones: Ints) -> Ints:
        """Read bits; see `Coder`."""
        return self._decode(_BERNOULLI, ones * _SCALE) if ones.size else ones

    def symbols(self, wanted: Ints | None, weights: Ints, count: int) -> Ints:
        """Read symbols; see `Coder`."""
        if not count or len(weights) < 2:
            return np.zeros(count, np.int64)
        return self._decode(_categorical(weights), count)

    def _decode(self, model: Any, argument: Any) -> Ints:
        try:
            return np.asarray(self._decoder.decode(model, argument), np.int64)
        except (AssertionError, ValueError) as cause:
            raise ExportError(
                "A coded tensor is malformed.",
                given=str(cause),
                allowed="a container as encode_model wrote it",
                advice="fetch or encode the file again",
            ) from cause


def _categorical(weights: Ints) -> Any:
    # Small integers over their sum: one correctly rounded division, equal on every machine.
    return constriction.stream.model.Categorical(
        weights.astype(np.float64) / float(weights.sum()), perfect=False
    )


def _shortest(low: int, stop: int) -> bytes:
    """The fewest bytes that, zeros appended, give a 64-bit number in [low, stop)."""
    for size in range(8):
        unit = 1 << (64 - 8 * size)
        point = -(-low // unit) * unit
        if point < stop:
            return (point >> (64 - 8 * size)).to_bytes(size, "big")
    return low.to_bytes(8, "big")
