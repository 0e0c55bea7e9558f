"""What every layer of a network becomes for every combination of the choices that shape it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from autocompress.graph import Block, ChannelGroup, Layer, NetworkGraph
from autocompress.graph.groups import kept_size
from autocompress.plan import Decision
from autocompress.search.space import Parameter, Space
from autocompress.techniques import pruning_ratio_of
from autocompress.techniques.decomposed import Part, fits, handlers, parts_of, ranks
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.technique import Stage

# Larger tables help nobody: layers that read many groups are described by the first few of them.
_MOST_COMBINATIONS: Final = 20_000


@final
@dataclass(frozen=True)
class PartShape:
    """A layer that runs: one of the network's, or a part of one that was decomposed.

    Attributes:
        kernel_size: empty for linear layers.
        stride: as long as `kernel_size`.
        positions: output positions per sample.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    positions: int

    @property
    def weights(self) -> int:
        """Number of weights, the bias left out."""
        return self.out_channels * self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.positions * self.weights

    @property
    def in_elements(self) -> int:
        """Values that it reads per sample, up to the image's borders."""
        return self.in_channels * self.positions * math.prod(self.stride)

    @property
    def out_elements(self) -> int:
        """Values that it gives per sample."""
        return self.out_channels * self.positions

    @property
    def depthwise(self) -> bool:
        """Whether every group reads one channel."""
        return 1 < self.groups == self.in_channels

    def layer(self, name: str) -> Layer:
        """As the graph describes layers, without a bias."""
        return Layer(
            name, "conv" if self.kernel_size else "linear", self.in_channels, self.out_channels,
            self.kernel_size, self.groups, self.positions, self.weights, self.stride,
        )  # fmt: skip


@final
@dataclass(frozen=True)
class LayerState:
    """A layer after some decisions.

    Attributes:
        parts: in the order in which they run; one, if it is not decomposed, and none, if it went
            with its block.
        quantize: None for the float layer, as for `sparsify`.
    """

    parts: tuple[PartShape, ...]
    quantize: Decision | None = None
    sparsify: Decision | None = None


@final
@dataclass(frozen=True)
class Pruning:
    """What one pruning parameter takes off a layer.

    Attributes:
        lost: input and output channels that the layer loses, for every value of the parameter.
    """

    parameter: Parameter
    lost: tuple[tuple[int, int], ...]


@final
@dataclass(frozen=True)
class ShapedLayer:
    """A layer and the parameters that decide what becomes of it.

    Attributes:
        prunings: of the groups of its input and output channels; a group on both sides is one.
        steps: parameters of the layer itself, at most one of each stage.
        multiple: channel counts and ranks are multiples of this.
        drop: whether the block that it stands in is taken out; None if it stands in none.
    """

    layer: Layer
    prunings: tuple[Pruning, ...]
    steps: tuple[Parameter, ...]
    multiple: int
    drop: Parameter | None = None

    @property
    def choices(self) -> tuple[Parameter, ...]:
        """All parameters: of the prunings, then of the steps, then whether it is dropped."""
        drops = () if self.drop is None else (self.drop,)
        return (*(p.parameter for p in self.prunings), *self.steps, *drops)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of `choices`."""
        return tuple(parameter.name for parameter in self.choices)

    @property
    def table_shape(self) -> tuple[int, ...]:
        """How many values each parameter has."""
        return tuple(parameter.highest + 1 for parameter in self.choices)

    def parameter(self, stage: Stage) -> Parameter | None:
        """The layer's own parameter of a stage."""
        return next((p for p in self.steps if p.stage is stage), None)

    def chosen(self, indices: Mapping[str, int]) -> LayerState:
        """What the layer becomes in a plan; parameters that are not named are 0."""
        return self.state([indices.get(name, 0) for name in self.parameters])

    def combinations(self) -> Iterator[tuple[int, ...]]:
        """All combinations of values, the last parameter's changing fastest."""
        return itertools.product(*(range(size) for size in self.table_shape))

    def state(self, values: Sequence[int]) -> LayerState:
        """What the layer becomes; one value per parameter."""
        if self.drop is not None and values[-1]:
            return LayerState(())
        pruned = len(self.prunings)
        shape = self.pruned(values[:pruned])
        own = {
            parameter.stage: parameter.decisions[value - 1]
            for parameter, value in zip(self.steps, values[pruned:][: len(self.steps)], strict=True)
            if value
        }
        low_rank = own.get(Stage.DECOMPOSE)
        parts: tuple[PartShape, ...] = (shape,)
        if isinstance(low_rank, LowRank) and fits(shape.layer(""), low_rank.kind):
            parts = decomposed(shape, low_rank, self.multiple)
        return LayerState(parts, own.get(Stage.QUANTIZE), own.get(Stage.SPARSIFY))

    def pruned(self, values: Sequence[int]) -> PartShape:
        """The layer after pruning; one value per pruning."""
        layer = self.layer
        lost = [p.lost[value] for p, value in zip(self.prunings, values, strict=True)]
        outputs = max(1, layer.out_channels - sum(out for _, out in lost))
        inputs, groups = max(1, layer.in_channels - sum(read for read, _ in lost)), layer.groups
        if 1 < groups == layer.in_channels:
            # A depthwise convolution loses channels on both sides together.
            groups = inputs = max(1, outputs * layer.in_channels // layer.out_channels)
        elif groups > 1:
            inputs, outputs = layer.in_channels, layer.out_channels
        stride = layer.stride or tuple(1 for _ in layer.kernel_size)
        return PartShape(inputs, outputs, layer.kernel_size, stride, groups, layer.positions)


def decomposed(shape: PartShape, decision: LowRank, multiple: int) -> tuple[PartShape, ...]:
    """The parts of a layer; those before the one that handles a stride see more positions."""
    layer = shape.layer("")
    kept = ranks(layer, decision.kind, decision.rank_ratio, multiple)
    parts = parts_of(layer, decision.kind, kept)
    turn = handlers([part.kernel_size for part in parts])
    found = []
    for index, part in enumerate(parts):
        own = tuple(s if h == index else 1 for s, h in zip(shape.stride, turn, strict=True))
        later = math.prod(s for s, h in zip(shape.stride, turn, strict=True) if h > index)
        found.append(_placed(part, own, shape.positions * later))
    return tuple(found)


def _placed(part: Part, stride: tuple[int, ...], positions: int) -> PartShape:
    return PartShape(
        part.in_channels, part.out_channels, part.kernel_size, stride, part.groups, positions
    )


def shaped_layers(graph: NetworkGraph, space: Space, multiple: int) -> tuple[ShapedLayer, ...]:
    """Every layer of a network with the parameters of a space that shape it.

    What cannot be told keeps its size: channels of groups that are not pruned, and those of
    further groups where a layer reads too many. What is decided for the network as a whole, such
    as the stock quantizer, is not among the parameters.

    Args:
        multiple: the device's `channel_multiple`.
    """
    by_key = space.by_target()
    drops = {name: d.parameter for d in droppable(graph, space) for name in d.block.layers}
    found = []
    for layer in graph.layers:
        steps = [
            by_key[stage, layer.name]
            for stage in (Stage.DECOMPOSE, Stage.SPARSIFY, Stage.QUANTIZE)
            if (stage, layer.name) in by_key
        ]
        prunings = [
            _pruning(layer, group, by_key[Stage.PRUNE, group.name], multiple)
            for group in graph.groups
            if (Stage.PRUNE, group.name) in by_key
            and any(member.module == layer.name for member in group.members)
        ]
        shaped = ShapedLayer(layer, (), tuple(steps), multiple, drops.get(layer.name))
        for pruning in prunings:
            larger = replace(shaped, prunings=(*shaped.prunings, pruning))
            if math.prod(larger.table_shape) <= _MOST_COMBINATIONS:
                shaped = larger
        found.append(shaped)
    return tuple(found)


@final
@dataclass(frozen=True)
class Droppable:
    """A block with the parameter that takes it out.

    Attributes:
        elements: values that its layers give per sample in the original, which what else is in it
            works on.
    """

    block: Block
    parameter: Parameter
    elements: int

    def kept(self, indices: Mapping[str, int]) -> bool:
        """Whether it is still there in a plan; parameters that are not named are 0."""
        return not indices.get(self.parameter.name, 0)


def droppable(graph: NetworkGraph, space: Space) -> tuple[Droppable, ...]:
    """The blocks of a network that a space offers to take out."""
    by_key = space.by_target()
    given = {x.name: x.out_channels * x.positions for x in graph.layers}
    return tuple(
        Droppable(b, by_key[Stage.PRUNE, b.name], sum(given[name] for name in b.layers))
        for b in graph.blocks
        if (Stage.PRUNE, b.name) in by_key
    )


def _pruning(layer: Layer, group: ChannelGroup, parameter: Parameter, multiple: int) -> Pruning:
    sides = {
        side: sum(
            m.per_channel for m in group.members if (m.module, m.side) == (layer.name, side)
        )
        for side in ("in", "out")
    }  # fmt: skip
    kept = [group.size]
    for decision in parameter.decisions:
        ratio = pruning_ratio_of(decision)
        kept.append(kept_size(group.size, ratio, group.step(multiple)))
    gone = [group.size - size for size in kept]
    return Pruning(parameter, tuple((sides["in"] * n, sides["out"] * n) for n in gone))
