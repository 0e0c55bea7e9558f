"""Which parameter each initializer of an exported graph holds, and which layers that serves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.bank.store import tensors_hash
from autocompress.export.edit import (
    LAYER_OPERATORS,
    TABLE_OPERATOR,
    copied,
    drop_initializers,
    emptied,
)
from autocompress.export.torch_export import export_graph
from autocompress.workload import Axes

Array = NDArray[np.float32]
# Of the noise that tells equal parameters apart, as a share of their largest value.
_MARK = 1e-5


@final
@dataclass(frozen=True)
class Source:
    """The parameter that an initializer holds: as it is, transposed, or in another shape."""

    parameter: str
    transposed: bool = False
    shape: tuple[int, ...] | None = None

    def value(self, parameter: Array) -> Array:
        """What the initializer holds for a value of the parameter."""
        value = parameter.T if self.transposed else parameter
        return np.ascontiguousarray(value if self.shape is None else value.reshape(self.shape))


def parameter_arrays(network: nn.Module) -> dict[str, Array]:
    """Parameters and buffers by name."""
    return {k: v.detach().cpu().numpy() for k, v in network.state_dict().items()}


def export_distinct(
    network: nn.Module, example_inputs: tuple[Tensor, ...], axes: Sequence[Axes] = ()
) -> tuple[onnx.ModelProto, dict[str, Source]]:
    """Export a network, and find the parameters that the graph's initializers hold.

    The exporter keeps one of several equal initializers, such as biases of zeros. For the export
    parameters that are equal, or all one number, are told apart by noise far below the rounding of
    float kernels; the model has the network's own values.

    Raises:
        ExportError: PyTorch's exporter cannot handle the network.
    """
    marked = _distinct(network)
    model = export_graph(marked, example_inputs, axes)
    sources = name_weights(model, find_sources(model, marked))
    state = parameter_arrays(network)
    names = [i.name for i in model.graph.initializer]
    constants = {i.name: copied(i) for i in model.graph.initializer if i.name not in sources}
    model = emptied(model)
    for name in names:
        exact = constants.get(name)
        if exact is None:
            source = sources[name]
            exact = numpy_helper.from_array(source.value(state[source.parameter]), name)
        model.graph.initializer.append(exact)
    return model, sources


def _distinct(network: nn.Module) -> nn.Module:
    """A copy of a network of whose parameters no two are equal."""
    marked = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    # Digests: the values would be a second network.
    seen = set[str]()
    with torch.no_grad():
        for parameter in marked.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            key = tensors_hash((parameter,))
            first = parameter.reshape(-1)[0]
            if key in seen or bool((parameter == first).all()):
                size = _MARK * float(parameter.abs().max() or 1.0)
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
            seen.add(key)
    return marked


def find_sources(model: onnx.ModelProto, network: nn.Module) -> dict[str, Source]:
    """The parameters that a graph's initializers hold, by the initializers' names.

    Several copies of one parameter, as a module that is called several times leaves them, become
    one, in place. Of parameters that are equal each is taken once, in the network's order.
    """
    aliases = _first_names(network)
    arrays = parameter_arrays(network)
    state = {name: arrays[name] for name in dict.fromkeys(aliases.values())}
    found: dict[str, Source] = {}
    for initializer in model.graph.initializer:
        name = aliases.get(initializer.name, "")
        # The name alone is not enough: the exporter may have put a norm into a weight.
        if name in state and np.array_equal(state[name], numpy_helper.to_array(initializer)):
            found[initializer.name] = Source(name)
    taken = {source.parameter for source in found.values()}
    for initializer in model.graph.initializer:
        if initializer.name in found:
            continue
        options = list(_by_content(numpy_helper.to_array(initializer), state))
        if options:
            chosen = next((o for o in options if o.parameter not in taken), options[-1])
            found[initializer.name] = chosen
            taken.add(chosen.parameter)
    _merge_copies(model, found)
    return found


def _first_names(network: nn.Module) -> dict[str, str]:
    """The first name of each parameter and buffer, by all its names."""
    first: dict[int, str] = {}
    named = network.state_dict(keep_vars=True).items()
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _by_content(value: NDArray[np.generic], state: Mapping[str, Array]) -> Iterator[Source]:
    if value.dtype != np.float32 or value.size < 2:
        return
    wide = [size for size in value.shape if size > 1]
    for name, parameter in state.items():
        if parameter.size != value.size or parameter.dtype != value.dtype:
            continue
        if parameter.ndim == 2 and np.array_equal(parameter.T, value):
            yield Source(name, transposed=True)
        elif len(wide) == 1 and np.array_equal(parameter.reshape(-1), value.reshape(-1)):
            yield Source(name, shape=tuple(-1 if size > 1 else 1 for size in value.shape))


def name_weights(model: onnx.ModelProto, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Call transposed weights as their parameters are, in place; the sources by the new names.

    The exporter numbers them, and without a block it counts otherwise.
    """
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*graph.initializer, *graph.input, *graph.output)}
    transposed = {name: s.parameter for name, s in sources.items() if s.transposed}
    outputs = {output.name for output in graph.output}
    new = {a: b for a, b in transposed.items() if b not in taken and a not in outputs}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in new:
                node.input[place] = new[name]
    for initializer in graph.initializer:
        initializer.name = new.get(initializer.name, initializer.name)
    return {new.get(name, name): source for name, source in sources.items()}


def _merge_copies(model: onnx.ModelProto, sources: dict[str, Source]) -> None:
    """Let all nodes read the first of several initializers that hold the same, in place."""
    kept: dict[Source, str] = {}
    instead = {name: kept.setdefault(source, name) for name, source in sources.items()}
    outputs = {output.name for output in model.graph.output}
    spare = {name for name, first in instead.items() if name != first and name not in outputs}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in spare:
                node.input[place] = instead[name]
    drop_initializers(model.graph, spare)
    for name in spare:
        del sources[name]


def site_faults(
    graph: onnx.GraphProto, sources: Mapping[str, Source], layers: Sequence[str]
) -> dict[str, str]:
    """By a layer's name why a graph cannot follow a change of its weight, as far as can be seen."""
    places: dict[str, list[str]] = {}
    for name, source in sources.items():
        places.setdefault(source.parameter, []).append(name)
    faults = {}
    for layer in layers:
        held = places.get(f"{layer}.weight", [])
        if len(held) != 1:
            how = "in several forms" if held else "otherwise than the network has it"
            faults[layer] = f"the ONNX graph holds its weight {how}"
            continue
        readers = [node for node in graph.node if held[0] in node.input]
        wrong = sorted({node.op_type for node in readers if not _multiplies(node, held[0])})
        if wrong or not readers:
            others = ", ".join(wrong) or "nothing"
            faults[layer] = f"in the ONNX graph its weight is read by {others}"
    return faults


def _multiplies(node: onnx.NodeProto, weight: str) -> bool:
    """Whether a node is a convolution or product with the weight on its right side alone.

    Or one that gathers rows of it.
    """
    places = [place for place, name in enumerate(node.input) if name == weight]
    if node.op_type == TABLE_OPERATOR:
        return places == [0]
    return node.op_type in LAYER_OPERATORS and places == [1]
