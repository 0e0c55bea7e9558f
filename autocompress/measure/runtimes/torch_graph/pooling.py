"""Poolings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node, Run
from autocompress.measure.runtimes.torch_graph.windows import Window, read_window

_MAX: Final[Mapping[int, Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: Final[Mapping[int, Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _max_pool(node: Node) -> Run:
    if node.outputs > 1:
        raise node.refused("its indices are not covered")
    window = read_window(node, node.value("kernel_shape", []))
    function = _MAX[len(window.kernel)]
    steps: dict[str, Any] = {"stride": window.strides, "dilation": window.dilations}
    if _native(window):
        steps |= {"padding": window.before, "ceil_mode": bool(node.value("ceil_mode", 0))}
        return lambda x: function(x, window.kernel, **steps)
    _check_whole(node, window)

    def padded(x: Tensor) -> Tensor:
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        out: Tensor = function(window.pad(x, lowest), window.kernel, **steps)
        return out

    return padded


def _average_pool(node: Node) -> Run:
    window = read_window(node, node.value("kernel_shape", []))
    if any(dilation != 1 for dilation in window.dilations):
        raise node.refused("dilations are not covered")
    function, counts = _AVERAGE[len(window.kernel)], bool(node.value("count_include_pad", 0))
    if _native(window):
        steps = {"stride": window.strides, "padding": window.before, "count_include_pad": counts}
        ceil = bool(node.value("ceil_mode", 0))
        return lambda x: function(x, window.kernel, ceil_mode=ceil, **steps)
    _check_whole(node, window)
    ones = torch.ones_like(node.example(0)[:1, :1])
    # What share of each window is not padding.
    share = function(window.pad(ones, 0.0), window.kernel, window.strides)

    def padded(x: Tensor) -> Tensor:
        out: Tensor = function(window.pad(x, 0.0), window.kernel, window.strides)
        return out if counts else out / share

    return padded


def _native(window: Window) -> bool:
    """Whether PyTorch's poolings take this padding."""
    pairs = zip(window.before, window.kernel, strict=True)
    return window.symmetric and all(2 * before <= kernel for before, kernel in pairs)


def _check_whole(node: Node, window: Window) -> None:
    """Refuse windows that overhang the padded input, if they would count."""
    sizes = zip(node.shape(0)[2:], window.before, window.after, strict=True)
    padded = [size + before + after for size, before, after in sizes]
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    steps = zip(padded, spans, window.strides, strict=True)
    if node.value("ceil_mode", 0) and any((size - span) % step for size, span, step in steps):
        raise node.refused("ceil_mode with such padding is not covered")


def _global(function: Callable[..., Tensor]) -> Callable[[Node], Run]:
    def make(node: Node) -> Run:
        axes = tuple(range(2, len(node.shape(0))))
        return lambda x: function(x, dim=axes, keepdim=True)

    return make


POOLING: Final[Mapping[str, Callable[[Node], Run]]] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "MaxPool": _max_pool,
}
