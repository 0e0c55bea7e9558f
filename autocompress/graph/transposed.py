"""Linear layers under another name and with a transposed weight, as plain linear layers.

The GPT-2 family of transformers has such (`Conv1D`); all that compresses knows `nn.Linear`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from autocompress.graph.layers import (
    LAYER_TYPES,
    NORM_TYPES,
    linear_of,
    names_of,
    run_hooked,
    same_outputs,
    sharing_modules,
)

_OTHER = (*LAYER_TYPES, *NORM_TYPES, nn.Embedding, nn.LayerNorm)
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


def with_linear_layers(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> nn.Module:
    """The network with `nn.Linear` for every module that computes `x W + b`, weight (in, out).

    Each is proven on the example inputs, and so are the outputs at the end.

    Args:
        network: in evaluation mode; not changed, and given back itself if there is none.
        example_inputs: batch in dimension 0.
    """
    names = _transposed(network, example_inputs)
    if not names:
        return network
    changed = copy.deepcopy(network)
    for name in names:
        changed.set_submodule(name, _linear(changed.get_submodule(name)))
    return changed if same_outputs(network, changed, example_inputs) else network


def _linear(module: nn.Module) -> nn.Linear:
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    return linear_of(weight.T, bias).train(module.training)


def _transposed(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> list[str]:
    names, shared = names_of(network), sharing_modules(network)
    verdicts: dict[nn.Module, bool] = {}

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        verdicts[module] = verdicts.get(module, True) and _multiplies(module, args, kwargs, output)

    handles = [
        module.register_forward_hook(compare, with_kwargs=True)
        for module, found in names.items()
        if len(found) == 1 and found[0] and found[0] not in shared and _may_be_linear(module)
    ]
    run_hooked(network, example_inputs, handles)
    return [names[module][0] for module, linear in verdicts.items() if linear]


def _may_be_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        not isinstance(module, _OTHER)
        and set(module._parameters) == {"weight", "bias"}
        and weight is not None
        and weight.dim() == 2
        and not any(True for _ in module.children())
        and not any(True for _ in module.buffers())
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _multiplies(module: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    if kwargs or len(args) != 1 or not isinstance(output, Tensor):
        return False
    x = args[0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-1] != len(weight):
        return False
    plain = x @ weight if bias is None else x @ weight + bias
    return plain.shape == output.shape and torch.allclose(
        plain, output, rtol=_RELATIVE, atol=_ABSOLUTE
    )
