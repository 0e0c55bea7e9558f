"""Operators that work on each number by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Final

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node, Run

Make = Callable[[Node], Run]

# Types of values by their numbers in ONNX.
DTYPES: Final[Mapping[int, torch.dtype]] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.BOOL: torch.bool,
}


def _plain(function: Run) -> Make:
    """An operator without attributes that PyTorch has too."""

    def make(node: Node) -> Run:
        return function

    return make


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Make:
    """An operator over any number of inputs."""

    def make(node: Node) -> Run:
        return lambda *values: reduce(function, values)

    return make


def _with_alpha(function: Callable[..., Tensor], default: float) -> Make:
    def make(node: Node) -> Run:
        alpha = float(node.value("alpha", default))
        return lambda x: function(x, alpha)

    return make


def _same(x: Tensor, *_: Tensor | None) -> Tensor:
    return x


def _identity(node: Node) -> Run:
    if node.outputs > 1 or (node.has(2) and node.example(2).any()):
        raise node.refused("training is not covered")
    return _same


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _div(node: Node) -> Run:
    if node.example(0).is_floating_point():
        return torch.div
    return lambda a, b: torch.div(a, b, rounding_mode="trunc")


def _pow(node: Node) -> Run:
    dtype = node.example(0).dtype
    return lambda base, exponent: torch.pow(base, exponent).to(dtype)


def _mod(node: Node) -> Run:
    # ONNX's `fmod` takes the sign of the first, as C does; else that of the second, as Python does.
    return torch.fmod if node.value("fmod", 0) else torch.remainder


def _bit_shift(node: Node) -> Run:
    if node.value("direction", "") == "LEFT":
        return torch.bitwise_left_shift
    return torch.bitwise_right_shift


def _mean(node: Node) -> Run:
    return lambda *values: reduce(torch.add, values) / len(values)


def _clip(node: Node) -> Run:
    if node.has(1) or node.has(2):
        return lambda x, low=None, high=None: torch.clamp(x, min=low, max=high)
    low, high = node.attributes.get("min"), node.attributes.get("max")
    if low is None and high is None:
        return lambda x, *_: x
    return lambda x: torch.clamp(x, min=low, max=high)


def _gelu(node: Node) -> Run:
    approximate = node.value("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def _hard_sigmoid(node: Node) -> Run:
    alpha, beta = float(node.value("alpha", 0.2)), float(node.value("beta", 0.5))
    return lambda x: (x * alpha + beta).clamp(0.0, 1.0)


def _selu(node: Node) -> Run:
    alpha = float(node.value("alpha", 1.67326319217681884765625))
    gamma = float(node.value("gamma", 1.05070102214813232421875))
    return lambda x: F.elu(x, alpha) * gamma


def _cast(node: Node) -> Run:
    to = int(node.value("to", TensorProto.UNDEFINED))
    if to not in DTYPES:
        raise node.refused(f"the type {TensorProto.DataType.Name(to)} is not covered")
    dtype = node.target.dtype if to == TensorProto.FLOAT else DTYPES[to]
    return lambda x: x.to(dtype)


def _cast_like(node: Node) -> Run:
    return lambda x, like: x.to(like.dtype)


ELEMENTWISE: Final[Mapping[str, Make]] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "BitShift": _bit_shift,
    "BitwiseAnd": _plain(torch.bitwise_and),
    "BitwiseNot": _plain(torch.bitwise_not),
    "BitwiseOr": _plain(torch.bitwise_or),
    "BitwiseXor": _plain(torch.bitwise_xor),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Cos": _plain(torch.cos),
    "Div": _div,
    "Dropout": _identity,
    "Elu": _with_alpha(F.elu, 1.0),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
    "Gelu": _gelu,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "Identity": _plain(_same),
    "IsNaN": _plain(torch.isnan),
    "LeakyRelu": _with_alpha(F.leaky_relu, 0.01),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "Max": _folded(torch.maximum),
    "Mean": _mean,
    "Min": _folded(torch.minimum),
    "Mish": _plain(F.mish),
    "Mod": _mod,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": _plain(_prelu),
    "Pow": _pow,
    "Reciprocal": _plain(torch.reciprocal),
    "Relu": _plain(torch.relu),
    "Round": _plain(torch.round),
    "Selu": _selu,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "Sqrt": _plain(torch.sqrt),
    "Sub": _plain(torch.sub),
    "Sum": _folded(torch.add),
    "Tanh": _plain(torch.tanh),
    "Where": _plain(torch.where),
    "Xor": _plain(torch.logical_xor),
}
