"""The ONNX graph of the original network, exported once; candidates only bring other weights.

Exporting costs over a second, filling a skeleton milliseconds. Channel counts live in the weights,
not in the graph, so one skeleton serves every pruning; a decomposed layer becomes a chain of nodes.
Each set of blocks that are taken out has a skeleton of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, final

import onnx
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export.edit import copied, emptied
from autocompress.export.sources import export_distinct, parameter_arrays, site_faults
from autocompress.export.torch_export import set_attribute
from autocompress.techniques.decomposed import handlers
from autocompress.workload import Axes


@final
@dataclass(frozen=True)
class WeightSite:
    """Where a layer's weight stands in a graph: its initializer, and its output-channel axis."""

    initializer: str
    axis: int


@final
@dataclass(frozen=True)
class Graph:
    """A float ONNX model and, by module name, where each layer's weight stands in it."""

    model: onnx.ModelProto
    sites: Mapping[str, WeightSite]


def export_afresh(
    network: nn.Module,
    example_inputs: tuple[Tensor, ...],
    layers: tuple[str, ...],
    axes: Sequence[Axes] = (),
) -> Graph:
    """Export a network whose topology no skeleton covers.

    Args:
        network: batch norms folded.
        layers: names of the layers in the original network.
        axes: those that are open besides the batch; see `Workload`.

    Raises:
        ExportError: PyTorch's exporter cannot handle the network.
    """
    model, sources = export_distinct(network, example_inputs, axes)
    names = [f"{part}.weight" for layer in layers for part in _parts(network, layer)]
    sites = {
        source.parameter.removesuffix(".weight"): WeightSite(name, int(source.transposed))
        for name, source in sources.items()
        if source.parameter in names
    }
    return Graph(model, sites)


@final
class Skeleton:
    """A graph to be filled with the weights of any candidate of the same topology.

    Args:
        network: the original network, batch norms folded.
        example_inputs: batch in dimension 0.
        layers: names of the layers that may be decomposed.
        axes: those that are open besides the batch; see `Workload`.

    Attributes:
        faults: by a layer's name why the graph cannot follow a change of its weight.

    Raises:
        ExportError: PyTorch's exporter cannot handle the network.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: tuple[Tensor, ...],
        layers: tuple[str, ...],
        axes: Sequence[Axes] = (),
    ) -> None:
        model, self._sources = export_distinct(network, example_inputs, axes)
        self._constants = [
            copied(i) for i in model.graph.initializer if i.name not in self._sources
        ]
        self._layers = layers
        self._tables = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
        self.faults = site_faults(model.graph, self._sources, layers)
        self._model = emptied(model)

    def fill(self, network: nn.Module) -> Graph:
        """The graph with a candidate's weights.

        Args:
            network: batch norms folded; decomposed layers are an `nn.Sequential` of their parts.

        Raises:
            ExportError: the candidate lacks a parameter that the skeleton needs.
        """
        state = parameter_arrays(network)
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.initializer.extend(self._constants)
        sites: dict[str, WeightSite] = {}
        replaced: dict[str, tuple[str, ...]] = {}
        for name, source in self._sources.items():
            owner, _, field = source.parameter.rpartition(".")
            parts = _parts(network, owner) if owner in self._layers else (owner,)
            read = name in self._tables
            if field == "weight" and len(parts) > 1:
                replaced[name] = tuple(f"{part}.weight" for part in parts)
                filled = [(f"{part}.weight", f"{part}.weight", part) for part in parts]
            else:
                filled = [(name, f"{parts[-1]}.{field}".lstrip("."), parts[-1])]
            for index, (initializer, parameter, part) in enumerate(filled):
                if parameter not in state:
                    raise ExportError("A candidate lacks a parameter.", given=parameter)
                # What a narrow table gives is multiplied by a linear layer's transposed weight.
                transposed = source.transposed or (read and index > 0)
                value = replace(source, transposed=transposed).value(state[parameter])
                model.graph.initializer.append(numpy_helper.from_array(value, initializer))
                if field == "weight" and owner in self._layers:
                    sites[part] = WeightSite(initializer, int(transposed))
        shapes = {
            site.initializer: cast(Tensor, network.get_submodule(name).weight).shape[2:]
            for name, site in sites.items()
        }
        _rewrite_nodes(model.graph, replaced, shapes)
        _set_groups(model.graph, network, sites)
        return Graph(model, sites)


def _parts(network: nn.Module, layer: str) -> tuple[str, ...]:
    """The modules that a layer consists of now: itself, or those of its decomposition."""
    module = network.get_submodule(layer)
    if isinstance(module, nn.Sequential):
        return tuple(f"{layer}.{part}" for part, _ in module.named_children())
    return (layer,)


def _set_groups(
    graph: onnx.GraphProto, network: nn.Module, sites: Mapping[str, WeightSite]
) -> None:
    """Give convolutions the groups that their modules have now, in place."""
    groups = {
        site.initializer: cast(int, getattr(network.get_submodule(name), "groups", 1))
        for name, site in sites.items()
    }
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in groups:
            set_attribute(node, "group", groups[node.input[1]])


def _rewrite_nodes(
    graph: onnx.GraphProto,
    replaced: Mapping[str, tuple[str, ...]],
    kernels: Mapping[str, tuple[int, ...]],
) -> None:
    """Put a chain of nodes where a layer was decomposed, in place; the last one has the bias.

    Args:
        replaced: for a weight's name those of the parts.
        kernels: for a part's weight its kernel size.
    """
    nodes = []
    for node in graph.node:
        weight = node.input[1] if len(node.input) > 1 else ""
        if weight in replaced and node.op_type in ("Conv", "Gemm", "MatMul"):
            nodes += _chain(node, replaced[weight], kernels)
        elif node.op_type == "Gather" and node.input[0] in replaced:
            nodes += _table_chain(node, *replaced[node.input[0]])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _table_chain(node: onnx.NodeProto, table: str, weight: str) -> list[onnx.NodeProto]:
    """The nodes of an embedding that became a narrower one and a linear layer."""
    narrow = onnx.NodeProto()
    narrow.CopyFrom(node)
    narrow.name, narrow.input[0] = f"{node.name}_part0", table
    narrow.output[0] = f"{node.output[0]}_part0"
    wide = onnx.helper.make_node(
        "MatMul", [narrow.output[0], weight], list(node.output), f"{node.name}_part1"
    )
    return [narrow, wide]


def _chain(
    node: onnx.NodeProto, weights: tuple[str, ...], kernels: Mapping[str, tuple[int, ...]]
) -> list[onnx.NodeProto]:
    """The nodes of a decomposed layer, one for each part."""
    chain = []
    before = node.input[0]
    turn = handlers([tuple(kernels[weight]) for weight in weights])
    for index, weight in enumerate(weights):
        part = onnx.NodeProto()
        part.CopyFrom(node)
        part.name = f"{node.name}_part{index}"
        part.input[0], part.input[1] = before, weight
        if index < len(weights) - 1:
            del part.input[2:]
            part.output[0] = before = f"{node.output[0]}_part{index}"
        if node.op_type == "Conv":
            _set_window(part, kernels[weight], [handler == index for handler in turn])
        chain.append(part)
    return chain


def _set_window(node: onnx.NodeProto, kernel: tuple[int, ...], handled: list[bool]) -> None:
    """Leave a convolution's strides, pads and dilations only in the dimensions it handles.

    They are the node's own, not the module's: padding may be a node of its own before it.
    """
    neutral = {"strides": 1, "dilations": 1, "pads": 0}
    for attribute in node.attribute:
        if attribute.name == "kernel_shape":
            attribute.ints[:] = kernel
        elif attribute.name in neutral:
            rest = neutral[attribute.name]
            # Pads stand for all beginnings, then for all ends.
            mine = handled * (len(attribute.ints) // len(handled))
            values = zip(attribute.ints, mine, strict=True)
            attribute.ints[:] = [value if own else rest for value, own in values]
