"""Reading an ONNX file: what is constant is computed once, at load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import onnx
import torch
from onnx import helper, inliner, numpy_helper
from torch import Tensor

from autocompress.errors import MeasurementError
from autocompress.measure.runtimes.torch_graph.node import Node, Target
from autocompress.measure.runtimes.torch_graph.operators import OPERATORS, PREPARED, Key

# Their scales are kept in float32 whatever the precision: a grid step rounded is another grid.
_EXACT: Final = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# Their sums of 8-bit products overflow float16.
_FLOAT32_ONLY: Final = ("ConvInteger", "MatMulInteger")
_FOUR_BITS: Final = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@final
@dataclass(frozen=True, eq=False)
class GraphNode:
    """A node as the file has it, by names; an input left out is an empty name."""

    name: str
    key: Key
    opset: int
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def with_examples(
        self, values: Mapping[str, Tensor], constants: Mapping[str, Tensor], target: Target
    ) -> Node:
        """The node with examples of its inputs.

        Args:
            values: examples by name; constants may be among them.
            constants: values that are the same at every run.
        """
        return Node(
            self.name,
            self.key[1],
            self.opset,
            self.attributes,
            tuple(values[name] if name else None for name in self.inputs),
            tuple(not name or name in constants for name in self.inputs),
            sum(1 for name in self.outputs if name),
            target,
        )


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """A graph whose constant part has been computed.

    Attributes:
        input_names: in the file's order.
        output_names: likewise.
        nodes: those that must run each time, in order.
        constants: what they read, on the target's device and in its type.
        float_inputs: inputs that hold floating-point numbers.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    nodes: tuple[GraphNode, ...]
    constants: Mapping[str, Tensor]
    float_inputs: frozenset[str]
    target: Target


def read_graph(path: Path, target: Target) -> Graph:
    """Read a file and compute all that its inputs do not decide, such as dequantized weights.

    Raises:
        MeasurementError: an operator that is not covered, or not in the target's precision.
        Exception: `onnx`'s own errors about the file.
    """
    model = inliner.inline_local_functions(onnx.load(path))
    if not model.graph.output:
        # The reader takes an empty file for an empty model.
        raise MeasurementError("The file holds no ONNX model with outputs.", given=path)
    initializers = {i.name: i for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in initializers]
    outputs = tuple(o.name for o in model.graph.output)
    nodes = _needed([_graph_node(node, model) for node in model.graph.node], outputs)
    _check_covered(nodes, target, initializers)
    read = {name for node in nodes for name in node.inputs} | set(outputs)
    tensors = {n: to_tensor(numpy_helper.to_array(i)) for n, i in initializers.items() if n in read}
    del model, initializers
    constants = {name: tensor.to(target.device) for name, tensor in tensors.items()}
    with torch.inference_mode():
        nodes = [_prepare(node, constants, target) for node in fold(nodes, constants, target)]
    return Graph(
        tuple(i.name for i in inputs),
        outputs,
        tuple(nodes),
        _kept(constants, nodes, outputs, target.dtype),
        frozenset(i.name for i in inputs if i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT),
        target,
    )


def fold(
    nodes: Sequence[GraphNode], constants: dict[str, Tensor], target: Target
) -> list[GraphNode]:
    """Compute the nodes that read only constants; their outputs join `constants`.

    Returns:
        The other nodes.
    """
    # Constants are computed in float32 and rounded only then.
    exact = replace(target, dtype=torch.float32)
    left = []
    for node in nodes:
        if all(not name or name in constants for name in node.inputs):
            constants.update(evaluate(node, node.with_examples(constants, constants, exact)))
        else:
            left.append(node)
    return left


def evaluate(node: GraphNode, examples: Node) -> dict[str, Tensor]:
    """Run a node on the examples of its inputs; its outputs by name."""
    result = OPERATORS[node.key](examples)(*examples.inputs)
    values = (result,) if isinstance(result, Tensor) else result
    return {name: value for name, value in zip(node.outputs, values, strict=False) if name}


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 value in another type; finite numbers stay finite, other types as they are."""
    if value.dtype != torch.float32 or dtype == torch.float32:
        return value
    limits = torch.finfo(dtype)
    return torch.where(value.isfinite(), value.clamp(limits.min, limits.max), value).to(dtype)


def to_tensor(array: Any) -> Tensor:
    """A copy of an array as a tensor; 4-bit integers as 8-bit ones."""
    if array.dtype.name in ("int4", "uint4"):
        array = array.astype(np.int8 if array.dtype.name == "int4" else np.uint8)
    return torch.from_numpy(np.array(array))


def _graph_node(node: onnx.NodeProto, model: onnx.ModelProto) -> GraphNode:
    versions = {entry.domain or "": entry.version for entry in model.opset_import}
    domain = "" if node.domain == "ai.onnx" else node.domain
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    key = (domain, node.op_type)
    name = node.name or next(iter(node.output), "")
    version = versions.get(domain, 1)
    return GraphNode(name, key, version, attributes, tuple(node.input), tuple(node.output))


def _needed(nodes: Sequence[GraphNode], outputs: Sequence[str]) -> list[GraphNode]:
    """The nodes that an output depends on, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]


def _check_covered(
    nodes: Sequence[GraphNode], target: Target, initializers: Mapping[str, onnx.TensorProto]
) -> None:
    half = target.dtype != torch.float32
    four_bits = {n for n, i in initializers.items() if i.data_type in _FOUR_BITS}
    reasons = {
        "PyTorch has no counterpart of an operator here": [
            n for n in nodes if n.key not in OPERATORS
        ],
        "Integer products run only in precision fp32 here": [
            n for n in nodes if half and n.key[1] in _FLOAT32_ONLY
        ],
        "Values cannot be rounded to 4 bits here": [
            n for n in nodes if n.key[1] == "QuantizeLinear" and four_bits & set(n.inputs)
        ],
    }
    for reason, found in reasons.items():
        if found:
            names = sorted({".".join(part for part in node.key if part) for node in found})
            raise MeasurementError(
                f"PyTorch cannot run the ONNX file. {reason}.",
                given=", ".join(names),
                advice="leave the runtime pytorch out of the device profile for this network",
            )


def _prepare(node: GraphNode, constants: dict[str, Tensor], target: Target) -> GraphNode:
    """A node whose constant inputs have been brought into a form that runs faster."""
    if node.key not in PREPARED:
        return node
    example = replace(target, dtype=torch.float32)
    # The input that is no constant is not looked at.
    values = {name: constants.get(name, torch.empty(0)) for name in node.inputs if name}
    prepared = PREPARED[node.key](node.with_examples(values, constants, example))
    inputs = [node.inputs[0]]
    for index, tensor in enumerate(prepared):
        name = f"{node.outputs[0]}_prepared{index}"
        constants[name] = tensor
        inputs.append(name)
    return replace(node, inputs=tuple(inputs))


def _kept(
    constants: Mapping[str, Tensor],
    nodes: Sequence[GraphNode],
    outputs: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The constants that are still read, rounded to the target's type."""
    exact = {name for node in nodes if node.key[1] in _EXACT for name in node.inputs}
    read = {name for node in nodes for name in node.inputs} | set(outputs)
    return {
        name: value if name in exact else rounded(value, dtype)
        for name, value in constants.items()
        if name in read
    }
