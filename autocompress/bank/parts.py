"""Input statistics of the parts that a decomposition made, without running the network.

Every part is linear, so the moments of its inputs follow from those of the original layer's: the
patch that the layer sees is pushed through the parts before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph import Layer
from autocompress.graph.layers import LayerKind
from autocompress.techniques.technique import LayerStatistics


def part_layer(original: Layer, part: nn.Module) -> Layer:
    """A part's description; its positions are taken to be the original's."""
    weight = cast(Tensor, part.weight)
    groups = int(getattr(part, "groups", 1))
    return Layer(
        name=original.name,
        kind=_kind(original, part),
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        kernel_size=tuple(weight.shape[2:]),
        groups=groups,
        positions=original.positions,
        weights=sum(p.numel() for p in part.parameters(recurse=False)),
        stride=tuple(getattr(part, "stride", ())),
    )


def _kind(original: Layer, part: nn.Module) -> LayerKind:
    # Behind a narrower table there is a linear layer.
    split = original.kind == "embedding" and not isinstance(part, nn.Embedding)
    return "linear" if split else original.kind


def part_statistics(
    layer: Layer, parts: Sequence[nn.Module], index: int, statistics: LayerStatistics
) -> LayerStatistics | None:
    """Statistics of one part's inputs; None where the part is a grouped convolution.

    Exact for stationary inputs: a part whose kernel is smaller than the patch gets the mean over
    the places that it has in the patch. Magnitudes after the first part are those of a Gaussian of
    the same moments, and zeros are none.

    Args:
        layer: the original layer, with `in_features` columns in `statistics`.
        parts: what stands in its place, run one after another.
    """
    if int(getattr(parts[index], "groups", 1)) > 1:
        return None
    kernel = tuple(cast(Tensor, parts[index].weight).shape[2:])
    columns = len(statistics.moment)
    shape = (columns // layer.columns_per_channel, *layer.kernel_size)
    if index == 0:
        numbers = torch.arange(columns).reshape(shape)
        return _average(
            [
                statistics.select(numbers[place].flatten().tolist())
                for place in _places(shape, (shape[0], *kernel))
            ]
        )
    patch = torch.eye(columns, dtype=torch.float64).reshape(columns, *shape)
    for part in parts[:index]:
        patch = _apply(part, patch)
    return _average(
        [
            _pushed(statistics, patch[place].flatten(1))
            for place in _places(patch.shape, (*patch.shape[:2], *kernel))
        ]
    )


def _pushed(statistics: LayerStatistics, linear: Tensor) -> LayerStatistics:
    """Statistics of `x @ linear`; linear has shape (columns, features)."""
    moment = linear.T @ statistics.moment @ linear
    mean = linear.T @ statistics.mean
    magnitude = (moment.diagonal().clamp(min=0) * 2 / torch.pi).sqrt()
    return LayerStatistics(moment, mean, magnitude, torch.zeros_like(mean))


def _average(seen: Sequence[LayerStatistics]) -> LayerStatistics:
    return LayerStatistics(
        torch.stack([s.moment for s in seen]).mean(0),
        torch.stack([s.mean for s in seen]).mean(0),
        torch.stack([s.magnitude for s in seen]).mean(0),
        torch.stack([s.zero_share for s in seen]).mean(0),
    )


def _apply(part: nn.Module, patch: Tensor) -> Tensor:
    weight = cast(Tensor, part.weight).detach().double()
    if isinstance(part, nn.Linear):
        return F.linear(patch, weight)
    convolve: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    result: Tensor = convolve(patch, weight, groups=int(getattr(part, "groups", 1)))
    return result


def _places(size: Sequence[int], kernel: Sequence[int]) -> list[tuple[slice, ...]]:
    """Every window of that shape in an array of that size."""
    places: list[tuple[slice, ...]] = [()]
    for length, width in zip(size, kernel, strict=True):
        places = [
            (*place, slice(start, start + width))
            for place in places
            for start in range(length - width + 1)
        ]
    return places
