"""The graph of a network: layers, groups, and which batch norm follows which layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from autocompress.errors import GraphError
from autocompress.graph.blocks import Block
from autocompress.graph.groups import ChannelGroup, find_groups, sparing
from autocompress.graph.heads import find_heads
from autocompress.graph.layers import (
    LAYER_TYPES,
    NORM_TYPES,
    Layer,
    flatten_outputs,
    names_of,
    observe_layers,
    run_hooked,
)
from autocompress.graph.plain import division_faults, layer_faults
from autocompress.graph.residual import find_blocks


@final
@dataclass(frozen=True)
class NetworkGraph:
    """What is known of a network's structure.

    Attributes:
        layers: convolution and linear layers in order of their first call.
        groups: coupled channel groups and attention heads, prunable or with the reason why not.
        norms: for a layer whose output goes into one batch norm only, that norm's name.
        notes: what could not be found out, and why.
        blocks: residual blocks that can be dropped, in the network's order; none holds another.
    """

    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    norms: Mapping[str, str]
    notes: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def group(self, name: str) -> ChannelGroup:
        """The channel group of that name."""
        return next(group for group in self.groups if group.name == name)

    def block(self, name: str) -> Block:
        """The block of that name."""
        return next(block for block in self.blocks if block.name == name)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample of all layers."""
        return sum(layer.macs for layer in self.layers)

    def leaving(self, reasons: Mapping[str, str]) -> NetworkGraph:
        """The graph with further layers left as they are, and the groups that run through them.

        Args:
            reasons: by a layer's name why it is left.
        """
        layers = tuple(replace(x, reason=x.reason or reasons.get(x.name, "")) for x in self.layers)
        groups = tuple(sparing(group, reasons) for group in self.groups)
        return replace(self, layers=layers, groups=groups)


def trace(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> NetworkGraph:
    """Trace a network with example inputs (batch in dimension 0).

    Raises:
        GraphError: the network cannot be run or traced, or has no layer to compress.
    """
    if isinstance(network, LAYER_TYPES):
        raise GraphError(
            "The network is itself a layer, which cannot be replaced in place.",
            given=type(network).__name__,
            allowed="a module that contains its layers",
            advice="wrap it in torch.nn.Sequential",
        )
    # Dependencies are found through gradients, which a frozen network would not have.
    network = copy.deepcopy(network).eval().requires_grad_(True)
    try:
        layers = _judged(network, example_inputs, observe_layers(network, example_inputs))
        norms = find_norms(network, example_inputs)
    except Exception as cause:
        # A user's forward pass may raise anything.
        raise GraphError(
            f"The network does not run on its example inputs: {type(cause).__name__}: {cause}",
            given=[tuple(x.shape) for x in example_inputs],
            advice="make network(*example_inputs) work first",
        ) from cause
    if not layers:
        raise GraphError(
            "The network has no layer to compress.",
            given=type(network).__name__,
            allowed="at least one of " + ", ".join(t.__name__ for t in LAYER_TYPES),
        )
    plain = [layer for layer in layers if layer.compressible]
    names = {layer.name for layer in plain}
    heads = find_heads(network, example_inputs, plain)
    spared = {
        name
        for name, module in network.named_modules()
        if isinstance(module, LAYER_TYPES) and name not in names
    }
    groups, notes = heads, tuple[str, ...]()
    try:
        groups = find_groups(network, example_inputs, heads, spared)
    except GraphError as reason:
        notes = (f"No channels can be removed, for want of channel groups. {reason.what}",)
    if not groups and not notes:
        notes = ("No channels can be removed: no channel groups were found.",)
    norms = {layer: norm for layer, norm in norms.items() if layer in names}
    blocks = find_blocks(network, example_inputs, layers, norms)
    return NetworkGraph(layers, groups, norms, notes, blocks)


def _judged(
    network: nn.Module, example_inputs: tuple[Tensor, ...], layers: tuple[Layer, ...]
) -> tuple[Layer, ...]:
    """The layers with why they are left as they are, or can't be replaced by several."""
    faults = layer_faults(network, example_inputs)
    layers = tuple(replace(layer, reason=faults.get(layer.name, "")) for layer in layers)
    whole = division_faults(network, example_inputs, layers)
    return tuple(replace(layer, undivided=whole.get(layer.name, "")) for layer in layers)


def find_norms(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """Pairs of layer and batch norm where the norm is the only reader of the layer's output.

    Found by running: the norm's input is the very tensor that the layer gave, with the channels in
    the same dimension, each is called once, and nothing else reads it (checked by perturbing the
    output between the two). Norms without running statistics are no partners.
    """
    names = {module: name for name, module in network.named_modules()}
    given: dict[int, tuple[nn.Module, Tensor]] = {}
    calls: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, nn.Module] = {}

    def after_layer(module: nn.Module, args: Any, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        given[id(output)] = (module, output)

    def before_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        found = given.get(id(args[0]))
        if found is not None and found[1] is args[0] and _same_channels(found[0], module, args[0]):
            pairs[found[0]] = module

    handles = [
        m.register_forward_hook(after_layer)
        for m in network.modules()
        if isinstance(m, LAYER_TYPES)
    ] + [
        m.register_forward_pre_hook(before_norm)
        for m in network.modules()
        if isinstance(m, NORM_TYPES)
    ]
    reference = run_hooked(network, example_inputs, handles)
    single = {a: b for a, b in pairs.items() if calls[a] == 1 and calls[b] == 1}
    sole = {
        a: b for a, b in single.items() if _only_reader(network, a, b, example_inputs, reference)
    }
    several = names_of(network)
    return {names[a]: names[b] for a, b in sole.items() if len(several[b]) == 1}


def _same_channels(layer: nn.Module, norm: nn.Module, between: Tensor) -> bool:
    """Whether a norm scales the layer's output channels: a linear layer's come last, not second."""
    tracked = isinstance(norm, NORM_TYPES) and norm.track_running_stats
    return tracked and not (isinstance(layer, nn.Linear) and between.dim() > 2)


def _only_reader(
    network: nn.Module,
    layer: nn.Module,
    norm: nn.Module,
    inputs: tuple[Tensor, ...],
    reference: Any,
) -> bool:
    """Whether noise on a layer's output that is taken off inside the norm changes nothing."""
    generator = torch.Generator().manual_seed(0)
    noise: list[Tensor] = []

    def perturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise.append(torch.randn(output.shape, generator=generator).to(output))
        return output + noise[0]

    shift = [
        layer.register_forward_hook(perturb),
        norm.register_forward_pre_hook(lambda m, a: (a[0] - noise[0],)),
    ]
    shifted = run_hooked(network, inputs, shift)
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(flatten_outputs(reference), flatten_outputs(shifted), strict=True)
    )
