"""The ONNX graph of the original network, exported once; candidates only bring other weights.

Exporting costs over a second, filling a skeleton milliseconds. Channel counts live in the weights,
not in the graph, so one skeleton serves every pruning; a decomposed layer becomes two nodes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export.torch_export import export_graph, set_attribute

Array = NDArray[np.float32]


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


@final
@dataclass(frozen=True)
class _Source:
    """The parameter that an initializer holds: as it is, transposed, or in another shape."""

    parameter: str
    transposed: bool = False
    shape: tuple[int, ...] | None = None

    def value(self, parameter: Array) -> Array:
        value = parameter.T if self.transposed else parameter
        return np.ascontiguousarray(value if self.shape is None else value.reshape(self.shape))


def export_afresh(
    network: nn.Module, example_inputs: tuple[Tensor, ...], layers: tuple[str, ...]
) -> Graph:
    """Export a network whose topology no skeleton covers.

    Args:
        network: batch norms folded.
        layers: names of the layers in the original network.

    Raises:
        ExportError: PyTorch's exporter cannot handle the network.
    """
    model = export_graph(network, example_inputs)
    state = _arrays(network)
    names = [f"{part}.weight" for layer in layers for part in _parts(network, layer)]
    sites = {}
    for initializer in model.graph.initializer:
        source = _find_source(initializer, state)
        if source is not None and source.parameter in names:
            owner = source.parameter.removesuffix(".weight")
            sites[owner] = WeightSite(initializer.name, int(source.transposed))
    return Graph(model, sites)


@final
class Skeleton:
    """A graph to be filled with the weights of any candidate of the same topology.

    Args:
        network: the original network, batch norms folded.
        example_inputs: batch in dimension 0.
        layers: names of the layers that may be decomposed.

    Raises:
        ExportError: PyTorch's exporter cannot handle the network.
    """

    def __init__(
        self, network: nn.Module, example_inputs: tuple[Tensor, ...], layers: tuple[str, ...]
    ) -> None:
        model = export_graph(network, example_inputs)
        state = _arrays(network)
        found = {i.name: _find_source(i, state) for i in model.graph.initializer}
        self._constants = [i for i in model.graph.initializer if found[i.name] is None]
        self._sources = {name: source for name, source in found.items() if source is not None}
        self._layers = layers
        del model.graph.initializer[:]
        self._model = model

    def fill(self, network: nn.Module) -> Graph:
        """The graph with a candidate's weights.

        Args:
            network: batch norms folded; decomposed layers are `nn.Sequential` of two.

        Raises:
            ExportError: the candidate lacks a parameter that the skeleton needs.
        """
        state = _arrays(network)
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.initializer.extend(self._constants)
        sites: dict[str, WeightSite] = {}
        replaced: dict[str, tuple[str, str]] = {}
        for name, source in self._sources.items():
            owner, _, field = source.parameter.rpartition(".")
            parts = _parts(network, owner) if owner in self._layers else (owner,)
            if field == "weight" and len(parts) == 2:
                replaced[name] = (f"{parts[0]}.weight", f"{parts[1]}.weight")
                filled = [(f"{part}.weight", f"{part}.weight", part) for part in parts]
            else:
                filled = [(name, f"{parts[-1]}.{field}".lstrip("."), parts[-1])]
            for initializer, parameter, part in filled:
                if parameter not in state:
                    raise ExportError("A candidate lacks a parameter.", given=parameter)
                value = source.value(state[parameter])
                model.graph.initializer.append(numpy_helper.from_array(value, initializer))
                if field == "weight" and owner in self._layers:
                    sites[part] = WeightSite(initializer, int(source.transposed))
        _rewrite_nodes(model.graph, replaced, _conv_groups(network, sites))
        return Graph(model, sites)


def _arrays(network: nn.Module) -> dict[str, Array]:
    return {k: v.detach().cpu().numpy() for k, v in network.state_dict().items()}


def _parts(network: nn.Module, layer: str) -> tuple[str, ...]:
    """The modules that a layer consists of now: itself, or the two of its decomposition."""
    if isinstance(network.get_submodule(layer), nn.Sequential):
        return (f"{layer}.0", f"{layer}.1")
    return (layer,)


def _find_source(initializer: onnx.TensorProto, state: Mapping[str, Array]) -> _Source | None:
    """The parameter that an initializer holds, by name, else by content."""
    value = numpy_helper.to_array(initializer)
    if initializer.name in state and state[initializer.name].shape == value.shape:
        return _Source(initializer.name)
    if value.dtype != np.float32 or value.size < 2:
        return None
    for name, parameter in state.items():
        if parameter.size != value.size or parameter.dtype != value.dtype:
            continue
        if parameter.ndim == 2 and np.array_equal(parameter.T, value):
            return _Source(name, transposed=True)
        wide = [size for size in value.shape if size > 1]
        if len(wide) == 1 and np.array_equal(parameter.reshape(-1), value.reshape(-1)):
            return _Source(name, shape=tuple(-1 if size > 1 else 1 for size in value.shape))
    return None


def _conv_groups(network: nn.Module, sites: Mapping[str, WeightSite]) -> dict[str, int]:
    return {
        site.initializer: cast(int, getattr(network.get_submodule(name), "groups", 1))
        for name, site in sites.items()
    }


def _rewrite_nodes(
    graph: onnx.GraphProto, replaced: Mapping[str, tuple[str, str]], groups: Mapping[str, int]
) -> None:
    """Set convolution groups and put two nodes where a layer was decomposed, in place."""
    nodes = []
    for node in graph.node:
        weight = node.input[1] if len(node.input) > 1 else ""
        if node.op_type == "Conv" and weight in groups:
            set_attribute(node, "group", groups[weight])
        if weight not in replaced or node.op_type not in ("Conv", "Gemm", "MatMul"):
            nodes.append(node)
            continue
        first, second = onnx.NodeProto(), onnx.NodeProto()
        first.CopyFrom(node)
        second.CopyFrom(node)
        middle = f"{node.output[0]}_rank"
        del first.input[:], first.output[:]
        first.input.extend([node.input[0], replaced[weight][0]])
        first.output.append(middle)
        first.name, second.name = f"{node.name}_first", f"{node.name}_second"
        second.input[0], second.input[1] = middle, replaced[weight][1]
        if node.op_type == "Conv":
            del second.attribute[:]
        nodes += [first, second]
    del graph.node[:]
    graph.node.extend(nodes)
