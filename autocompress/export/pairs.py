"""Pairs of a quantize and a dequantize node, each behind the tensor that it rounds."""

from __future__ import annotations

from typing import final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autocompress.export.edit import MICROSOFT, use_domain
from autocompress.export.ranges import Grid


@final
class Pairs:
    """The pairs of a graph, at most one per tensor and grid."""

    def __init__(self) -> None:
        self._tensors: list[onnx.TensorProto] = []
        # By the tensor behind which they stand.
        self._nodes: dict[str, list[onnx.NodeProto]] = {}
        self._readings: dict[str, dict[Grid, str]] = {}
        self._made: dict[str, str] = {}
        self._guarded = set[str]()

    def add_made(self, tensor: str, grid: Grid, *, leaves: bool) -> None:
        """The pair of a tensor that an integer kernel writes; other pairs read what it gives.

        Args:
            leaves: the tensor is an output of the model, written now as `<tensor>_float`.
        """
        source, back = (f"{tensor}_float", tensor) if leaves else (tensor, f"{tensor}_dequantized")
        self._made[tensor] = source
        self._add(tensor, grid, (source, back), tensor)

    def reading(self, tensor: str, grid: Grid) -> str:
        """The tensor as numbers of a grid."""
        known = self._readings.get(tensor, {})
        if grid in known:
            return known[grid]
        base = f"{tensor}_{grid.dtype.name}_{len(known)}" if known else tensor
        source = self.first_reading(tensor) if tensor in self._made else tensor
        self._add(tensor, grid, (source, f"{base}_dequantized"), base)
        return f"{base}_dequantized"

    def first_reading(self, tensor: str) -> str:
        """The tensor as numbers of the grid that it was first given; itself if of none."""
        known = self._readings.get(tensor)
        return next(iter(known.values())) if known else tensor

    def gives(self, tensor: str) -> bool:
        """Whether a tensor is what a pair gives."""
        return any(tensor in known.values() for known in self._readings.values())

    def guard(self, tensor: str) -> None:
        """Keep the layer that makes a tensor in floating point.

        ONNX Runtime rounds the weight of a float layer by itself and runs it in integers where
        it stands between a dequantize and a quantize node; a node that copies the tensor prevents
        that.
        """
        if tensor in self._nodes and tensor not in self._made:
            self._guarded.add(tensor)

    def _add(self, tensor: str, grid: Grid, ends: tuple[str, str], base: str) -> None:
        scale, zero = f"{base}_scale", f"{base}_zero_point"
        self._tensors += [
            numpy_helper.from_array(np.asarray(grid.scale, np.float32), scale),
            numpy_helper.from_array(np.asarray(grid.zero_point, grid.dtype), zero),
        ]
        integer, domain = f"{base}_quantized", "" if grid.bits == 8 else MICROSOFT
        self._nodes.setdefault(self._made.get(tensor, tensor), []).extend(
            helper.make_node(kind, [read, scale, zero], [written], name, domain=domain)
            for kind, read, written, name in (
                ("QuantizeLinear", ends[0], integer, f"{base}_q"),
                ("DequantizeLinear", integer, ends[1], f"{base}_dq"),
            )
        )
        self._readings.setdefault(tensor, {})[grid] = ends[1]

    def insert(self, model: onnx.ModelProto) -> None:
        """Put the nodes into the model's graph, in place."""
        graph = model.graph
        for tensor in self._guarded:
            copied = f"{tensor}_kept_float"
            for node in self._nodes[tensor]:
                node.input[:] = [copied if name == tensor else name for name in node.input]
            # The largest of one; runtimes remove an Identity.
            self._nodes[tensor].insert(0, helper.make_node("Max", [tensor], [copied], copied))
        nodes: list[onnx.NodeProto] = []
        for entry in graph.input:
            nodes += self._nodes.get(entry.name, [])
        for node in graph.node:
            nodes.append(node)
            for output in node.output:
                nodes += self._nodes.get(output, [])
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(self._tensors)
        if any(node.domain == MICROSOFT for node in nodes):
            use_domain(model, MICROSOFT)
