"""Functions of a graph whose weights are parameters, and the modules that stand for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, fx, nn

Arguments: TypeAlias = Mapping[str, Any]
_META = torch.device("meta")
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {3: nn.Conv1d, 4: nn.Conv2d}
# The arguments that hold tensors of a module, and the names that modules have for them.
_FIELDS = ("weight", "bias", "running_mean", "running_var")


@final
@dataclass(frozen=True)
class Raised:
    """A module in the place of a function.

    Attributes:
        name: where it goes in the network.
        reads: the function's argument that is the module's input.
    """

    name: str
    module: nn.Module
    reads: str


def raised_from(graph: fx.Graph, source: nn.Module) -> dict[fx.Node, Raised]:
    """The modules that can stand for functions of a graph, by the function's node.

    Args:
        source: holds what the graph's `get_attr` nodes name.
    """
    tensors = {
        node: operator.attrgetter(str(node.target))(source)
        for node in graph.find_nodes(op="get_attr")
    }
    every = {str(node.target) for node in tensors}
    chosen: dict[fx.Node, tuple[_Kind, dict[str, Any], dict[str, fx.Node]]] = {}
    for node in graph.nodes:
        arguments = arguments_of(node)
        kind = _KINDS.get(node.target)
        held = {f: arguments[f] for f in _FIELDS if isinstance(arguments.get(f), fx.Node)}
        if kind is None or not isinstance(tensors.get(arguments["weight"]), nn.Parameter):
            continue
        if all(value in tensors for value in held.values()) and kind.fits(arguments, tensors):
            chosen[node] = kind, arguments, held
    raised_nodes = set(chosen)
    staying = {
        str(node.target) for node in tensors if not all(u in raised_nodes for u in node.users)
    }
    made: dict[tuple[object, ...], tuple[str, nn.Module]] = {}
    found = {}
    for node, (kind, arguments, held) in chosen.items():
        values = {field: tensors[value] for field, value in held.items()}
        module = kind.build({**arguments, **values})
        for field, value in values.items():
            setattr(module, field, value)
        key = (type(module), repr(module), *((f, id(v)) for f, v in values.items()))
        if key not in made:
            paths = {field: str(value.target) for field, value in held.items()}
            taken = {name for name, _ in made.values()}
            made[key] = _name(paths, kind.label, _Names(every, staying, taken)), module
        name, module = made[key]
        found[node] = Raised(name, module, kind.reads)
    return found


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by their names, defaults filled in; else none."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return {}
    found = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    found.update(zip(found, node.args, strict=False))
    return {**found, **node.kwargs}


@final
@dataclass(frozen=True)
class _Kind:
    """A kind of layer.

    Attributes:
        reads: the argument that is the layer's input.
        build: a module for arguments whose tensors are there; it has no tensors of its own yet.
        fits: whether the module can stand for such a call.
    """

    label: str
    reads: str
    build: Callable[[Arguments], nn.Module]
    fits: Callable[[Arguments, Mapping[fx.Node, Any]], bool] = lambda arguments, tensors: True


def _linear(arguments: Arguments) -> nn.Module:
    rows, columns = arguments["weight"].shape
    return nn.Linear(columns, rows, arguments["bias"] is not None, device=_META)


def _convolution(arguments: Arguments) -> nn.Module:
    weight, groups = arguments["weight"], arguments["groups"]
    sides = weight.ndim - 2
    padding = arguments["padding"]
    return _CONVOLUTIONS[weight.ndim](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=_each(arguments["stride"], sides),
        padding=padding if isinstance(padding, str) else _each(padding, sides),
        dilation=_each(arguments["dilation"], sides),
        groups=groups,
        bias=arguments["bias"] is not None,
        device=_META,
    )  # fmt: skip


def _each(value: int | list[int], sides: int) -> Any:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * sides if len(values) == 1 else values)


def _batch_norm(arguments: Arguments) -> nn.Module:
    weight = arguments["weight"]
    kind = _NORMS[arguments["input"].meta["val"].ndim]
    module = kind(len(weight), arguments["eps"], arguments["momentum"], device=_META)
    module.num_batches_tracked = torch.tensor(0)
    return module


def _fits_batch_norm(arguments: Arguments, tensors: Mapping[fx.Node, Any]) -> bool:
    return all(isinstance(tensors.get(arguments[field]), Tensor) for field in _FIELDS)


def _layer_norm(arguments: Arguments) -> nn.Module:
    return nn.LayerNorm(
        list(arguments["normalized_shape"]), arguments["eps"],
        bias=arguments["bias"] is not None, device=_META,
    )  # fmt: skip


def _embedding(arguments: Arguments) -> nn.Module:
    rows, width = arguments["weight"].shape
    padding = arguments["padding_idx"]
    return nn.Embedding(rows, width, None if padding < 0 else padding, device=_META)


_ATEN = torch.ops.aten
_CONVOLUTION = _Kind("conv", "input", _convolution)
_KINDS: dict[Any, _Kind] = {
    _ATEN.linear.default: _Kind("linear", "input", _linear),
    _ATEN.conv1d.default: _CONVOLUTION,
    _ATEN.conv1d.padding: _CONVOLUTION,
    _ATEN.conv2d.default: _CONVOLUTION,
    _ATEN.conv2d.padding: _CONVOLUTION,
    _ATEN.batch_norm.default: _Kind("norm", "input", _batch_norm, _fits_batch_norm),
    _ATEN.layer_norm.default: _Kind("norm", "input", _layer_norm),
    _ATEN.embedding.default: _Kind("embedding", "indices", _embedding),
}


@final
@dataclass(frozen=True)
class _Names:
    """What names there are: of all tensors, of those that stay tensors, and of other modules."""

    every: set[str]
    staying: set[str]
    taken: set[str]

    def free(self, name: str, paths: Mapping[str, str]) -> bool:
        """Whether a module with tensors of these paths may have a name."""
        own = {f"{name}.{field}" for field, path in paths.items() if path == f"{name}.{field}"}
        inside = {path for path in self.every if path.startswith(f"{name}.")}
        parents = {name[:i] for i, letter in enumerate(name) if letter == "."}
        return (
            bool(name)
            and name not in self.taken | self.staying
            and not parents & (self.taken | self.staying)
            and not any(other.startswith(f"{name}.") for other in self.taken)
            and inside <= own | {f"{name}.num_batches_tracked"}
        )


def _name(paths: Mapping[str, str], label: str, names: _Names) -> str:
    """The owner of the weight where that is this module alone, else a name after the weight."""
    weight = paths["weight"]
    owners = [path.rpartition(".")[0] for path in paths.values()]
    plain = weight.replace(".", "_")
    choices = [*owners, weight, f"{weight}_{label}", f"{plain}_{label}"]
    choices += [f"{plain}_{label}_{number}" for number in range(1, len(names.taken) + 2)]
    return next(name for name in choices if names.free(name, paths))
