"""How large a file would be once coded, without coding it."""

from __future__ import annotations

from math import prod

from autocompress.export.coding.elements import IntegerType, element_type
from autocompress.export.coding.histogram import entropy_bytes
from autocompress.export.coding.wire import find_spans

# Wider ones are shapes and indices, few and small.
_MOST_BITS = 8


def estimate_bytes(onnx_bytes: bytes, float_bits: float) -> float:
    """The coded size of an ONNX file's tensors, from the entropy of their integers.

    Contexts save some per cent of it; neither they nor the graph are counted.

    Args:
        float_bits: what a float takes once coded.
    """
    total = 0.0
    for span in find_spans(onnx_bytes):
        kind, count = element_type(span.code), prod(span.shape)
        if isinstance(kind, IntegerType) and count and kind.bits <= _MOST_BITS:
            values = kind.read(onnx_bytes[span.start : span.stop], count)
            total += entropy_bytes(values - values.min())
        elif kind is not None and not isinstance(kind, IntegerType):
            total += count * min(float_bits, kind.bits) / 8
        else:
            total += span.stop - span.start
    return total
