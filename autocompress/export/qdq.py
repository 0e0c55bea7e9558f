"""Static ranges in the file: quantize/dequantize pairs around the layers that run in integers.

ONNX Runtime fuses a layer whose input, weight and output are dequantized and quantized again into
one integer kernel; its x86 kernels are fastest with unsigned activations. A pair with nothing to
fuse rounds the tensor and is run as it stands: inputs of 16 bits, or of layers with float weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import onnx

from autocompress.errors import ExportError
from autocompress.export.codes import WeightCodes
from autocompress.export.edit import layers_of
from autocompress.export.exporter import StoredIntegers
from autocompress.export.kernels import store_for_kernels
from autocompress.export.pairs import Pairs
from autocompress.export.ranges import Grid, Observed, find_grid

_FUSED_ACTIVATIONS = ("Relu", "Clip")
# Nodes that move values or drop some: rounding before them or after them is the same.
_MOVES = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@final
@dataclass(frozen=True)
class StaticLayer:
    """A layer whose inputs have a fixed range.

    Attributes:
        initializer: its weight.
        stored: bits, calibration and trained range of its inputs.
        weight: its integers, where it runs on an integer kernel; else None.
    """

    initializer: str
    stored: StoredIntegers
    weight: WeightCodes | None


@final
class StaticRewriter:
    """Finds which tensors become integers, and rewrites a graph in place.

    A tensor has one 8-bit grid, that of the first layer that reads it, or else of the layer that
    makes it. Where layers disagree about the sign, the same numbers are given by both kinds of
    integers. A 16-bit grid belongs to the layer that asks for it.

    Raises:
        ExportError: a weight is read by something else than convolutions and matrix products.
    """

    def __init__(self, graph: onnx.GraphProto, layers: Sequence[StaticLayer]) -> None:
        self._graph = graph
        self._outputs = {o.name for o in graph.output}
        self._constants = {i.name for i in graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self._sources = {output: node for node in graph.node for output in node.output}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        for layer in layers:
            layers_of(graph, layer.initializer)
        by_weight = {layer.initializer: layer for layer in layers}
        self._layers = [
            (node, by_weight[node.input[1]])
            for node in graph.node if len(node.input) > 1 and node.input[1] in by_weight
        ]  # fmt: skip
        # What an integer kernel writes exists as integers only; with the layer that decides how.
        self._makers: dict[str, StoredIntegers] = {}
        for node, layer in self._layers:
            made = self._activated(node)
            if layer.weight and (node.op_type == "Conv" or made not in self._outputs):
                self._makers[made] = layer.stored
        self._sums = self._find_sums()
        self.tensors = sorted(self._makers.keys() | {node.input[0] for node, _ in self._layers})

    def _find_sums(self) -> list[onnx.NodeProto]:
        """Additions of tensors that are integers anyway; in order, so that sums of sums are."""
        sums, read = [], self._read_as_bytes()
        for node in self._graph.node:
            makers = [self._makers[name] for name in node.input if name in self._makers]
            if node.op_type == "Add" and makers and set(node.input) <= read | self._makers.keys():
                sums.append(node)
                self._makers[self._activated(node)] = makers[0]
        return sums

    def _read_as_bytes(self) -> set[str]:
        return {n.input[0] for n, layer in self._layers if layer.stored.how.activation_bits == 8}

    def _activated(self, node: onnx.NodeProto) -> str:
        """The tensor that a node's fused kernel writes: after a sole activation that reads it."""
        name = str(node.output[0])
        bias = self._readers.get(name, [])
        if node.op_type == "MatMul" and len(bias) == 1 and self._is_bias(bias[0]):
            name = str(bias[0].output[0])
        readers = self._readers.get(name, [])
        if (
            len(readers) == 1
            and readers[0].op_type in _FUSED_ACTIVATIONS
            and (name not in self._outputs)
        ):
            return str(readers[0].output[0])
        return name

    def _is_bias(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Add" and any(name in self._constants for name in node.input)

    def rewrite(self, observed: Mapping[str, Observed]) -> Pairs:
        """Put integer weights and biases into the graph, and let everybody read rounded tensors.

        Args:
            observed: values of all `tensors`.

        Returns:
            The pairs that round them, still to be inserted.

        Raises:
            ExportError: trained ranges that contradict each other or do not fit their integers.
        """
        pairs = Pairs()
        rounded = self._makers.keys() | self._read_as_bytes()
        shared = {name: self._shared_grid(name, observed[name]) for name in sorted(rounded)}
        # Integers can then be moved as they are.
        shared |= {name: shared[moved] for name, moved in self._moved(shared).items()}
        for name, maker in self._makers.items():
            # An integer result that leaves the model keeps the output's name once dequantized.
            leaves = name in self._outputs
            if leaves:
                _rename(self._graph, name, f"{name}_float")
            pairs.add_made(name, shared[name].with_sign(maker.how.signed), leaves=leaves)
        grids, readings = [], []
        for node, layer in self._layers:
            name, how = str(node.input[0]), layer.stored.how
            if how.activation_bits == 8:
                grid = shared[name].with_sign(how.signed)
            else:
                grid = _own_grid(layer.stored, observed[name])
            grids.append(grid)
            readings.append(pairs.reading(name, grid))
        summed = {id(node) for node in self._sums}
        for node in self._graph.node:
            # Everybody reads what an integer kernel made; of other tensors, only layers and sums.
            for i, name in enumerate(node.input):
                if name in self._makers or id(node) in summed:
                    node.input[i] = pairs.first_reading(name)
        for (node, _), reading in zip(self._layers, readings, strict=True):
            node.input[0] = reading
        self._keep_others_float(pairs)
        integer = [
            (node, layer.weight, grid)
            for (node, layer), grid in zip(self._layers, grids, strict=True) if layer.weight
        ]  # fmt: skip
        store_for_kernels(self._graph, integer)
        return pairs

    def _moved(self, grids: Collection[str]) -> dict[str, str]:
        """Tensors made as integers whose values are only moved into another one with a grid."""
        found = {}
        for made in self._makers.keys() - self._outputs:
            name, readers = made, self._readers.get(made, [])
            while len(readers) == 1 and readers[0].op_type in _MOVES:
                name = str(readers[0].output[0])
                if name in grids:
                    found[made] = name
                    break
                readers = self._readers.get(name, [])
        return found

    def _keep_others_float(self, pairs: Pairs) -> None:
        """Guard what float layers make of rounded tensors."""
        kernels = {id(node) for node, layer in self._layers if layer.weight}
        for node in self._graph.node:
            if node.op_type not in ("Conv", "Gemm") or id(node) in kernels:
                continue
            name = str(node.input[0])
            while name in self._sources and self._sources[name].op_type in _MOVES:
                name = str(self._sources[name].input[0])
            if pairs.gives(name):
                for tensor in {node.output[0], self._activated(node)}:
                    pairs.guard(tensor)

    def _shared_grid(self, tensor: str, observed: Observed) -> Grid:
        """The 8-bit grid of a tensor, unsigned."""
        readers = [
            layer.stored for node, layer in self._layers
            if node.input[0] == tensor and layer.stored.how.activation_bits == 8
        ]  # fmt: skip
        trained = {
            _trained_grid(stored, *stored.input_range).with_sign(False)
            for stored in readers if stored.input_range
        }  # fmt: skip
        if len(trained) > 1:
            raise ExportError(
                "Layers that read the same tensor were trained with different ranges for it.",
                given=f"{tensor}: "
                + ", ".join(f"scale {g.scale:g}, zero point {g.zero_point}" for g in trained),
                allowed="one scale and zero point",
                advice="let layers that share an input share its quantizer in training",
            )
        if trained:
            return trained.pop()
        owner = readers[0] if readers else self._makers[tensor]
        return find_grid(observed, owner.how.calibration, 8)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.output[:] = [new if output == old else output for output in node.output]


def _own_grid(stored: StoredIntegers, observed: Observed) -> Grid:
    how = stored.how
    if stored.input_range:
        return _trained_grid(stored, *stored.input_range)
    return find_grid(observed, how.calibration, how.activation_bits).with_sign(how.signed)


def _trained_grid(stored: StoredIntegers, scale: float, zero_point: int) -> Grid:
    grid = Grid(np.float32(scale), zero_point, stored.how.activation_bits, stored.how.signed)
    low, high = grid.integers
    if not (np.isfinite(grid.scale) and grid.scale > 0 and low <= zero_point <= high):
        raise ExportError(
            "A trained range of a layer's inputs does not fit its integers.",
            given=f"scale {scale:g}, zero point {zero_point}",
            allowed=f"a scale above 0, a zero point from {low} to {high}",
        )
    return grid
