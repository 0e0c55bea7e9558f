"""The shapes of a decomposed layer's parts, their cost, and the modules that are made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph import Layer
from autocompress.graph.plain import base_type

Kind = Literal["svd", "spatial", "tucker", "cp"]


@final
@dataclass(frozen=True)
class Part:
    """Shape of one part: a convolution, or a linear layer where the kernel is empty."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights without the bias; also multiply-accumulates per output position."""
        return self.out_channels * (self.in_channels // self.groups) * math.prod(self.kernel_size)


def fits(layer: Layer, kind: Kind) -> bool:
    """Whether a layer can be decomposed so: no groups, and a kernel that there is to split."""
    if layer.undivided:
        return False
    wide = sum(size > 1 for size in layer.kernel_size)
    needed = {"svd": 0, "spatial": 2, "tucker": 1, "cp": 1}[kind]
    return layer.groups == 1 and wide >= needed


def kept_rank(full: int, rank_ratio: float, multiple: int) -> int:
    """The rank that a ratio stands for: the nearest multiple, at least one; the full rank at 1."""
    if rank_ratio >= 1:
        return full
    step = min(multiple, full)
    return max(step, min(full, round(rank_ratio * full / step) * step))


def ranks(layer: Layer, kind: Kind, rank_ratio: float, multiple: int) -> tuple[int, ...]:
    """The ranks that a ratio stands for: channels between parts; two of them for Tucker-2.

    A ratio of 1 is the rank that reconstructs any layer; for CP, which has no such rank that can be
    told beforehand, it is the rank at which the parts have as many weights as the layer.
    """
    out, channels, taps = layer.out_channels, layer.in_channels, math.prod(layer.kernel_size)
    if kind == "tucker":
        inner = kept_rank(channels, rank_ratio, multiple)
        outer = kept_rank(out, rank_ratio, multiple)
        # More than that a core of so few channels on the other side cannot use.
        return min(inner, outer * taps), min(outer, inner * taps)
    if kind == "spatial":
        height, width = layer.kernel_size
        full = min(channels * height, out * width)
    elif kind == "cp":
        per_rank = out + channels + sum(size for size in layer.kernel_size if size > 1)
        full = max(1, out * layer.in_features // per_rank)
    else:
        full = min(out, layer.in_features)
    return (kept_rank(full, rank_ratio, multiple),)


def parts_of(layer: Layer, kind: Kind, kept: tuple[int, ...]) -> tuple[Part, ...]:
    """What a layer consists of after its decomposition to those ranks."""
    out, channels, kernel = layer.out_channels, layer.in_channels, layer.kernel_size
    point = tuple(1 for _ in kernel)
    rank = kept[0]
    if kind == "tucker":
        return (
            Part(channels, rank, point),
            Part(rank, kept[1], kernel),
            Part(kept[1], out, point),
        )
    if kind == "spatial":
        return Part(channels, rank, (kernel[0], 1)), Part(rank, out, (1, kernel[1]))
    if kind == "cp":
        along = [
            Part(rank, rank, (*point[:i], size, *point[i + 1 :]), rank)
            for i, size in enumerate(kernel)
            if size > 1
        ]
        return Part(channels, rank, point), *along, Part(rank, out, point)
    return Part(channels, rank, kernel), Part(rank, out, point)


def handlers(kernels: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Which part handles stride, padding and dilation of each kernel dimension.

    The first whose kernel is as wide as the layer's: later parts then have fewer positions.
    """
    dimensions = range(len(kernels[0]))
    widest = [max(kernel[d] for kernel in kernels) for d in dimensions]
    return tuple(
        next(i for i, kernel in enumerate(kernels) if kernel[d] == widest[d]) for d in dimensions
    )


def share_of_work(layer: Layer, parts: Sequence[Part], stride: Sequence[int] = ()) -> float:
    """Multiply-accumulates of the parts as a share of the layer's.

    Parts before the one that handles a dimension's stride see that many times the positions.

    Args:
        stride: of the layer; empty stands for ones.
    """
    stride = stride or tuple(1 for _ in layer.kernel_size)
    turn = handlers([part.kernel_size for part in parts])
    factors = [
        math.prod(s for s, handler in zip(stride, turn, strict=True) if handler > i)
        for i in range(len(parts))
    ]
    work = sum(part.weights * factor for part, factor in zip(parts, factors, strict=True))
    return work / (layer.out_channels * layer.in_features)


def build_parts(module: nn.Module, weights: Sequence[Tensor], mean: Tensor) -> nn.Sequential:
    """The layers that take a layer's place; the last one has its bias.

    What the decomposition lost of the output's mean goes into that bias.

    Args:
        module: the layer, not changed.
        weights: of the parts, in the order in which they run.
        mean: of the layer's unfolded inputs, shape (in_features,).
    """
    bias = cast("Tensor | None", module.bias)
    turn = handlers([tuple(weight.shape[2:]) for weight in weights])
    parts: list[nn.Module] = []
    channels = weights[0].shape[1]
    for index, weight in enumerate(weights):
        shape = Part(channels, len(weight), tuple(weight.shape[2:]), channels // weight.shape[1])
        part = _build_part(module, shape, [handler == index for handler in turn])
        if bias is not None and index == len(weights) - 1:
            part.bias = nn.Parameter(torch.zeros(len(weight)))
        with torch.no_grad():
            cast(Tensor, part.weight).copy_(weight)
        parts.append(part)
        channels = len(weight)
    if bias is not None:
        whole = cast(Tensor, module.weight).detach()
        patch = mean.double().reshape(1, -1, *whole.shape[2:])
        lost = _run([whole], patch) - _run(weights, patch)
        with torch.no_grad():
            cast(Tensor, parts[-1].bias).copy_(bias.double() + lost.flatten())
    return nn.Sequential(*parts).train(module.training)


def _build_part(module: nn.Module, shape: Part, handled: Sequence[bool]) -> nn.Module:
    """A part without bias, with the module's settings in the dimensions that it handles."""
    if isinstance(module, nn.Linear):
        return nn.Linear(shape.in_channels, shape.out_channels, bias=False)
    conv = cast(nn.Conv2d, module)
    # Not the type itself: a subclass may take other arguments.
    kind: Any = base_type(conv)

    def own(values: Sequence[int], rest: int) -> tuple[int, ...]:
        return tuple(v if mine else rest for v, mine in zip(values, handled, strict=True))

    part: nn.Module = kind(
        shape.in_channels, shape.out_channels, shape.kernel_size, own(conv.stride, 1),
        conv.padding if isinstance(conv.padding, str) else own(conv.padding, 0),
        own(conv.dilation, 1), groups=shape.groups, bias=False, padding_mode=conv.padding_mode,
    )  # fmt: skip
    return part


def _run(weights: Sequence[Tensor], patch: Tensor) -> Tensor:
    """What a mean input patch becomes, shape (1, out, 1...), without bias."""
    for weight in weights:
        value = weight.double()
        if weight.dim() == 2:
            patch = F.linear(patch, value)
            continue
        convolve: Any = F.conv1d if weight.dim() == 3 else F.conv2d
        patch = convolve(patch, value, groups=patch.shape[1] // value.shape[1])
    return patch
