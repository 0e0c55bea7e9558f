"""Which function runs which ONNX operator; an operator that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from autocompress.measure.runtimes.torch_graph.convolutions import CONVOLUTIONS
from autocompress.measure.runtimes.torch_graph.elementwise import ELEMENTWISE
from autocompress.measure.runtimes.torch_graph.integers import INTEGERS, prepare_nbits, run_nbits
from autocompress.measure.runtimes.torch_graph.layout import LAYOUT
from autocompress.measure.runtimes.torch_graph.node import Node, Run
from autocompress.measure.runtimes.torch_graph.pooling import POOLING
from autocompress.measure.runtimes.torch_graph.products import PRODUCTS
from autocompress.measure.runtimes.torch_graph.reductions import REDUCTIONS
from autocompress.measure.runtimes.torch_graph.shapes import SHAPES

# Domain and name.
Key = tuple[str, str]
MICROSOFT: Final = "com.microsoft"

_STANDARD = (
    CONVOLUTIONS, POOLING, PRODUCTS, ELEMENTWISE, REDUCTIONS, LAYOUT, SHAPES, INTEGERS,
)  # fmt: skip

# Each makes, for a node with inputs of known shapes, the function that runs it.
OPERATORS: Final[Mapping[Key, Callable[[Node], Run]]] = {
    **{("", name): make for group in _STANDARD for name, make in group.items()},
    (MICROSOFT, "Gelu"): ELEMENTWISE["Gelu"],
    (MICROSOFT, "MatMulNBits"): run_nbits,
}

# Computes, at load, the inputs behind the first one from those in the file.
PREPARED: Final[Mapping[Key, Callable[[Node], tuple[Tensor, ...]]]] = {
    (MICROSOFT, "MatMulNBits"): prepare_nbits,
}
