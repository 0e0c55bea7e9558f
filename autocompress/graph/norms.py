"""Batch norms folded into the layers before them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.graph.blocks import dropped_blocks, is_within


def fold_batch_norms(network: nn.Module, norms: Mapping[str, str]) -> nn.Module:
    """A copy of a network in evaluation mode whose batch norms are part of their layers.

    Those in blocks that were taken out are gone.

    Where a layer has been decomposed, the last of its parts takes the norm. A `weight_scale` left
    by a quantization technique is scaled with the weight, so its integers stay the same.

    Args:
        norms: for a layer's name the name of the batch norm that alone reads it.
    """
    folded = copy.deepcopy(network).eval()
    gone = dropped_blocks(folded)
    for name in norms:
        if not is_within(name, gone):
            fold_batch_norm(folded, norms, name)
    return folded


def fold_batch_norm(network: nn.Module, norms: Mapping[str, str], layer_name: str) -> None:
    """Make a layer's batch norm part of it, in place; nothing if it has none (any more)."""
    norm = network.get_submodule(norms[layer_name]) if layer_name in norms else nn.Identity()
    if isinstance(norm, nn.Identity):
        return
    layer: nn.Module = network.get_submodule(layer_name)
    if isinstance(layer, nn.Sequential):
        layer = layer[-1]
    _fold(layer, cast(nn.BatchNorm2d, norm))
    network.set_submodule(norms[layer_name], nn.Identity())


def _fold(layer: nn.Module, norm: nn.BatchNorm2d) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    factor = torch.rsqrt(variance.double() + norm.eps)
    shift = -mean.double() * factor
    if norm.affine:
        factor = factor * norm.weight.double()
        shift = shift * norm.weight.double() + norm.bias.double()
    weight = cast(Tensor, layer.weight)
    bias = cast("Tensor | None", layer.bias)
    with torch.no_grad():
        spread = factor.reshape(-1, *(1 for _ in weight.shape[1:]))
        weight.copy_(weight.double() * spread)
        if bias is not None:
            shift = shift + bias.double() * factor
        layer.bias = nn.Parameter(shift.float())
        scale = getattr(layer, "weight_scale", None)
        if isinstance(scale, Tensor):
            # Integers change their sign with the factor; codewords cannot.
            signed = hasattr(layer, "codebook_weight")
            rows = (factor if signed else factor.abs()).reshape(-1, 1)
            scale.copy_(scale.double() * rows)
