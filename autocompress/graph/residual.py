"""Which blocks of a network can be dropped: residual ones, found by running them.

A block is believed to be residual only after a trial: with every weight matrix in it at zero it
must still pass its input on, value by value, and it must add something to inputs that are zero,
which a gate does not. That the network runs without it is tried on the network itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph.blocks import Block, drop_blocks, first_output, first_tensor, is_within
from autocompress.graph.layers import NORM_TYPES, Layer, flatten_outputs, names_of, run_hooked

# Trial inputs and how far they are moved: values that any activation passes on.
_LEAST_INPUT, _STEP = 0.5, 0.05
# Cosine of how inputs were moved and how outputs moved: norms take a little off, shuffles all.
_ALIKE = 0.5
_REPEATED = (nn.ModuleList, nn.Sequential)
# The arguments of a module's call.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def find_blocks(
    network: nn.Module,
    example_inputs: tuple[Tensor, ...],
    layers: Sequence[Layer],
    norms: Mapping[str, str],
) -> tuple[Block, ...]:
    """Residual blocks that can be dropped, in the network's order; none holds another.

    Members of lists and sequences are taken as a whole, such as a transformer's layers; a stage
    that consists of such blocks alone is none itself.

    Args:
        network: in evaluation mode; left as it was.
        layers: those that were called, in order of their first call.
        norms: by a layer's name that of the batch norm that becomes part of it.
    """
    try:
        found = _keeping_shapes(network, example_inputs, layers)
        calls = _calls(network, example_inputs, found)
    except Exception:
        # A user's forward pass may do anything with what it is given back.
        return ()
    residual = {n: b for n, b in found.items() if n in calls and _is_residual(network, n, calls[n])}
    chosen = [residual[name] for name in _outermost(network, residual, layers)]
    with torch.no_grad():
        wanted = flatten_outputs(network(*example_inputs))
        usable = [b for b in chosen if _run_without(network, [b], example_inputs, wanted)]
        if not usable:
            return ()
        # An input that is handed on may not be written over later, by whatever reads it.
        plain, copied = (
            _run_without(network, usable, example_inputs, wanted, alter)
            for alter in (lambda x: x, torch.clone)
        )
    if not plain or not copied or not all(map(torch.equal, plain, copied)):
        return ()
    known = {layer.name for layer in layers} | set(norms.values())
    return tuple(_weighed(network, block, known) for block in usable)


def _weighed(network: nn.Module, block: Block, known: set[str]) -> Block:
    others = [
        parameter.numel()
        for name, module in network.get_submodule(block.name).named_modules(prefix=block.name)
        if name not in known
        for parameter in module.parameters(recurse=False)
    ]
    return replace(block, other_weights=sum(others))


def _keeping_shapes(
    network: nn.Module, example_inputs: tuple[Tensor, ...], layers: Sequence[Layer]
) -> dict[str, Block]:
    """Modules that hold layers, are called once, and give what has their first input's shape."""
    several = names_of(network)
    found: dict[str, Block] = {}
    calls: dict[str, int] = {}
    versions: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            x = first_tensor(args, kwargs)
            versions[name] = -1 if x is None else x._version

        return hook

    def after(name: str, inner: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x, given = first_tensor(args, kwargs), first_output(output)
            if x is None or given is None or not x.is_floating_point():
                return
            # A block that works on its input in place leaves nothing to pass on.
            alike = (x.shape, x.dtype) == (given[0].shape, given[0].dtype)
            if alike and x._version == versions[name] and given[0] is not x:
                found[name] = Block(name, inner, 0, given[1], given[2])

        return hook

    handles = []
    for name, module in network.named_modules():
        inner = tuple(layer.name for layer in layers if is_within(layer.name, [name]))
        changeable = any(x.compressible for x in layers if x.name in inner)
        private = all(is_within(f"{n}.", [name]) for m in module.modules() for n in several[m])
        if name and changeable and private and len(inner) < len(layers):
            handles += [
                module.register_forward_pre_hook(before(name), with_kwargs=True),
                module.register_forward_hook(after(name, inner), with_kwargs=True),
            ]
    run_hooked(network, example_inputs, handles)
    return {name: block for name, block in found.items() if calls[name] == 1}


def _calls(
    network: nn.Module, example_inputs: tuple[Tensor, ...], names: Iterable[str]
) -> dict[str, _Call]:
    """What modules are called with, as it is before they are; left out if it can't be copied."""
    found: dict[str, _Call] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            try:
                found[name] = copy.deepcopy((args, kwargs))
            except Exception:
                # Whatever a user hands to a block.
                return

        return hook

    run_hooked(
        network,
        example_inputs,
        [
            network.get_submodule(n).register_forward_pre_hook(keep(n), with_kwargs=True)
            for n in names
        ],
    )
    return found


def _is_residual(network: nn.Module, name: str, call: _Call) -> bool:
    """Whether a block adds something to its input, which passes it value by value."""
    module = network.get_submodule(name)
    x = cast(Tensor, first_tensor(*call))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(x.shape, generator=generator).to(x) for _ in range(2)]
    base, moved = _LEAST_INPUT + drawn[0], _STEP * (2 * drawn[1] - 1)
    gone = drawn[1] < _LEAST_INPUT
    try:
        with torch.no_grad():
            muted = _muted(module)
            change = _answer(muted, call, base + moved) - _answer(muted, call, base)
            added = _answer(module, call, base.masked_fill(gone, 0))[gone]
    except Exception:
        # Inputs of other values than it is made for.
        return False
    alike = F.cosine_similarity(change.flatten(), moved.flatten(), 0)
    return float(alike) > _ALIKE and bool(added.isfinite().all() and added.any())


def _muted(module: nn.Module) -> nn.Module:
    """A copy of a module whose matrices and kernels are zero, and whose norms are neutral."""
    muted = copy.deepcopy(module)
    for part in muted.modules():
        for parameter in part.parameters(recurse=False):
            # Of the one-dimensional those that matter are the scales of norms.
            zero = parameter.dim() > 1 and not isinstance(part, nn.LayerNorm)
            parameter.fill_(0.0 if zero else 1.0)
        if isinstance(part, NORM_TYPES):
            part.reset_running_stats()
    return muted


def _answer(module: nn.Module, call: _Call, x: Tensor) -> Tensor:
    """What a module gives if its first tensor input is another one."""
    args, kwargs = copy.deepcopy(call)
    places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
    if places:
        args = (*args[: places[0]], x, *args[places[0] + 1 :])
    else:
        kwargs[next(k for k, value in kwargs.items() if isinstance(value, Tensor))] = x
    given = first_output(module(*args, **kwargs))
    assert given is not None
    return given[0]


def _outermost(
    network: nn.Module, blocks: Mapping[str, Block], layers: Sequence[Layer]
) -> list[str]:
    """Of blocks that hold each other those that are repeated, and else the outer ones."""

    def repeated(name: str) -> bool:
        return isinstance(network.get_submodule(name.rpartition(".")[0]), _REPEATED)

    kept = []
    for name, block in blocks.items():
        members = [n for n in blocks if is_within(n, [name]) and repeated(n)]
        covered = all(is_within(layer, members) for layer in block.layers)
        if not members or (repeated(name) and not covered):
            kept.append(name)
    order = [name for name, _ in network.named_modules()]
    return sorted((n for n in kept if not is_within(n, kept)), key=order.index)


def _run_without(
    network: nn.Module,
    blocks: Sequence[Block],
    inputs: tuple[Tensor, ...],
    wanted: Sequence[Tensor],
    alter: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[Tensor]:
    """Outputs without some blocks; none if it does not run or they have other shapes.

    Args:
        network: left as it was.
        alter: what is done to each tensor that is passed on.
    """
    modules = {block.name: network.get_submodule(block.name) for block in blocks}
    try:
        drop_blocks(network, blocks)
        for name in modules:
            network.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs: _altered(args, kwargs, alter), with_kwargs=True
            )
        found = flatten_outputs(network(*inputs))
    except Exception:
        # A network that reads more of a block than its output.
        return []
    finally:
        for name, module in modules.items():
            network.set_submodule(name, module)
    same = [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in wanted]
    return found if same else []


def _altered(
    args: tuple[Any, ...], kwargs: dict[str, Any], alter: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def one(value: Any) -> Any:
        return alter(value) if isinstance(value, Tensor) else value

    return tuple(map(one, args)), {key: one(value) for key, value in kwargs.items()}
