"""Layer and group problems made from plain matrices."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.graph import ChannelGroup, Layer, Member
from autocompress.techniques.reconstruction import DAMPING
from autocompress.techniques.technique import GroupProblem, LayerProblem, LayerStatistics

Matrix = NDArray[np.float64]


def statistics_of(rows: Tensor) -> LayerStatistics:
    x = rows.double()
    return LayerStatistics(x.T @ x / len(x), x.mean(0), x.abs().mean(0), (x == 0).double().mean(0))


def problem_of(
    weight: Tensor, rows: Tensor | None, *, free_bias: bool, kernel: tuple[int, ...] = ()
) -> LayerProblem:
    out, columns = weight.shape
    channels = columns // max(1, int(np.prod(kernel)))
    layer = Layer(
        "layer", "conv" if kernel else "linear", channels, out, kernel, 1, 1, weight.numel()
    )
    statistics = None if rows is None else statistics_of(rows)
    return LayerProblem(layer, weight, None, statistics, free_bias, 1)


def group_of(*problems: LayerProblem, per_channel: int = 1) -> GroupProblem:
    size = problems[0].layer.in_channels // per_channel
    members = [
        Member(f"reader{i}", "in", tuple(range(size * per_channel)), per_channel)
        for i in range(len(problems))
    ]
    group = ChannelGroup("group", size, tuple(members))
    return GroupProblem(group, (), tuple(zip(problems, members, strict=True)))


def correlated_rows(count: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    scale = torch.rand(columns, generator=generator) + 0.1
    return torch.randn(count, columns, generator=generator) @ mix * scale + 0.7


def damped_rows(rows: Tensor, *, free_bias: bool) -> Matrix:
    """Rows A with A^T A = H: the data as shares of their number, then the damping's own rows."""
    x = rows.double().numpy()
    if free_bias:
        x = x - x.mean(0)
    x = x / np.sqrt(len(x))
    damping = DAMPING * np.square(x).sum(0).mean()
    return np.concatenate([x, np.sqrt(damping) * np.eye(x.shape[1])])


def random_weight(out: int, columns: int, seed: int) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed + 999))


def weight_of(module: nn.Module) -> Matrix:
    weight = module.weight.detach().double().numpy()
    return weight.reshape(len(weight), -1)
