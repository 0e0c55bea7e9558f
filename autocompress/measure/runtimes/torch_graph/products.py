"""Matrix products and normalizations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node, Run


def _matmul(node: Node) -> Run:
    return torch.matmul


def _gemm(node: Node) -> Run:
    alpha, beta = float(node.value("alpha", 1.0)), float(node.value("beta", 1.0))
    first, second = bool(node.value("transA", 0)), bool(node.value("transB", 0))
    plain = alpha == 1 and not first
    bias_shape = node.shape(2) if node.has(2) else ()
    # A bias that is added to each row.
    rows = len(bias_shape) == 1 and bias_shape[0] == node.shape(1)[0 if second else 1]

    def linear(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        return F.linear(a, b if second else b.t(), c)

    if plain and (not node.has(2) or (rows and beta == 1)):
        return linear

    def general(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if first else a, b.t() if second else b
        if c is None:
            return torch.matmul(a, b) * alpha
        return torch.addmm(c, a, b, alpha=alpha, beta=beta)

    return general


def _einsum(node: Node) -> Run:
    equation = node.value("equation", "")
    return lambda *operands: torch.einsum(equation, *operands)


def _batch_normalization(node: Node) -> Run:
    epsilon = float(node.value("epsilon", 1e-5))
    if node.value("training_mode", 0) or node.outputs > 1:
        raise node.refused("training is not covered")
    return lambda x, weight, bias, mean, variance: F.batch_norm(
        x, mean, variance, weight, bias, False, 0.0, epsilon
    )


def _instance_normalization(node: Node) -> Run:
    epsilon = float(node.value("epsilon", 1e-5))
    return lambda x, weight, bias: F.instance_norm(x, weight=weight, bias=bias, eps=epsilon)


def _group_normalization(node: Node) -> Run:
    groups, epsilon = int(node.value("num_groups", 1)), float(node.value("epsilon", 1e-5))
    # Until operator set 21 there is one scale per group, not per channel.
    repeats = node.shape(0)[1] // math.prod(node.shape(1))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if repeats > 1:
            weight, bias = weight.repeat_interleave(repeats), bias.repeat_interleave(repeats)
        return F.group_norm(x, groups, weight, bias, epsilon)

    return run


def _layer_normalization(node: Node) -> Run:
    if node.outputs > 1:
        raise node.refused("its mean and deviation are not covered")
    epsilon, shape = float(node.value("epsilon", 1e-5)), node.shape(0)[node.axis(-1) :]
    if node.shape(1) == shape and (not node.has(2) or node.shape(2) == shape):
        return lambda x, weight, bias=None: F.layer_norm(x, shape, weight, bias, epsilon)

    def broadcast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = F.layer_norm(x, shape, None, None, epsilon) * weight
        return out if bias is None else out + bias

    return broadcast


def _rms_normalization(node: Node) -> Run:
    epsilon, shape = float(node.value("epsilon", 1e-5)), node.shape(0)[node.axis(-1) :]
    return lambda x, weight: F.rms_norm(x, shape, None, epsilon) * weight


def _softmax(function: Callable[..., Tensor]) -> Callable[[Node], Run]:
    def make(node: Node) -> Run:
        shape = node.shape(0)
        if node.opset >= 13:
            axis = node.axis(-1)
            return lambda x: function(x, dim=axis)
        # Older operator sets take all axes from this one on for one.
        rows = math.prod(shape[: node.axis(1)])
        return lambda x: function(x.reshape(rows, -1), dim=1).reshape(shape)

    return make


PRODUCTS: Final[Mapping[str, Callable[[Node], Run]]] = {
    "BatchNormalization": _batch_normalization,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _matmul,
    "RMSNormalization": _rms_normalization,
    "Softmax": _softmax(torch.softmax),
}
