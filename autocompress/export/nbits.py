"""4-bit weights that the runtime computes with: `MatMulNBits` of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from autocompress.export.codes import WeightCodes
from autocompress.export.edit import (
    MICROSOFT,
    layers_of,
    plain_product,
    replace_nodes,
    swap_initializers,
    use_domain,
)
from autocompress.export.packed import pack

OPERATOR = "MatMulNBits"
BITS, GROUP_SIZE = 4, 32
# Inputs are rounded to 8 bits, block by block: the only level that is faster than float32.
_ACCURACY_LEVEL = 4
# The integer that stands for zero where no zero points are given.
_ZERO_POINT = 8


def pack_blocks(codes: NDArray[np.int8], group_size: int) -> NDArray[np.uint8]:
    """Codes as the operator reads them: shape (out, groups, group_size / 2).

    Args:
        codes: shape (out, in), from -8 to 7; the last group is filled with zeros.
    """
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % group_size)))
    shape = len(codes), padded.shape[1] // group_size, group_size // 2
    return pack(padded + _ZERO_POINT, BITS).reshape(shape)


def use_kernel(model: onnx.ModelProto, weights: Sequence[WeightCodes]) -> None:
    """Let linear layers of 4 bits in groups of 32 run on their own kernel, in place.

    Raises:
        ExportError: a layer is no plain linear one.
    """
    replacements: dict[str, list[onnx.NodeProto]] = {}
    added: list[onnx.TensorProto] = []
    for weight in weights:
        names = [f"{weight.initializer}_quantized", f"{weight.initializer}_scale"]
        added += [
            numpy_helper.from_array(pack_blocks(weight.codes, GROUP_SIZE), names[0]),
            numpy_helper.from_array(weight.scale, names[1]),
        ]
        out, in_features = weight.codes.shape
        for node in layers_of(model.graph, weight.initializer):
            bias = plain_product(node)
            inputs = [node.input[0], *names, *(["", "", bias] if bias else [])]
            kernel = helper.make_node(
                OPERATOR, inputs, list(node.output), node.name, domain=MICROSOFT,
                K=in_features, N=out, bits=BITS, block_size=GROUP_SIZE,
                accuracy_level=_ACCURACY_LEVEL,
            )  # fmt: skip
            replacements[node.output[0]] = [kernel]
    if weights:
        use_domain(model, MICROSOFT)
    replace_nodes(model.graph, replacements)
    swap_initializers(model.graph, {w.initializer for w in weights}, added)
