"""A layer's weight as the integers that are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from autocompress.errors import ExportError
from autocompress.export.exporter import StoredCodebook, StoredIntegers

# Weights below this have lost digits, and nothing hears them.
_SILENT = 1e-30
# A weight may lie beside its grid by this share of a step: products round differently.
_OFF_GRID = 0.01
_OFF_CODEWORDS = 1e-5


@final
@dataclass(frozen=True)
class WeightCodes:
    """Integers and scales of a weight with one row per output channel.

    Attributes:
        initializer: the float initializer that they stand for.
        shape: of that initializer.
        axis: of its output channels.
        codes: shape (out, in), int8.
        scale: shape (out, groups), float32; (1, 1) where all rows have the same.
        bits: that the codes need.
        group_size: columns that share a scale; None for whole rows.
    """

    initializer: str
    shape: tuple[int, ...]
    axis: int
    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int
    group_size: int | None

    def as_stored(self) -> NDArray[np.int8]:
        """The codes in the initializer's own shape."""
        return folded(self.codes, self.shape, self.axis)


def unfold(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """A weight with one row per output channel, shape (out, in)."""
    return weight.T if axis else weight.reshape(len(weight), -1)


def folded(rows: NDArray[np.int8], shape: tuple[int, ...], axis: int) -> NDArray[np.int8]:
    """The inverse of `unfold`."""
    return np.ascontiguousarray(rows.T if axis else rows.reshape(shape))


def weight_codes(initializer: onnx.TensorProto, axis: int, stored: StoredIntegers) -> WeightCodes:
    """The integers of a weight that lies on its grid.

    Raises:
        ExportError: it does not lie on the grid.
    """
    value = numpy_helper.to_array(initializer)
    rows, scale = unfold(value, axis).astype(np.float64), stored.scale
    if stored.how.per_tensor and stored.how.group_size is None and (scale == scale[0, 0]).all():
        scale = scale[:1, :1]
    steps = columns(scale, stored.how.group_size, rows.shape[1])
    largest = 2 ** (stored.how.bits - 1) - 1
    position = np.where(np.abs(rows) < _SILENT, 0.0, rows) / np.where(steps > 0, steps, 1.0)
    codes = np.clip(np.round(position), -largest, largest)
    distance = float(np.abs(position - codes).max(initial=0.0))
    if not distance <= _OFF_GRID:
        raise ExportError(
            "A weight does not lie on the grid that its scales describe.",
            given=f"{initializer.name}, {distance:.2g} steps off",
            allowed=f"integers from {-largest} to {largest} times `weight_scale`",
            advice="round the weight after the last change of it or of its scales",
        )
    how = stored.how
    return WeightCodes(
        initializer.name, value.shape, axis, codes.astype(np.int8), scale, how.bits, how.group_size
    )


def check_codewords(initializer: onnx.TensorProto, axis: int, stored: StoredCodebook) -> None:
    """Make sure that a weight is what its codewords say.

    Raises:
        ExportError: it is not, or a code does not fit its bits.
    """
    rows = unfold(numpy_helper.to_array(initializer), axis)
    last = min(len(stored.codebook), 2**stored.how.code_bits) - 1
    if stored.codes.min() < 0 or stored.codes.max() > last:
        raise ExportError(
            "A code of a weight has no codeword.",
            given=f"{initializer.name}, codes from {stored.codes.min()} to {stored.codes.max()}",
            allowed=f"0 to {last}",
        )
    made = stored.scale * stored.codebook[stored.codes].reshape(rows.shape)
    if not np.allclose(made, rows, rtol=0, atol=_OFF_CODEWORDS * float(np.abs(rows).max())):
        raise ExportError(
            "A weight is not made of the codewords that it is said to be made of.",
            given=f"{initializer.name}, off by {np.abs(made - rows).max():.2g}",
            advice="look the codewords up again after the last change of them",
        )


def columns(
    scale: NDArray[np.float32], group_size: int | None, in_features: int
) -> NDArray[np.float64]:
    """A scale per weight: (out, groups) to (out, in), or (out, 1) if rows are not split."""
    wide = scale.astype(np.float64)
    return wide if group_size is None else wide.repeat(group_size, 1)[:, :in_features]
