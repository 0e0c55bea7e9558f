"""Attention heads as groups of channels: found by their shapes, believed only after a trial.

Taking a head out must give what the network gives with that head's columns of the output
projection at zero (Michel et al. 2019, section 2.3). Every guess at which layers and attributes
belong to a head is tried on the network itself; what fails becomes a group with a reason.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from autocompress.graph.groups import HEADS, ChannelGroup, HeadCount, Member, remove_channels
from autocompress.graph.layers import Layer

_COUNTS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head",
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads",
)  # fmt: skip
_WIDTHS = ("head_dim", "dim_head", "d_head", "head_size", "attention_head_size")
# Attributes whose part in the forward pass can only be found by trying; all subsets of these.
_MOST_SIZES = 4
# Each guess runs the network a few times.
_MOST_GUESSES = 96
# Removing and muting a head may differ by this share of what muting it changes.
_TOLERANCE = 1e-3
# Heads whose muting changes less than this share of the outputs cannot be judged.
_LEAST_EFFECT = 1e-3


def find_heads(
    network: nn.Module, example_inputs: tuple[Tensor, ...], layers: Sequence[Layer]
) -> tuple[ChannelGroup, ...]:
    """A group per attention module, named `<module>.heads`; its channels are the heads.

    Heads that share keys and values (grouped queries) go together.

    Args:
        network: in evaluation mode; not changed.
        layers: in order of their first call.
    """
    network = copy.deepcopy(network)
    dense = [layer for layer in layers if layer.dense]
    owners = [(n, m) for n, m in network.named_modules() if _is_owner(m)]
    found: dict[str, ChannelGroup] = {}
    # The innermost first: a count that an outer module keeps as well is not another attention.
    for name, module in sorted(owners, key=lambda owner: -owner[0].count(".") - bool(owner[0])):
        if any(_inside(other, name) for other in found):
            continue
        taken = {m.module for group in found.values() for m in group.members}
        free = [layer for layer in dense if layer.name not in taken]
        group = _find_group(network, example_inputs, (name, module), free)
        if group is not None:
            found[name] = group
    return tuple(found[name] for name, _ in owners if name in found)


def _is_owner(module: nn.Module) -> bool:
    counts = _named(module, _COUNTS).values()
    widths = _named(module, _WIDTHS).values()
    return isinstance(module, nn.MultiheadAttention) or any(n > 1 for n in (*counts, *widths))


def _named(module: nn.Module, names: Sequence[str]) -> dict[str, int]:
    return {name: value for name, value in _integers(module).items() if name in names}


def _integers(module: nn.Module) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_")
    }


def _inside(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(scope + ".")


def _find_group(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    owner: tuple[str, nn.Module],
    layers: Sequence[Layer],
) -> ChannelGroup | None:
    """The group of an attention module; None for one that only has something of a head's width."""
    name, module = owner
    counts = _named(module, _COUNTS).values()
    group = ChannelGroup(f"{name}.{HEADS}".lstrip("."), min(counts, default=0), ())
    if isinstance(module, nn.MultiheadAttention):
        packed = "nn.MultiheadAttention packs its projections into one parameter"
        return replace(group, reason=f"{packed}, which cannot be sliced by heads")
    if group.size == 1:
        return replace(group, reason="all its heads share one key and value")
    refused: list[ChannelGroup] = []
    for guess in itertools.islice(_guesses(group, owner, layers), _MOST_GUESSES):
        reason = _verdict(network, inputs, guess)
        if not reason:
            return guess
        refused.append(replace(group, size=guess.size, reason=reason))
    if refused:
        return refused[0]
    missing = "no layers were found that make its queries, keys and values and read its heads"
    return replace(group, reason=missing) if counts else None


@final
@dataclass(frozen=True)
class _Structure:
    """Layers that make queries, keys and values, and the one that reads the heads."""

    makers: tuple[Layer, ...]
    reader: Layer

    @property
    def narrowest(self) -> int:
        """Channels of all heads together, or of all keys where queries share them."""
        return min(self.reader.in_channels, *(x.out_channels for x in self.makers))

    def divides(self, size: int) -> bool:
        """Whether every layer's channels can be shared among so many heads."""
        widths = (self.reader.in_channels, *(x.out_channels for x in self.makers))
        return all(width % size == 0 for width in widths)


def _guesses(
    group: ChannelGroup, owner: tuple[str, nn.Module], layers: Sequence[Layer]
) -> Iterator[ChannelGroup]:
    name, module = owner
    widths = _named(module, _WIDTHS).values()
    # Beside a module that has no count there may be anything.
    scopes = [name, name.rpartition(".")[0]] if name and group.size else [name]
    for scope in scopes:
        inside = [x for x in layers if _inside(x.name, scope)]
        for structure in _structures(inside):
            # A module without a count reshapes by the width of a head.
            sizes = [group.size] if group.size else [structure.narrowest // w for w in widths]
            for size in (n for n in sizes if n > 1 and structure.divides(n)):
                for heads in _attributes(name, module, structure, size):
                    for members in _members(structure, size):
                        yield replace(group, size=size, members=members, heads=heads)


def _structures(layers: Sequence[Layer]) -> Iterator[_Structure]:
    """Three, two or one layers called in a row just before a reader, with widths that fit."""
    for index, reader in enumerate(layers):
        for number in (3, 2, 1):
            makers = tuple(layers[max(0, index - number) : index])
            widths = [maker.out_channels for maker in makers]
            plain = reader.in_channels in widths
            fits = {
                3: plain,
                2: plain and sum(widths) == 3 * reader.in_channels,
                1: widths == [3 * reader.in_channels],
            }[number]
            if len(makers) == number and fits:
                yield _Structure(makers, reader)


def _attributes(
    name: str, module: nn.Module, structure: _Structure, size: int
) -> Iterator[tuple[HeadCount, ...]]:
    """The head counts, with no, one or several further attributes that may be sizes of heads."""
    integers, named = _integers(module), _named(module, _COUNTS)
    widths = {structure.reader.in_channels} | {x.out_channels for x in structure.makers}
    sizes = widths | set(named.values())
    other = (n for n in integers if n not in named and n not in _WIDTHS)
    further = [n for n in other if integers[n] in sizes and integers[n] % size == 0]
    further = further[:_MOST_SIZES]
    for number in range(len(further) + 1):
        for chosen in itertools.combinations(further, number):
            lowered = (*named, *chosen)
            yield tuple(HeadCount(name, n, integers[n] // size) for n in lowered)


def _members(structure: _Structure, size: int) -> Iterator[tuple[Member, ...]]:
    """Rows and columns of the heads: a fused layer has them in blocks, or head by head."""
    reader = structure.reader
    columns = Member(
        reader.name, "in", tuple(range(reader.in_channels)), reader.in_channels // size
    )
    options = []
    for maker in structure.makers:
        rows = torch.arange(maker.out_channels)
        layouts = [tuple(rows.tolist())]
        blocks = maker.out_channels // reader.in_channels
        if len(structure.makers) < 3 and blocks > 1:
            layouts.insert(
                0, tuple(rows.reshape(blocks, size, -1).transpose(0, 1).flatten().tolist())
            )
        options.append([Member(maker.name, "out", i, len(i) // size) for i in layouts])
    for chosen in itertools.product(*options):
        yield (*chosen, columns)


def _verdict(network: nn.Module, inputs: tuple[Tensor, ...], group: ChannelGroup) -> str:
    """Why a guess is wrong; empty if it holds for the first head, and for the last as well.

    The layers have random weights for the time of the trial: no head is idle then, as some are
    after training, and nothing fits by chance.
    """
    first, last = (0,), (group.size - 1,)
    several = (first, first + last if group.size > 2 else last)
    with torch.no_grad(), _private_layers(network, group):
        _randomize(network, group)
        try:
            # Removals first: most wrong guesses fail here, half way through the network.
            removed = [_without(network, inputs, group, heads) for heads in several]
        except Exception as cause:
            # A user's forward pass may raise anything.
            text = (str(cause).splitlines() or [type(cause).__name__])[0][:120]
            return f"the network fails without one of its heads: {text}"
        muted = [_muted(network, inputs, group, heads) for heads in several]
    if [[x.shape for x in m] for m in muted] != [[x.shape for x in r] for r in removed]:
        return "its heads reach the network's output"
    scale = max((float(x.abs().max()) for x in muted[0]), default=0.0)
    effect = _distance(muted[0], muted[1])
    if not effect > _LEAST_EFFECT * scale:
        return "muting one of its heads changes nothing, so a removal cannot be checked"
    if any(not _distance(m, r) <= _TOLERANCE * effect for m, r in zip(muted, removed, strict=True)):
        return "removing one of its heads does more than to mute it"
    return ""


def _without(
    network: nn.Module, inputs: tuple[Tensor, ...], group: ChannelGroup, heads: Sequence[int]
) -> list[Tensor]:
    with _private_layers(network, group):
        remove_channels(network, [(group, heads)])
        return _tensors(network(*inputs))


def _muted(
    network: nn.Module, inputs: tuple[Tensor, ...], group: ChannelGroup, heads: Sequence[int]
) -> list[Tensor]:
    with _private_layers(network, group):
        reader = group.members[-1]
        weight = cast(Tensor, network.get_submodule(reader.module).weight)
        weight[:, reader.select(heads)] = 0
        return _tensors(network(*inputs))


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max((float((a - b).abs().max()) for a, b in zip(one, other, strict=True)), default=0.0)


@contextmanager
def _private_layers(network: nn.Module, group: ChannelGroup) -> Iterator[None]:
    """Copies of a group's layers, and its counts, that are put back as they were at the end."""
    layers = {m.module: network.get_submodule(m.module) for m in group.members}
    owners = [(network.get_submodule(count.module), count.attribute) for count in group.heads]
    counts = [getattr(owner, attribute) for owner, attribute in owners]
    try:
        for name, layer in layers.items():
            network.set_submodule(name, copy.deepcopy(layer))
        yield
    finally:
        for name, layer in layers.items():
            network.set_submodule(name, layer)
        for (owner, attribute), count in zip(owners, counts, strict=True):
            setattr(owner, attribute, count)


def _randomize(network: nn.Module, group: ChannelGroup) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in dict.fromkeys(member.module for member in group.members):
        for parameter in network.get_submodule(name).parameters():
            fan_in = max(1, parameter[0].numel())
            noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(noise)


def _tensors(outputs: Any) -> list[Tensor]:
    """All floating-point tensors in a network's outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for value in outputs for tensor in _tensors(value)]
    return []
