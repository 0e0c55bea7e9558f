"""An ONNX file's graph, as far as the explanation of its speed needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

# Larger constants are weights, whose values say nothing here.
_SMALL = 4096


@final
@dataclass(frozen=True)
class FileNode:
    """A node of the file.

    Attributes:
        key: its name, or its first output's where it has none; as in `NodeTime.origins`.
        operator: such as `Conv`.
        domain: empty for ONNX's own operators.
        attributes: those that are numbers, texts or lists of numbers.
    """

    key: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Constant:
    """A constant tensor.

    Attributes:
        type: NumPy's or ONNX's name of its element type, such as `float32` or `int4`.
        values: None for large ones and for those in other files.
    """

    type: str
    shape: tuple[int, ...]
    values: npt.NDArray[Any] | None


@final
class FileGraph:
    """The outermost graph of an ONNX file.

    Args:
        nodes: in the file's order.
        constants: initializers and outputs of `Constant` nodes, by name.
        outputs: names of the model's outputs.
    """

    def __init__(
        self,
        nodes: tuple[FileNode, ...],
        constants: Mapping[str, Constant],
        outputs: tuple[str, ...],
    ) -> None:
        self.nodes = nodes
        self.constants = constants
        self.outputs = outputs
        self._by_key = {node.key: node for node in nodes}
        self._makers = {name: node for node in nodes for name in node.outputs}
        self._readers: dict[str, list[FileNode]] = {}
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self._readers.setdefault(name, []).append(node)

    def node(self, key: str) -> FileNode | None:
        """The node of a key."""
        return self._by_key.get(key)

    def maker(self, name: str) -> FileNode | None:
        """The node that makes a value; None for constants and the model's inputs."""
        return self._makers.get(name)

    def readers(self, name: str) -> tuple[FileNode, ...]:
        """The nodes that read a value."""
        return tuple(self._readers.get(name, ()))

    def sole_reader(self, name: str) -> FileNode | None:
        """The only node that reads a value; None if there are more or the model gives it out."""
        readers = self._readers.get(name, ())
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def read_graph(path: Path) -> FileGraph:
    """Read a file's graph; weights in other files are not read.

    Raises:
        Exception: whatever `onnx` raises about a file that is no model.
    """
    return graph_of(onnx.load(path, load_external_data=False))


def graph_of(model: onnx.ModelProto) -> FileGraph:
    """The graph of a model."""
    graph = model.graph
    constants = {item.name: _constant(item) for item in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = _constant(attributes["value"].t)
            continue
        nodes.append(
            FileNode(
                key=node.name or next(iter(node.output), ""),
                operator=node.op_type,
                domain=node.domain,
                inputs=tuple(node.input),
                outputs=tuple(node.output),
                attributes={name: _plain(a) for name, a in attributes.items()},
            )
        )
    return FileGraph(tuple(nodes), constants, tuple(item.name for item in graph.output))


def _constant(tensor: onnx.TensorProto) -> Constant:
    shape = tuple(int(size) for size in tensor.dims)
    name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    kind = {"float": "float32", "double": "float64"}.get(name, name)
    readable = tensor.data_location != onnx.TensorProto.EXTERNAL and np.prod(shape) <= _SMALL
    return Constant(kind, shape, numpy_helper.to_array(tensor) if readable else None)


def _plain(attribute: onnx.AttributeProto) -> Any:
    kinds = onnx.AttributeProto
    if attribute.type in (kinds.INT, kinds.FLOAT, kinds.INTS, kinds.FLOATS, kinds.STRING):
        value = onnx.helper.get_attribute_value(attribute)
        return value.decode() if isinstance(value, bytes) else value
    return None
