"""Where channels can be scaled on one side and scaled back on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from autocompress.graph import ChannelGroup, Member, NetworkGraph
from autocompress.graph.blocks import dropped_blocks
from autocompress.graph.layers import LAYER_TYPES, NORM_TYPES


@final
@dataclass(frozen=True)
class Side:
    """Rows of a layer that write a boundary's channels, or columns that read them.

    Attributes:
        norm: the batch norm behind the layer, if it is not part of it.
        index: rows or columns, as in `Member`; of depthwise convolutions always rows.
        by_column: whether `index` counts input channels.
    """

    layer: nn.Module
    norm: nn.Module | None
    index: Tensor
    per_channel: int
    by_column: bool


@final
@dataclass(frozen=True)
class Boundary:
    """Channels between layers that can be scaled on one side and scaled back on the other."""

    group: str
    size: int
    writers: tuple[Side, ...]
    readers: tuple[Side, ...]


def fits(network: nn.Module, graph: NetworkGraph) -> bool:
    """Whether the network has all layers, with the channels that the graph knows."""
    if dropped_blocks(network):
        return False
    for layer in graph.layers:
        module = network.get_submodule(layer.name)
        read, written = _part(module, 0), _part(module, -1)
        if (channels(read)[0], channels(written)[1]) != (layer.in_channels, layer.out_channels):
            return False
    return True


def channels(module: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    conv = cast(nn.Conv2d, module)
    return conv.in_channels, conv.out_channels


def _part(module: nn.Module, index: int) -> nn.Module:
    """The first or last part of a decomposed layer, or the layer itself."""
    return module[index] if isinstance(module, nn.Sequential) else module


def boundaries_of(
    network: nn.Module, graph: NetworkGraph, group: ChannelGroup
) -> tuple[Boundary, ...]:
    """The boundaries of a channel group, parted by the depthwise convolutions in it, in order.

    None where the group holds anything but layers and the batch norms behind them, or where a
    layer before a depthwise convolution reads what one behind it writes.
    """
    names = {m.module for m in group.members}
    layers = {layer.name: i for i, layer in enumerate(graph.layers)}
    norms = {graph.norms[name] for name in names & set(graph.norms)}
    if not group.prunable or any(
        name not in layers and name not in norms and not _homogeneous(network, name)
        for name in names
    ):
        return ()
    depthwise = {
        m.module: m for m in group.members if _is_depthwise(network.get_submodule(m.module))
    }
    middle = sorted(depthwise.values(), key=lambda m: layers[m.module])
    ends = [m for m in group.members if m.module in layers and m.module not in depthwise]
    writers = [m for m in ends if m.side == "out"]
    readers = [m for m in ends if m.side == "in"]
    places = [layers[m.module] for m in middle]
    if middle and (
        any(layers[m.module] > places[0] for m in writers)
        or any(layers[m.module] < places[-1] for m in readers)
    ):
        return ()
    found = []
    for written, read in zip(
        [writers, *([m] for m in middle)], [*([m] for m in middle), readers], strict=True
    ):
        sources = tuple(_writer(network, graph, m) for m in written)
        targets = tuple(_reader(network, graph, m) for m in read)
        if sources and targets and all(_scalable(w.norm) for w in sources):
            found.append(Boundary(group.name, group.size, sources, targets))
    return tuple(found)


def _homogeneous(network: nn.Module, name: str) -> bool:
    return isinstance(network.get_submodule(name), nn.PReLU)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, LAYER_TYPES) and getattr(module, "groups", 1) > 1


def _scalable(norm: nn.Module | None) -> bool:
    return norm is None or isinstance(norm.weight, Tensor)


def _norm(network: nn.Module, graph: NetworkGraph, name: str) -> nn.Module | None:
    """The batch norm behind a layer, if it is not part of it already."""
    norm = network.get_submodule(graph.norms[name]) if name in graph.norms else None
    return norm if isinstance(norm, NORM_TYPES) else None


def _writer(network: nn.Module, graph: NetworkGraph, member: Member) -> Side:
    layer = _part(network.get_submodule(member.module), -1)
    norm = _norm(network, graph, member.module)
    return Side(layer, norm, torch.as_tensor(member.indices), member.per_channel, False)


def _reader(network: nn.Module, graph: NetworkGraph, member: Member) -> Side:
    module = network.get_submodule(member.module)
    layer = _part(module, 0)
    norm = _norm(network, graph, member.module) if layer is module else None
    dense = not _is_depthwise(layer)
    return Side(layer, norm, torch.as_tensor(member.indices), member.per_channel, dense)
