"""Which layers do what their type says, and may be changed: found out on the example inputs.

Techniques take a layer for what its base class computes from `weight` and `bias`. A layer that
computes something else, or whose parameters are not its own alone, is left as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph.layers import (
    LAYER_TYPES,
    MOST_LISTED,
    Layer,
    flatten_outputs,
    names_of,
    run_hooked,
    sharing_modules,
)

# Kernels of other layouts sum in another order.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4


def layer_faults(network: nn.Module, example_inputs: Sequence[Tensor]) -> dict[str, str]:
    """By the name of a layer that was called, why no technique may change it.

    Args:
        network: in evaluation mode; left as it was.
        example_inputs: inputs with the batch in dimension 0.
    """
    names = {module: found[0] for module, found in names_of(network).items()}
    shared = sharing_modules(network)
    faults = {
        names[module]: f"it shares a weight with {', '.join(shared[names[module]])}"
        for module in names
        if isinstance(module, LAYER_TYPES) and names[module] in shared
    }
    layers = [m for m in names if isinstance(m, LAYER_TYPES)]
    for layer in layers:
        reason = _construction_fault(layer)
        if reason:
            faults.setdefault(names[layer], reason)

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        reason = _call_fault(module, args, kwargs, output)
        if reason:
            faults.setdefault(names[module], reason)

    handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    run_hooked(network, example_inputs, handles)
    return faults


def base_type(layer: nn.Module) -> type[nn.Module]:
    """The layer type that a layer is, or is derived from."""
    return next(kind for kind in LAYER_TYPES if isinstance(layer, kind))


def _construction_fault(layer: nn.Module) -> str:
    kind = base_type(layer).__name__
    if any(layer._parameters.get(name, layer) is layer for name in ("weight", "bias")):
        return (
            "its weight is computed from other parameters; "
            "torch.nn.utils.parametrize.remove_parametrizations makes it plain"
        )
    others = any(True for child in layer.children() for _ in child.parameters())
    if set(layer._parameters) - {"weight", "bias"} or others:
        return f"it has parameters that a plain {kind} has not"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks, which would be lost or see something else"
    return ""


def _call_fault(module: nn.Module, args: Any, kwargs: Any, output: Any) -> str:
    kind: Any = base_type(module)
    if kwargs or len(args) != 1 or not isinstance(output, Tensor):
        return f"it is called otherwise than a {kind.__name__}, with one tensor that gives one"
    if not _computes_itself(module):
        return ""
    try:
        plain = _plain_output(module, args[0])
    except Exception as cause:
        # An input that the base class does not take.
        return _foreign(module, f"{type(cause).__name__} there")
    if own_padding(module, args[0], output) is not None:
        return ""
    if plain.shape != output.shape:
        return _foreign(module, f"its outputs are {tuple(output.shape)}, not {tuple(plain.shape)}")
    if not torch.allclose(plain, output, rtol=_RELATIVE, atol=_ABSOLUTE):
        return _foreign(module, "its outputs differ")
    return ""


def _computes_itself(module: nn.Module) -> bool:
    kind = base_type(module)
    return any(_overrides(module, kind, name) for name in ("forward", "_conv_forward"))


def _overrides(module: nn.Module, kind: type[nn.Module], name: str) -> bool:
    return name in vars(module) or getattr(type(module), name, None) is not getattr(
        kind, name, None
    )


def _plain_output(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, module.weight, module.bias)
    convolve: Any = base_type(module)
    output: Tensor = convolve._conv_forward(module, x, module.weight, module.bias)
    return output


def own_padding(module: Any, x: Tensor, output: Tensor) -> tuple[int, ...] | None:
    """How a convolution pads its input with zeros by itself, as `F.pad` takes it; None if not so.

    Both ways of sharing out an odd number are tried, as in TensorFlow's `SAME` padding.
    """
    if isinstance(module, nn.Linear) or output.dim() != x.dim():
        return None
    settings = (module.kernel_size, module.stride, module.dilation)
    missing = [
        (out - 1) * stride + (kernel - 1) * dilation + 1 - size
        for size, out, kernel, stride, dilation in zip(
            x.shape[2:], output.shape[2:], *settings, strict=True
        )
    ]
    if module.padding_mode != "zeros" or not any(n > 0 for n in missing) or min(missing) < 0:
        return None
    convolve: Any = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    for more in (0, 1):
        halves = [(n + more) // 2 for n in missing]
        sides = [s for n, half in zip(missing, halves, strict=True) for s in (n - half, half)]
        # The last dimension comes first.
        sides = [s for i in reversed(range(len(missing))) for s in sides[2 * i : 2 * i + 2]]
        found = convolve(
            F.pad(x, sides), module.weight, module.bias, module.stride, 0,
            module.dilation, module.groups,
        )  # fmt: skip
        if found.shape == output.shape and torch.allclose(
            found, output, rtol=_RELATIVE, atol=_ABSOLUTE
        ):
            return tuple(sides)
    return None


def plain_input(module: Any, x: Tensor, output: Tensor) -> Tensor:
    """The input that a plain layer of the same settings makes the output of.

    A padded one, where a convolution pads by itself.
    """
    sides = own_padding(module, x, output) if _computes_itself(module) else None
    return x if sides is None else F.pad(x, sides)


def _foreign(module: nn.Module, how: str) -> str:
    kind = base_type(module).__name__
    return f"{type(module).__name__} computes something else than nn.{kind}: {how}"


def division_faults(
    network: nn.Module, example_inputs: Sequence[Tensor], layers: Sequence[Layer]
) -> dict[str, str]:
    """By a layer's name, why it can't be replaced by several layers, which have no `weight`.

    Each is put into an `nn.Sequential`: all together, and one by one if the network then fails.

    Args:
        network: in evaluation mode; not changed.
    """
    faults = {}
    for module, names in names_of(network).items():
        if len(names) > 1:
            faults[names[0]] = f"it is also registered as {', '.join(names[1 : MOST_LISTED + 1])}"
        elif isinstance(module, LAYER_TYPES) and _pads_itself(module):
            faults[names[0]] = "it pads its input itself"
    single = [x.name for x in layers if x.compressible and x.name not in faults]
    trial = copy.deepcopy(network)
    with torch.no_grad():
        expected = flatten_outputs(trial(*example_inputs))
    if not _wrapping_fault(trial, example_inputs, single, expected):
        return faults
    for name in single:
        reason = _wrapping_fault(trial, example_inputs, [name], expected)
        if reason:
            faults[name] = reason
    return faults


def _pads_itself(module: Any) -> bool:
    """Whether a layer's own forward, and not its settings, gives its outputs their size."""
    kernel = getattr(module, "kernel_size", ())
    own = any(_overrides(module, base_type(module), n) for n in ("forward", "_conv_forward"))
    return own and any(size > 1 for size in kernel)


def _wrapping_fault(
    network: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], expected: Sequence[Tensor]
) -> str:
    """Why a network cannot do with layers inside an `nn.Sequential`; it is left as it was."""
    layers = {name: network.get_submodule(name) for name in names}
    try:
        for name, layer in layers.items():
            network.set_submodule(name, nn.Sequential(layer).eval())
        with torch.no_grad():
            found = flatten_outputs(network(*inputs))
    except Exception as cause:
        # A user's forward pass may raise anything.
        text = (str(cause).splitlines() or [type(cause).__name__])[0][:120]
        return f"the network reads more of it than its output: {text}"
    finally:
        for name, layer in layers.items():
            network.set_submodule(name, layer)
    return "" if _alike(expected, found) else "the network reads more of it than its output"


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )
