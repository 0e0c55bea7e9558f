"""What a block takes, guessed from measured blocks that do the same work on other channels.

Blocks are *kin* if their lead has the same operator, attributes, arithmetic and image sizes. Within
kin the time is modelled as

    a + b r(c_in) + c r(c_out) + d r(c_in) r(c_out) + sum over following operators e_o n_o c_out

with no coefficient below zero (non-negative least squares on relative errors), where r rounds up to
the kernel's tile, whose width is the one that fits best, and n_o counts an operator. What the
nearest measured blocks deviate from the model is then taken over, the more the nearer they are.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from autocompress.measure.table.block import READER, Block
from autocompress.measure.table.channels import Channels, channels_of

FloatArray = npt.NDArray[np.float64]

_TILES = (1, 8, 16, 32)
_SMALLEST_MS = 1e-4
# Another family of the same kin counts as if its channels were so many doublings away.
_OTHER_FAMILY = 2.0
_REACH = 0.5
# So much weight says that there is no deviation.
_DOUBT = 0.25


@final
@dataclass(frozen=True)
class Traits:
    """What a block's time depends on.

    Attributes:
        kin: equal for blocks between which one may interpolate.
        channels: what they differ in, besides what follows the lead.
        followers: how often each operator follows the lead.
    """

    kin: str
    channels: Channels
    followers: tuple[tuple[str, int], ...]


def traits_of(block: Block) -> Traits | None:
    """The traits of a block; None for one that has no channels to interpolate over."""
    channels = channels_of(block)
    if channels is None:
        return None
    lead, makers = block.lead, block.makers()
    attributes = dict(lead.attributes)
    if attributes.get("group") == str(channels.inputs):
        attributes["group"] = "each"
    reads = [makers[n].operator if n in makers else "" for n in lead.inputs]
    mains = sorted(block.main_inputs)
    sizes = [(block.inputs[i].element, _spatial(block.inputs[i].shape)) for i in mains]
    kin = json.dumps(
        [lead.operator, sorted(attributes.items()), [r == READER for r in reads], sizes]
        + [_spatial(block.output_types[0].shape), block.opsets]
    )
    upstream = block.upstream
    rest = [n for n in block.nodes if n is not lead and not set(n.outputs) & upstream]
    followers = Counter(node.operator for node in rest if block.constant(node.inputs[0]) is None)
    return Traits(kin, channels, tuple(sorted(followers.items())))


def _spatial(shape: Sequence[int]) -> tuple[int, ...]:
    """All sizes but the channels'."""
    axis = 1 if len(shape) > 3 else len(shape) - 1
    return tuple(size for i, size in enumerate(shape) if i != axis)


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
        """What a block takes in ms; the channels may lie outside those measured."""
        modelled = max(float(self._rows([traits], self._tiles)[0] @ self._coefficients), 0.0)
        weights = self._nearness(traits)
        deviation = float(weights @ self._deviations / (weights.sum() + _DOUBT))
        return float(modelled * np.exp(deviation))

    @cached_property
    def _operators(self) -> tuple[str, ...]:
        return tuple(sorted({name for t in self.traits for name, _ in t.followers}))

    @cached_property
    def _times(self) -> FloatArray:
        return np.maximum(np.array(self.latency_ms, dtype=np.float64), _SMALLEST_MS)

    @cached_property
    def _fit(self) -> tuple[tuple[int, int], FloatArray]:
        best: tuple[float, tuple[int, int], FloatArray] | None = None
        for tiles in itertools.product(_TILES, repeat=2):
            rows = self._rows(self.traits, tiles) / self._times[:, None]
            scale = np.maximum(rows.max(axis=0), 1e-12)
            coefficients, residual = nnls(rows / scale, np.ones(len(rows)))
            if best is None or residual < best[0] - 1e-9:
                best = (float(residual), tiles, coefficients / scale)
        assert best is not None
        return best[1], best[2]

    @property
    def _tiles(self) -> tuple[int, int]:
        return self._fit[0]

    @property
    def _coefficients(self) -> FloatArray:
        return self._fit[1]

    @cached_property
    def _deviations(self) -> FloatArray:
        """Logarithm of measured over modelled, by block."""
        modelled = self._rows(self.traits, self._tiles) @ self._coefficients
        return np.log(self._times / np.maximum(modelled, _SMALLEST_MS))

    def _rows(self, traits: Sequence[Traits], tiles: tuple[int, int]) -> FloatArray:
        """One row of the model's terms per block."""
        rows = []
        for each in traits:
            read = _round_up(each.channels.inputs, tiles[0])
            written = _round_up(each.channels.outputs, tiles[1])
            counts = dict(each.followers)
            work = [counts.get(name, 0) * each.channels.outputs for name in self._operators]
            rows.append([1.0, read, written, read * written, *work])
        return np.array(rows, dtype=np.float64)

    def _nearness(self, traits: Traits) -> FloatArray:
        here = np.log2([traits.channels.inputs, traits.channels.outputs])
        there = np.log2([(t.channels.inputs, t.channels.outputs) for t in self.traits])
        distance = np.abs(there - here).sum(axis=1)
        distance += [_OTHER_FAMILY * (t.followers != traits.followers) for t in self.traits]
        return np.asarray(np.exp(-distance / _REACH), dtype=np.float64)


def _round_up(count: int, tile: int) -> int:
    return -(-count // tile) * tile
