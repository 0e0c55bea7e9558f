"""What a technique is: a decision, its stage, and the functions that solve and install it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import final

import torch
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.graph import Block, ChannelGroup, Layer, Member, NetworkGraph
from autocompress.graph.layers import LayerKind
from autocompress.plan import Decision

Variant = Mapping[str, Tensor]


class Stage(IntEnum):
    """When a technique is applied.

    Up to `SPARSIFY` all is solved without training; `RECOVER` trains the float network;
    `QUANTIZE` gives every layer the weight that ships; `RETRAIN` trains what was quantized.
    """

    PRUNE = 1
    DECOMPOSE = 2
    SPARSIFY = 3
    RECOVER = 4
    EQUALIZE = 5
    QUANTIZE = 6
    RETRAIN = 7

    @property
    def trains(self) -> bool:
        """Whether weights are trained then."""
        return self in (Stage.RECOVER, Stage.RETRAIN)


@final
@dataclass(frozen=True)
class LayerStatistics:
    """Moments of a layer's calibration inputs; conv inputs are unfolded.

    Attributes:
        moment: E[x xᵀ], shape (in_features, in_features), float64.
        mean: E[x], shape (in_features,), float64.
        magnitude: E|x|, shape (in_features,), float64.
        zero_share: how often x is exactly zero, shape (in_features,), float64.
    """

    moment: Tensor
    mean: Tensor
    magnitude: Tensor
    zero_share: Tensor

    def select(self, columns: Sequence[int]) -> LayerStatistics:
        """Statistics of a layer that reads only some of the columns."""
        index = list(columns)
        return LayerStatistics(
            self.moment[index][:, index],
            self.mean[index],
            self.magnitude[index],
            self.zero_share[index],
        )


@final
@dataclass(frozen=True)
class LayerGradients:
    """Squared gradients of the network's log-likelihood on calibration data.

    Labels are drawn from the network's own outputs, so no targets are needed.

    Attributes:
        fisher: E[g²] of every weight, shape (out_channels, in_features), float32.
        taylor: E[(Σ x ∂x)²] of every input channel, the sum over positions: the squared change
            of the loss if the channel were zero, to first order; shape (in_channels,), float32.
    """

    fisher: Tensor
    taylor: Tensor

    def select(
        self, rows: Sequence[int], columns: Sequence[int], columns_per_channel: int
    ) -> LayerGradients:
        """Gradients of a layer that lost rows and columns of its unfolded weight."""
        channels = [c // columns_per_channel for c in columns[::columns_per_channel]]
        fisher = self.fisher[list(rows)][:, list(columns)]
        return LayerGradients(fisher, self.taylor[channels])


@final
@dataclass(frozen=True)
class LayerProblem:
    """All that is known of one layer when it is solved.

    Attributes:
        weight: shape (out_channels, in_features), float32.
        bias: shape (out_channels,), or None.
        statistics: None for grouped convolutions and embeddings.
        free_bias: whether a constant shift of the output is absorbed, by a bias or a batch norm.
        multiple: channel counts that the device rewards are multiples of this.
        gradients: None unless the technique asked for them, and for grouped convolutions.
        mask: which weights a pruning of single weights left, shape of weight, bool; None is all.
        usage: how often each entry of an embedding was read on calibration data, shape
            (out_channels,), float64; None for other layers, and where it is not known.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    statistics: LayerStatistics | None
    free_bias: bool
    multiple: int
    gradients: LayerGradients | None = None
    mask: Tensor | None = None
    usage: Tensor | None = None

    @property
    def frozen(self) -> Tensor:
        """Which weights were pruned and stay zero, shape of weight, bool."""
        return torch.zeros_like(self.weight, dtype=torch.bool) if self.mask is None else ~self.mask


@final
@dataclass(frozen=True)
class GroupProblem:
    """One channel group with the layers that write and read it.

    `Member` says which rows (of a producer) or columns (of a consumer) belong to which channel.
    """

    group: ChannelGroup
    producers: tuple[tuple[LayerProblem, Member], ...]
    consumers: tuple[tuple[LayerProblem, Member], ...]


def no_gradients(decision: Decision) -> bool:
    """For techniques that never read gradients."""
    return False


def keeps_norm(decision: Decision) -> bool:
    """For techniques whose scales may follow a batch norm's factors, channel by channel."""
    return False


def shares_always(decision: Decision) -> bool:
    """For techniques whose solve ignores their levels whatever the decision."""
    return True


@final
@dataclass(frozen=True)
class GroupTechnique:
    """A technique that removes channels of a group.

    Attributes:
        name: equals `decision.technique`.
        decision: its decision type, with a `pruning_ratio` and whether to `refit` the readers.
        identity: a decision that changes nothing.
        levels: decision fields that `order` ignores.
        choices: of the decisions a search space offers, those that make sense for a group on a
            device, from the mildest to the strongest.
        order: every channel of the group in the order of removal, shape (size,), int64; one
            order serves every ratio.
        uses_gradients: whether a decision's problem must hold gradients.
    """

    name: str
    decision: type[Decision]
    stage: Stage
    identity: Decision
    levels: tuple[str, ...]
    choices: Callable[[ChannelGroup, Sequence[Decision], DeviceProfile], tuple[Decision, ...]]
    order: Callable[[GroupProblem, Decision], Tensor]
    uses_gradients: Callable[[Decision], bool] = no_gradients


def on_any_device(decision: Decision, device: DeviceProfile) -> Decision:
    """The decision itself."""
    return decision


@final
@dataclass(frozen=True)
class LayerTechnique:
    """A technique that rewrites one layer.

    Attributes:
        name: equals `decision.technique`.
        identity: a decision that keeps the outputs.
        levels: decision fields that `solve` ignores: one solve serves every value of them, if
            `shares_solve` says so.
        choices: of the decisions a search space offers, those that make sense for a layer on a
            device, from the mildest to the strongest.
        solve: the tensors that `install` needs.
        install: the module that takes the layer's place; the given one may be changed. The last
            argument is the problem's `multiple`.
        stored_bytes: bytes of the layer's weight in the ONNX file after the decision, scales and
            codebooks included and the bias left out. The last argument is `multiple`.
        uses_gradients: whether a decision's problem must hold gradients.
        folds_norm: whether a decision needs the batch norm to be part of the layer before.
        shares_solve: whether `solve` ignores the levels for a decision like that.
        kinds: of the layers that it can be applied to.
        on_device: a decision as a device's kernels need it.
    """

    name: str
    decision: type[Decision]
    stage: Stage
    identity: Decision
    levels: tuple[str, ...]
    choices: Callable[[Layer, Sequence[Decision], DeviceProfile], tuple[Decision, ...]]
    solve: Callable[[LayerProblem, Decision], Variant]
    install: Callable[[nn.Module, Variant, Decision, int], nn.Module]
    stored_bytes: Callable[[Layer, Decision, int], int]
    uses_gradients: Callable[[Decision], bool] = no_gradients
    folds_norm: Callable[[Decision], bool] = keeps_norm
    shares_solve: Callable[[Decision], bool] = shares_always
    kinds: tuple[LayerKind, ...] = ("conv", "linear")
    on_device: Callable[[Decision, DeviceProfile], Decision] = on_any_device


@final
@dataclass(frozen=True)
class BlockTechnique:
    """A technique that takes residual blocks out as a whole; there is nothing to solve.

    Steps for what stands in such a block are void.

    Attributes:
        name: equals `decision.technique`.
        identity: a decision that changes nothing; every other one takes the block out.
        choices: of the decisions a search space offers, those that make sense for a block on a
            device, from the mildest to the strongest.
    """

    name: str
    decision: type[Decision]
    stage: Stage
    identity: Decision
    choices: Callable[[Block, Sequence[Decision], DeviceProfile], tuple[Decision, ...]]


@final
@dataclass(frozen=True)
class NetworkTechnique:
    """A technique that works on the network as a whole; its steps have the target `network`.

    What it does stands where it can be done: training in `recover`, file formats in `export`.

    Attributes:
        name: equals `decision.technique`.
        identity: a decision that changes nothing.
        choices: of the decisions a search space offers, those that make sense for a network on a
            device, from the mildest to the strongest.
        trains: for the stage `RETRAIN`: the layer techniques whose weights it can train.
    """

    name: str
    decision: type[Decision]
    stage: Stage
    identity: Decision
    choices: Callable[[NetworkGraph, Sequence[Decision], DeviceProfile], tuple[Decision, ...]]
    trains: tuple[str, ...] = ()


NETWORK = "network"


@final
@dataclass(frozen=True)
class IntegerWeight:
    """How a quantized layer's weight and inputs are to be stored and run.

    A layer that a technique has quantized carries it as the attribute `integer_weight`, and its
    scales as the buffer `weight_scale`, shape (out, groups): group g of a row covers its columns
    `[g * group_size, (g + 1) * group_size)`. The weight itself is already on that grid: integers
    from -(2^(bits-1) - 1) to 2^(bits-1) - 1 times the scale.

    Attributes:
        bits: of a weight; 32 where only the inputs are quantized.
        group_size: columns of the unfolded weight that share a scale; None for whole rows.
        per_tensor: whether all rows have the same scale.
        activation_bits: of the layer's inputs; 32 leaves them in floating point.
        dynamic: whether the inputs' range is taken anew at each run.
        signed: whether the inputs' integers are signed.
        calibration: how a static range is found: minmax, percentile, mse or entropy.
    """

    bits: int
    group_size: int | None
    per_tensor: bool
    activation_bits: int
    dynamic: bool
    signed: bool
    calibration: str


@final
@dataclass(frozen=True)
class CodebookWeight:
    """How a layer's weight is made of codewords; the layer's attribute `codebook_weight`.

    The buffers `codebook`, shape (K, d), float32, `codes`, shape (out, in / d), int64, and
    `weight_scale`, shape (out, 1), hold it: the unfolded weight is
    `weight_scale * codebook[codes].reshape(out, in)`.

    Attributes:
        code_bits: bits of a stored code: 4, 8 or 16.
    """

    code_bits: int


def bias_of(module: nn.Module) -> Tensor | None:
    """A layer's bias, shape (out,); None where it has none, as an embedding."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def unfolded(module: nn.Module) -> Tensor:
    """A layer's weight with one row per output channel, shape (out, in_features), detached."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().reshape(weight.shape[0], -1)
