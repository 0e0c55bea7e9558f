"""Cutting an ONNX model into blocks, the way runtimes fuse operators.

A block starts at a heavy operator and takes in what follows it up to the next one: bias, residual
addition, activation, normalization, quantization. A node that reads several blocks belongs to the
latest. What computes from constants only, such as the dequantization of weights, and the
dequantization of a block's inputs go into every block that reads them: runtimes fuse them there.
So blocks meet at quantized tensors where layers run in integers. No node is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import onnx
from onnx import AttributeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from autocompress.errors import MeasurementError
from autocompress.measure.table.block import HEAVY_OPERATORS, READER, Block, TensorType
from autocompress.measure.table.canonical import canonical_block
from autocompress.measure.table.shapes import tensor_types, type_of

# Larger constants are weights; what shapes are computed from is smaller.
_FOLDED = 64
_SUFFIXES = ("_dequantized", "_quantized", ".weight")


@final
@dataclass(frozen=True)
class PlacedBlock:
    """A block of one model.

    Attributes:
        layer: name of the layer whose weight the block reads; else of its first node.
        inputs: the model's names of the block's inputs.
        outputs: and of its outputs.
    """

    block: Block
    layer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@final
@dataclass(frozen=True)
class Edge:
    """A tensor on its way from one block of a cut to another.

    Attributes:
        producer: index of the block that makes it.
        output: which of that block's outputs it is.
        consumer: index of the block that reads it.
        input: which of that block's inputs it is.
    """

    producer: int
    output: int
    consumer: int
    input: int


@final
@dataclass(frozen=True)
class Cut:
    """A model in blocks, in an order in which they can run.

    Attributes:
        inputs: the model's inputs at the batch size of the cut.
        outputs: its outputs.
    """

    placed: tuple[PlacedBlock, ...]
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks without their places."""
        return tuple(p.block for p in self.placed)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every tensor that goes from block to block, once per reader."""
        made = {name: (b, o) for b, p in enumerate(self.placed) for o, name in enumerate(p.outputs)}
        return tuple(
            Edge(*made[name], consumer, i)
            for consumer, p in enumerate(self.placed)
            for i, name in enumerate(p.inputs)
            if name in made
        )


def cut_file(path: Path, batch_size: int) -> Cut:
    """The blocks of an ONNX file; see `cut_model`."""
    return cut_model(onnx.load(path), batch_size)


def cut_model(model: onnx.ModelProto, batch_size: int) -> Cut:
    """The blocks of a model.

    Raises:
        MeasurementError: it has open axes besides the batch, control flow, or tensors whose shape
            is not known before it runs.
    """
    return _Cutter(model, batch_size).cut()


def blocks_of(model: onnx.ModelProto, batch_size: int) -> tuple[Block, ...]:
    """The blocks of a model without their places; see `cut_model`."""
    return cut_model(model, batch_size).blocks


def layer_label(initializer: str) -> str:
    """What the block that reads a weight is called (`PlacedBlock.layer`)."""
    for suffix in _SUFFIXES:
        initializer = initializer.removesuffix(suffix)
    return initializer


@final
class _Cutter:
    def __init__(self, model: onnx.ModelProto, batch_size: int) -> None:
        self._graph = model.graph
        self._types = tensor_types(model, batch_size)
        self._opsets = {opset.domain: opset.version for opset in model.opset_import}
        self._constants = {i.name: i for i in model.graph.initializer}
        self._inputs = [i.name for i in model.graph.input if i.name not in self._constants]
        self._outputs = [o.name for o in model.graph.output]
        # Nodes that compute from constants only, and readers, by the values that they make.
        self._constant_nodes: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, onnx.NodeProto] = {}
        # The block that a value belongs to; 0 is what stands before the first heavy node.
        self._owner = dict.fromkeys(self._inputs, 0)
        self._members: list[list[onnx.NodeProto]] = [[]]

    def cut(self) -> Cut:
        for node in self._graph.node:
            self._place(node)
        wanted = set(self._outputs).union(*self._read_by_each())
        placed = [
            self._placed(nodes, [o for n in nodes for o in n.output if o in wanted])
            for nodes in self._members
            if nodes
        ]
        return Cut(
            tuple(placed),
            tuple(type_of(self._types, name) for name in self._inputs),
            tuple(type_of(self._types, name) for name in self._outputs),
        )

    def _place(self, node: onnx.NodeProto) -> None:
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise MeasurementError(
                "Models with control flow cannot be cut into blocks.", given=node.op_type
            )
        if self._known_shape(node) or all(self._is_constant(name) for name in node.input):
            self._keep_constant(node)
            return
        dynamic = [name for name in node.input if name and not self._is_constant(name)]
        block = max(self._owner[name] for name in dynamic)
        if node.op_type == READER and not set(node.output) & set(self._outputs):
            self._readers[node.output[0]] = node
        elif node.op_type in HEAVY_OPERATORS or self._pools(node):
            self._members.append([node])
            block = len(self._members) - 1
        else:
            self._members[block].append(node)
        self._owner.update(dict.fromkeys(node.output, block))

    def _pools(self, node: onnx.NodeProto) -> bool:
        """Whether a reduction is a global pooling of images."""
        kind = self._types.get(node.input[0])
        return node.op_type == "ReduceMean" and kind is not None and len(kind.shape) == 4

    def _is_constant(self, name: str) -> bool:
        return not name or name in self._constants or name in self._constant_nodes

    def _known_shape(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Shape" and node.input[0] in self._types

    def _keep_constant(self, node: onnx.NodeProto) -> None:
        """Keep a node for those who read it, or its value where that is small and no weight."""
        inputs = {}
        if node.op_type == "Shape":
            shape = self._types[node.input[0]].shape
            inputs[node.input[0]] = np.broadcast_to(np.float32(0), shape)
        else:
            inputs = {n: numpy_helper.to_array(self._constants[n]) for n in node.input if
                      n in self._constants and self._types[n].elements <= _FOLDED}  # fmt: skip
        if node.op_type == READER or node.domain or len(inputs) < sum(map(bool, node.input)):
            self._constant_nodes.update(dict.fromkeys(node.output, node))
            return
        values = ReferenceEvaluator(node).run(None, inputs)
        for name, value in zip(node.output, values, strict=True):
            self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
            self._types[name] = TensorType(self._constants[name].data_type, np.shape(value))

    def _read_by_each(self) -> list[set[str]]:
        """What each block reads of others, its readers looked through."""
        found = []
        for nodes in self._members:
            own = {o for n in nodes for o in n.output}
            found.append({self._source(n) for node in nodes for n in node.input if n} - own)
        return found

    def _source(self, name: str) -> str:
        while name in self._readers:
            name = self._readers[name].input[0]
        return name

    def _placed(self, nodes: list[onnx.NodeProto], outputs: list[str]) -> PlacedBlock:
        makers = {o: n for n in nodes for o in n.output if o}
        makers |= self._readers | self._constant_nodes
        # A node whose result nobody reads runs all the same.
        outputs = outputs or [o for o in nodes[-1].output if o]
        block, inputs = canonical_block(makers, self._constants, self._types, self._opsets, outputs)
        return PlacedBlock(block, self._layer(nodes), inputs, tuple(outputs))

    def _layer(self, nodes: Iterable[onnx.NodeProto]) -> str:
        nodes = list(nodes)
        heavy = next((n for n in nodes if n.op_type in HEAVY_OPERATORS), None)
        if heavy is not None and len(heavy.input) > 1 and self._is_constant(heavy.input[1]):
            name = str(heavy.input[1])
            while name in self._constant_nodes:
                name = str(self._constant_nodes[name].input[0])
            return layer_label(name)
        first = heavy or nodes[0]
        return str(first.name or first.output[0])
