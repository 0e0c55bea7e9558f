"""What a technique is: a decision, its stage, and the functions that solve and install it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import final

from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.graph import ChannelGroup, Layer, Member
from autocompress.plan import Decision

Variant = Mapping[str, Tensor]


class Stage(IntEnum):
    """When a technique is applied; recovery by training stands between the last two."""

    PRUNE = 1
    DECOMPOSE = 2
    QUANTIZE = 3


@final
@dataclass(frozen=True)
class LayerStatistics:
    """Moments of a layer's calibration inputs; conv inputs are unfolded.

    Attributes:
        moment: E[x xᵀ], shape (in_features, in_features), float64.
        mean: E[x], shape (in_features,), float64.
    """

    moment: Tensor
    mean: Tensor

    def select(self, columns: Sequence[int]) -> LayerStatistics:
        """Statistics of a layer that reads only some of the columns."""
        index = list(columns)
        return LayerStatistics(self.moment[index][:, index], self.mean[index])


@final
@dataclass(frozen=True)
class LayerProblem:
    """All that is known of one layer when it is solved.

    Attributes:
        weight: shape (out_channels, in_features), float32.
        bias: shape (out_channels,), or None.
        statistics: None for grouped convolutions and for layers that a decomposition has made.
        free_bias: whether a constant shift of the output is absorbed, by a bias or a batch norm.
        multiple: channel counts that the device rewards are multiples of this.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    statistics: LayerStatistics | None
    free_bias: bool
    multiple: int


@final
@dataclass(frozen=True)
class GroupProblem:
    """One channel group with the layers that read it; `Member` says which columns are whose."""

    group: ChannelGroup
    consumers: tuple[tuple[LayerProblem, Member], ...]


@final
@dataclass(frozen=True)
class GroupTechnique:
    """A technique that removes channels of a group.

    Attributes:
        name: equals `decision.technique`.
        decision: its decision type, with a `pruning_ratio`.
        choices: of the decisions a search space offers, those that make sense for a group on a
            device, from the mildest to the strongest.
        order: every channel of the group in the order of removal, shape (size,), int64; one
            order serves every ratio.
    """

    name: str
    decision: type[Decision]
    stage: Stage
    choices: Callable[[ChannelGroup, Sequence[Decision], DeviceProfile], tuple[Decision, ...]]
    order: Callable[[GroupProblem], Tensor]


@final
@dataclass(frozen=True)
class LayerTechnique:
    """A technique that rewrites one layer.

    Attributes:
        name: equals `decision.technique`.
        levels: decision fields that `solve` ignores: one solve serves every value of them.
        choices: of the decisions a search space offers, those that make sense for a layer on a
            device, from the mildest to the strongest.
        solve: the tensors that `install` needs.
        install: the module that takes the layer's place; the given one may be changed.
    """

    name: str
    decision: type[Decision]
    stage: Stage
    levels: tuple[str, ...]
    choices: Callable[[Layer, Sequence[Decision], DeviceProfile], tuple[Decision, ...]]
    solve: Callable[[LayerProblem, Decision], Variant]
    install: Callable[[nn.Module, Variant, Decision, int], nn.Module]
