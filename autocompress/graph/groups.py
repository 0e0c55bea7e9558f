"""Coupled channel groups: channels that can only be removed together."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
import torch_pruning as tp
from torch import Tensor, nn

from autocompress.errors import GraphError
from autocompress.graph.blocks import dropped_blocks, is_within
from autocompress.graph.endless import EndlessGroup, bounded_groups
from autocompress.graph.layers import LAYER_TYPES, NORM_TYPES, flatten_outputs
from autocompress.graph.recurrent import with_stand_ins

Side = Literal["out", "in"]
# The last part of the name of a group of attention heads, after that of its module.
HEADS = "heads"
# Groups without an end that are waited for: each costs seconds.
_MOST_ENDLESS = 2
_SLICEABLE = (*LAYER_TYPES, *NORM_TYPES, nn.PReLU, nn.LayerNorm)


@final
@dataclass(frozen=True)
class Member:
    """One side of one module that a channel group runs through.

    Channel `j` of the group is `indices[j * per_channel : (j + 1) * per_channel]` of that side
    (several after a flatten).
    """

    module: str
    side: Side
    indices: tuple[int, ...]
    per_channel: int

    def select(self, channels: Sequence[int]) -> list[int]:
        """Indices on this side that belong to some of the group's channels."""
        k = self.per_channel
        return [i for c in channels for i in self.indices[c * k : (c + 1) * k]]


@final
@dataclass(frozen=True)
class HeadCount:
    """An integer attribute of a module that grows by `per_head` with every attention head."""

    module: str
    attribute: str
    per_head: int


@final
@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several modules that stand or fall together.

    Attributes:
        name: its first producing layer, with `+n` for n further producers.
        size: number of channels.
        members: every module side that it runs through.
        reason: why it can't be pruned; empty if it can.
        heads: for a group of attention heads, the counts that a removal has to lower.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    reason: str = ""
    heads: tuple[HeadCount, ...] = ()

    def step(self, multiple: int) -> int:
        """Kept sizes count in steps of this, on a device that rewards multiples of `multiple`."""
        return 1 if self.heads else multiple

    @property
    def prunable(self) -> bool:
        """Whether channels of this group may be removed."""
        return not self.reason


Removal = tuple[ChannelGroup, Sequence[int]]


def removed_sides(removals: Sequence[Removal]) -> dict[tuple[str, Side], list[int]]:
    """Indices to remove by module and side, sorted, for groups with the channels to remove."""
    sides: dict[tuple[str, Side], set[int]] = {}
    for group, channels in removals:
        for member in group.members:
            sides.setdefault((member.module, member.side), set()).update(member.select(channels))
    return {key: sorted(indices) for key, indices in sides.items() if indices}


def remove_channels(network: nn.Module, removals: Sequence[Removal]) -> None:
    """Remove channels of several groups from the traced network or a copy of it, in place.

    Of groups that run through blocks which were taken out, what is left of them.
    """
    gone = dropped_blocks(network)
    for (name, side), indices in removed_sides(removals).items():
        if is_within(name, gone):
            continue
        module = network.get_submodule(name)
        if isinstance(module, nn.LayerNorm):
            _cut_layer_norm(module, indices)
            continue
        pruner = tp.pruner.function.PrunerBox[tp.ops.module2type(module)]
        cut = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
        cut(module, indices)
    for group, channels in removals:
        for count in group.heads if not is_within(group.name, gone) else ():
            owner = network.get_submodule(count.module)
            left = getattr(owner, count.attribute) - count.per_head * len(set(channels))
            setattr(owner, count.attribute, left)


def _cut_layer_norm(norm: nn.LayerNorm, indices: Sequence[int]) -> None:
    # torch-pruning keeps a layer norm's channels in the order of a set, which is not ascending.
    gone = set(indices)
    keep = [i for i in range(norm.normalized_shape[-1]) if i not in gone]
    norm.normalized_shape = (*norm.normalized_shape[:-1], len(keep))
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, nn.Parameter(parameter.detach()[..., keep].clone()))


def find_groups(
    network: nn.Module,
    example_inputs: tuple[Tensor, ...],
    heads: Sequence[ChannelGroup] = (),
    spared: Collection[str] = (),
) -> tuple[ChannelGroup, ...]:
    """Every channel group of a network, by torch-pruning's dependency graph (Fang et al., 2023).

    A group that cannot be pruned is kept with its reason: each is tried once on a copy.

    Args:
        heads: groups of attention heads; single channels of theirs are not prunable.
        spared: layers that are left as they are; groups that run through them are not prunable.

    Raises:
        GraphError: the network cannot be traced.
    """
    followed, standing = with_stand_ins(network)
    names: dict[Any, str] = {module: name for name, module in followed.named_modules()}
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                followed, example_inputs=example_inputs, verbose=False
            )
        with bounded_groups():
            raw = list(_raw_groups(graph, names))
    except Exception as cause:
        raise GraphError(
            f"The network cannot be traced: {type(cause).__name__}: {cause}",
            given=type(network).__name__,
            allowed="a network whose forward pass is differentiable PyTorch code",
            advice="check that network(*example_inputs) runs, and see --debug for the traceback",
        ) from cause
    real = (_without(group, standing) for group in raw if not is_within(group.name, standing))
    groups = [sparing(_outside_heads(group, heads), spared) for group in real]
    with torch.no_grad():
        outputs = _output_shapes(network(*example_inputs))
        tried = [
            replace(group, reason=group.reason or _try_out(network, group, example_inputs, outputs))
            for group in groups
        ]
    order = {name: i for i, name in enumerate(names.values())}
    return tuple(sorted((*heads, *tried), key=lambda group: order[_first_module(group)]))


def _without(group: ChannelGroup, standing: Collection[str]) -> ChannelGroup:
    """The group without members that stand for recurrent layers, whose channels must stay."""
    members = tuple(m for m in group.members if not is_within(m.module, standing))
    if len(members) == len(group.members):
        return group
    return replace(group, members=members, reason="a recurrent layer reads or writes its channels")


def _raw_groups(graph: Any, names: dict[Any, str]) -> Iterator[ChannelGroup]:
    """Groups as torch-pruning finds them; a layer whose group has no end has one with a reason."""
    seen = set[nn.Module]()
    endless = 0
    for module in list(graph.module2node):
        pruner = graph.get_pruner_of_module(module) if isinstance(module, LAYER_TYPES) else None
        if module in seen or pruner is None or pruner.get_out_channels(module) is None:
            continue
        size = pruner.get_out_channels(module)
        unknown = ChannelGroup(names[module], size, (), "its dependencies have no end")
        if endless == _MOST_ENDLESS:
            yield unknown
            continue
        try:
            items = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size)))
            group = _read_group(graph, items, names)
        except EndlessGroup:
            endless += 1
            yield unknown
            continue
        seen |= {
            dep.target.module for dep, _ in items if graph.is_out_channel_pruning_fn(dep.handler)
        }
        yield group


def sparing(group: ChannelGroup, spared: Collection[str]) -> ChannelGroup:
    """The group, not prunable where it runs through a layer that is left as it is."""
    odd = [member.module for member in group.members if member.module in spared]
    if group.reason or not odd:
        return group
    return replace(group, reason=f"it runs through {odd[0]}, which is left as it is")


def _first_module(group: ChannelGroup) -> str:
    """Where a group begins; one of heads that were not understood has its module only."""
    if group.members:
        return group.members[0].module
    return group.name.removesuffix(HEADS).removesuffix(".")


def _outside_heads(group: ChannelGroup, heads: Sequence[ChannelGroup]) -> ChannelGroup:
    sides = {(member.module, member.side) for member in group.members}
    for other in heads:
        if other.prunable and sides & {(member.module, member.side) for member in other.members}:
            return replace(group, reason=f"its channels go by attention heads, see {other.name}")
    return group


def _read_group(graph: Any, items: Any, names: dict[Any, str]) -> ChannelGroup:
    root_size = len(items[0].idxs)
    members: dict[tuple[str, Side, tuple[int, ...]], Member] = {}
    reason = ""
    for dep, indices in items:
        module = dep.target.module
        if isinstance(module, nn.Parameter):
            reason = reason or "a bare parameter is added to or multiplied with its channels"
        if module not in names:
            continue
        name = names[module]
        if not isinstance(module, _SLICEABLE) and any(True for _ in module.parameters()):
            reason = reason or f"{name} ({type(module).__name__}) cannot be sliced"
        if not any(True for _ in module.parameters(recurse=False)) and not isinstance(
            module, NORM_TYPES
        ):
            continue
        side: Side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"
        plain = tuple(int(getattr(i, "idx", i)) for i in indices)
        if len(plain) % root_size:
            reason = reason or f"channels do not map evenly onto {name}"
            continue
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and 1 < module.groups < module.out_channels:
            reason = reason or f"{name} is a grouped convolution"
        if max(plain) >= _width(module, side):
            reason = reason or f"channels do not map onto those of {name}"
        members[(name, side, plain)] = Member(name, side, plain, len(plain) // root_size)
    order = {name: i for i, name in enumerate(names.values())}
    ordered = sorted(members.values(), key=lambda m: (m.side == "in", order[m.module]))
    producers = [m.module for m in ordered if m.side == "out" and _is_dense(names, m.module)]
    reason = reason or _mapping_fault(graph, items, ordered, names)
    if not any(m.side == "in" for m in ordered):
        reason = reason or "it is the network's output"
    extra = f"+{len(set(producers)) - 1}" if len(set(producers)) > 1 else ""
    label = (producers or [ordered[0].module])[0]
    return ChannelGroup(label + extra, root_size, tuple(ordered), reason)


def _width(module: nn.Module, side: Side) -> float:
    """Channels on one side of a layer; no limit is known for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.out_channels if side == "out" else module.in_channels
    return math.inf


def _is_dense(names: dict[Any, str], name: str) -> bool:
    module = next(m for m, n in names.items() if n == name)
    return isinstance(module, LAYER_TYPES) and getattr(module, "groups", 1) == 1


def _mapping_fault(graph: Any, items: Any, members: Sequence[Member], names: dict[Any, str]) -> str:
    """Check the index map against the dependency graph's own answer for single channels."""
    root, handler = items[0].dep.target.module, items[0].dep.handler
    size = len(items[0].idxs)
    for channel in sorted({0, size // 2, size - 1}):
        expected: dict[tuple[str, str], set[int]] = {}
        for dep, indices in graph.get_pruning_group(root, handler, [channel]):
            if dep.target.module in names:
                side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"
                key = (names[dep.target.module], side)
                expected.setdefault(key, set()).update(int(getattr(i, "idx", i)) for i in indices)
        found: dict[tuple[str, str], set[int]] = {}
        for member in members:
            found.setdefault((member.module, member.side), set()).update(member.select([channel]))
        if any(found[key] != expected.get(key) for key in found):
            return "its channels map onto other layers in a pattern that is not understood"
    return ""


def _output_shapes(outputs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in flatten_outputs(outputs))


def _try_out(
    network: nn.Module,
    group: ChannelGroup,
    example_inputs: tuple[Tensor, ...],
    outputs: tuple[tuple[int, ...], ...],
) -> str:
    """Why removing one channel breaks the network; empty if it does not."""
    if group.size < 2:
        return "it has a single channel"
    trial = copy.deepcopy(network)
    try:
        remove_channels(trial, [(group, [group.size - 1])])
        shapes = _output_shapes(trial(*example_inputs))
    except Exception as cause:
        # A user's forward pass may raise anything.
        text = (str(cause).splitlines() or [type(cause).__name__])[0][:120]
        return f"the network fails without one of its channels: {text}"
    if shapes != outputs:
        return "it reaches the network's output"
    return ""


def dense_consumers(network: nn.Module, group: ChannelGroup) -> tuple[Member, ...]:
    """The layers that read a group's channels and whose weights can be refitted."""
    return _dense_members(network, group, "in")


def dense_producers(network: nn.Module, group: ChannelGroup) -> tuple[Member, ...]:
    """The layers that write a group's channels, grouped convolutions left out."""
    return _dense_members(network, group, "out")


def _dense_members(network: nn.Module, group: ChannelGroup, side: Side) -> tuple[Member, ...]:
    found = []
    for member in group.members:
        module = network.get_submodule(member.module)
        dense = isinstance(module, LAYER_TYPES) and getattr(module, "groups", 1) == 1
        if member.side == side and dense:
            found.append(member)
    return tuple(found)


def kept_size(size: int, pruning_ratio: float, multiple: int) -> int:
    """Channels that stay: the nearest multiple to `(1 - pruning_ratio) * size`, at least one.

    Sizes that are no multiple of `multiple` count in steps of the largest common divisor.
    """
    step = multiple if size % multiple == 0 else math.gcd(size, multiple)
    return max(step, min(size, round((1 - pruning_ratio) * size / step) * step))
