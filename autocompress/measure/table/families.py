"""What a block takes, guessed from measured blocks that do the same work on other sizes.

Blocks are *kin* if their lead has the same operator, attributes and arithmetic. Within kin the time
is modelled as

    a p r(c_in) r(c_out) + b + c p c_out + sum over other operators e_o n_o p c_out + d q c_in

with no coefficient below zero (non-negative least squares on relative errors): q positions (pixels,
tokens) are read and p written, r rounds up to the kernel's tile, whose width is the one that fits
best, and n_o counts an operator besides the lead. What the nearest measured blocks deviate from the
model is then taken over, the more the nearer they are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from autocompress.measure.table.block import READER, Block
from autocompress.measure.table.channels import Channels, channel_axis, channels_of

FloatArray = npt.NDArray[np.float64]

# Of tiles that fit equally well the first is taken.
_TILES = (8, 16, 1, 32)
_SMALLEST_MS = 1e-4
# Other operators besides the lead count as if the channels were so many doublings away.
_OTHER_OPERATORS = 1.0
_REACH = 1.0
# So much weight says that there is no deviation.
_DOUBT = 0.25


@final
@dataclass(frozen=True)
class Traits:
    """What a block's time depends on.

    Attributes:
        kin: equal for blocks between which one may interpolate.
        channels: read and written.
        positions: read and written: what the tensors have besides channels.
        others: how often each operator occurs besides the lead.
    """

    kin: str
    channels: Channels
    positions: tuple[int, int]
    others: tuple[tuple[str, int], ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels read, channels written, positions written."""
        return self.channels.inputs, self.channels.outputs, self.positions[1]


def traits_of(block: Block) -> Traits | None:
    """The traits of a block; None for one that has no channels to interpolate over."""
    channels = channels_of(block)
    if channels is None:
        return None
    lead, makers = block.lead, block.makers()
    attributes = dict(lead.attributes)
    if attributes.get("group") == str(channels.inputs):
        attributes["group"] = "each"
    # A bias costs next to nothing.
    sources = [makers.get(name) for name in lead.inputs[:2]]
    readers = [source is not None and source.operator == READER for source in sources]
    kin = json.dumps([lead.operator, sorted(attributes.items()), all(readers), len(readers)])
    others = Counter(
        node.operator
        for node in block.nodes
        if node is not lead and not _is_weight_side(block, node.inputs)
    )
    if readers and all(readers):
        # An integer kernel reads its input as it is.
        others[READER] -= 1
    read = block.inputs[min(block.main_inputs)].shape if block.main_inputs else ()
    return Traits(
        kin,
        channels,
        (_positions(read), _positions(block.output_types[0].shape)),
        tuple(sorted((name, count) for name, count in others.items() if count)),
    )


def _is_weight_side(block: Block, inputs: Sequence[str]) -> bool:
    return bool(inputs) and all(not n or block.constant(n) is not None for n in inputs)


def _positions(shape: Sequence[int]) -> int:
    axis = channel_axis(len(shape))
    return math.prod(size for i, size in enumerate(shape) if i != axis)


@final
@dataclass(frozen=True)
class Kin:
    """Measured blocks of one kin.

    Attributes:
        traits: of each block.
        latency_ms: of each block.
    """

    traits: tuple[Traits, ...]
    latency_ms: tuple[float, ...]

    def estimate(self, traits: Traits) -> float:
        """What a block takes in ms; its sizes may lie outside those measured."""
        tiles, coefficients = self._fit
        modelled = max(float(self._rows([traits], tiles)[0] @ coefficients), 0.0)
        weights = self._nearness(traits)
        deviation = float(weights @ self._deviations / (weights.sum() + _DOUBT))
        return float(modelled * np.exp(deviation))

    @cached_property
    def _operators(self) -> tuple[str, ...]:
        return tuple(sorted({name for t in self.traits for name, _ in t.others}))

    @cached_property
    def _times(self) -> FloatArray:
        return np.maximum(np.array(self.latency_ms, dtype=np.float64), _SMALLEST_MS)

    @cached_property
    def _fit(self) -> tuple[tuple[int, int], FloatArray]:
        """The tiles, and a coefficient for each of the model's terms."""
        best: tuple[float, tuple[int, int], FloatArray] | None = None
        for tiles in itertools.product(_TILES, _TILES):
            rows = self._rows(self.traits, tiles) / self._times[:, None]
            # Few blocks cannot tell many terms apart: the first terms are the surest.
            used = min(rows.shape[1], max(1, len(rows) * 2 // 3))
            scale = np.maximum(rows[:, :used].max(axis=0), 1e-12)
            found, residual = nnls(rows[:, :used] / scale, np.ones(len(rows)))
            if best is None or residual < best[0] - 1e-9:
                coefficients = np.zeros(rows.shape[1])
                coefficients[:used] = found / scale
                best = (float(residual), tiles, coefficients)
        assert best is not None
        return best[1], best[2]

    @cached_property
    def _deviations(self) -> FloatArray:
        """Logarithm of measured over modelled, by block."""
        tiles, coefficients = self._fit
        modelled = self._rows(self.traits, tiles) @ coefficients
        return np.log(self._times / np.maximum(modelled, _SMALLEST_MS))

    def _rows(self, traits: Sequence[Traits], tiles: tuple[int, int]) -> FloatArray:
        """One row of the model's terms per block."""
        rows = []
        for each in traits:
            read, written = each.channels.inputs, each.channels.outputs
            wide = _round_up(read, tiles[0]) * _round_up(written, tiles[1])
            before, after = each.positions
            counts = dict(each.others)
            work = [counts.get(name, 0) * after * written for name in self._operators]
            rows.append([after * wide, 1.0, after * written, *work, before * read])
        return np.array(rows, dtype=np.float64)

    def _nearness(self, traits: Traits) -> FloatArray:
        there = np.log2([t.sizes for t in self.traits])
        distance = np.abs(there - np.log2(traits.sizes)).sum(axis=1)
        distance += [_OTHER_OPERATORS * (t.others != traits.others) for t in self.traits]
        return np.asarray(np.exp(-distance / _REACH), dtype=np.float64)


def _round_up(count: int, tile: int) -> int:
    return -(-count // tile) * tile
