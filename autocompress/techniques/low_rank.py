"""Data-aware SVD: one layer becomes two thinner ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.errors import PlanError
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.reconstruction import damped_moment
from autocompress.techniques.technique import LayerProblem, LayerTechnique, Stage, Variant


@final
class LowRank(Decision):
    """Keep this share of a layer's full rank."""

    technique: ClassVar[str] = "low_rank"
    rank_ratio: float = Field(gt=0, le=1)


def kept_rank(full: int, rank_ratio: float, multiple: int) -> int:
    """The rank that a ratio stands for: the nearest multiple, at least one and at most the full."""
    step = min(multiple, full)
    return max(step, min(full, round(rank_ratio * full / step) * step))


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Ranks that need fewer multiply-accumulates than the layer itself."""
    full = min(layer.out_channels, layer.in_features)
    seen = set[int]()
    kept: list[Decision] = []
    for decision in offered:
        assert isinstance(decision, LowRank)
        rank = kept_rank(full, decision.rank_ratio, device.channel_multiple)
        cheaper = rank * (layer.out_channels + layer.in_features) < (
            layer.out_channels * layer.in_features
        )
        if layer.groups == 1 and cheaper and rank not in seen:
            seen.add(rank)
            kept.append(decision)
    return tuple(kept)


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    """Factors of every rank from one decomposition: W L = U S Vᵀ with H = L Lᵀ.

    The first r columns of `left` times the first r rows of `right` are the rank-r weight with the
    least output error on the calibration data (Yuan et al. 2023, ASVD; Wang et al. 2024, SVD-LLM).

    Raises:
        PlanError: the layer is a grouped convolution.
    """
    if problem.layer.groups > 1:
        raise PlanError(
            "A grouped convolution cannot be decomposed.",
            given=f"{problem.layer.name} with {problem.layer.groups} groups",
            allowed="linear layers, and convolutions of one group",
        )
    weight = problem.weight.double()
    if problem.statistics is None:
        root = torch.eye(weight.shape[1], dtype=torch.float64)
        mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    else:
        root = torch.linalg.cholesky(damped_moment(problem.statistics, problem.free_bias))
        mean = problem.statistics.mean
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    split = s.sqrt()
    right = torch.linalg.solve_triangular(root, split[:, None] * vt, upper=False, left=False)
    return {
        "left": (u * split).float().contiguous(),
        "right": right.float().contiguous(),
        "mean": mean.float(),
    }


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    """Two layers in sequence: the first keeps kernel and stride, the second is pointwise."""
    assert isinstance(decision, LowRank)
    left, right = variant["left"], variant["right"]
    rank = kept_rank(left.shape[1], decision.rank_ratio, multiple)
    weight = cast(Tensor, module.weight).detach()
    bias = cast("Tensor | None", module.bias)
    left, right = left[:, :rank], right[:rank]
    first: Any
    second: Any
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, rank, bias=False)
        second = nn.Linear(rank, module.out_features, bias=bias is not None)
        second_shape: tuple[int, ...] = left.shape
    else:
        conv = cast(nn.Conv2d, module)
        kind: Any = type(conv)
        first = kind(
            conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            bias=False, padding_mode=conv.padding_mode,
        )  # fmt: skip
        second = kind(rank, conv.out_channels, 1, bias=bias is not None)
        second_shape = (*left.shape, *(1 for _ in conv.kernel_size))
    with torch.no_grad():
        first.weight.copy_(right.reshape(rank, *weight.shape[1:]))
        second.weight.copy_(left.reshape(second_shape))
        if bias is not None:
            # What the cut ranks contributed on average goes into the bias.
            lost = weight.reshape(weight.shape[0], -1) - left @ right
            second.bias.copy_(bias + lost @ variant["mean"])
    return nn.Sequential(first, second).train(module.training)


LOW_RANK = LayerTechnique(
    name=LowRank.technique,
    decision=LowRank,
    stage=Stage.DECOMPOSE,
    levels=("rank_ratio",),
    choices=_choices,
    solve=_solve,
    install=_install,
)
