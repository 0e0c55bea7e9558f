"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node, Run
from autocompress.measure.runtimes.torch_graph.windows import Window, read_window

_CONVOLVE: Final[Mapping[int, Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Final[Mapping[int, Any]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def convolve(node: Node) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The convolution that a node's attributes describe, padded with zeros."""
    rank = len(node.shape(1)) - 2
    if rank not in _CONVOLVE:
        raise node.refused(f"{rank} spatial axes are not covered")
    function, window = _CONVOLVE[rank], read_window(node, node.shape(1)[2:])
    groups = int(node.value("group", 1))
    steps = {"stride": window.strides, "dilation": window.dilations, "groups": groups}
    if window.symmetric:

        def symmetric(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out: Tensor = function(x, weight, bias, padding=window.before, **steps)
            return out

        return symmetric

    def padded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = function(window.pad(x, 0.0), weight, bias, **steps)
        return out

    return padded


def _conv(node: Node) -> Run:
    run = convolve(node)
    return lambda x, weight, bias=None: run(x, weight, bias)


def _conv_transpose(node: Node) -> Run:
    rank = len(node.shape(1)) - 2
    if rank not in _TRANSPOSED:
        raise node.refused(f"{rank} spatial axes are not covered")
    if "output_shape" in node.attributes or node.value("auto_pad", "NOTSET") != "NOTSET":
        raise node.refused("output_shape and auto_pad are not covered")
    function, window = _TRANSPOSED[rank], read_window(node, node.shape(1)[2:])
    extra = tuple(node.value("output_padding", [0] * rank))
    steps = {
        "stride": window.strides,
        "dilation": window.dilations,
        "groups": int(node.value("group", 1)),
        "output_padding": extra,
    }
    if window.symmetric:
        return lambda x, weight, bias=None: function(
            x, weight, bias, padding=window.before, **steps
        )
    return lambda x, weight, bias=None: _cropped(function(x, weight, bias, **steps), window)


def _cropped(x: Tensor, window: Window) -> Tensor:
    for axis, (before, after) in enumerate(zip(window.before, window.after, strict=True), 2):
        x = x.narrow(axis, before, x.shape[axis] - before - after)
    return x


CONVOLUTIONS: Final[Mapping[str, Callable[[Node], Run]]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
}
