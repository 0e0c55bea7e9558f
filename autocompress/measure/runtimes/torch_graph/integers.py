"""Quantized values, computed in floating point: rounding is exact, integer kernels are not used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.convolutions import convolve
from autocompress.measure.runtimes.torch_graph.elementwise import DTYPES
from autocompress.measure.runtimes.torch_graph.node import Node, Run

_BYTE = 8
_UINT8_MAX = 255


def _along(node: Node, values: Tensor) -> Tensor:
    """Scales or zero points as they are broadcast over the node's first input."""
    shape = node.shape(0)
    if values.numel() == 1:
        return values.reshape(())
    axis, block = node.axis(1), int(node.value("block_size", 0))
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    return values.reshape([-1 if place == axis else 1 for place in range(len(shape))])


def _quantize(node: Node) -> Run:
    code = int(node.value("output_dtype", 0))
    dtype = node.example(2).dtype if node.has(2) else DTYPES.get(code, torch.uint8)
    limits = torch.iinfo(dtype)

    def run(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        steps = torch.round(x.to(torch.float32) / _along(node, scale))
        if zero_point is not None:
            steps = steps + _along(node, zero_point).to(torch.float32)
        return steps.clamp(limits.min, limits.max).to(dtype)

    return run


def _dequantize(node: Node) -> Run:
    dtype = node.target.dtype

    def run(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        steps = x.to(torch.float32)
        if zero_point is not None:
            steps = steps - _along(node, zero_point).to(torch.float32)
        return (steps * _along(node, scale)).to(dtype)

    return run


def _dynamic_quantize(node: Node) -> Run:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        low, high = torch.aminmax(x.to(torch.float32))
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / _UINT8_MAX
        # All zeros: any scale but zero gives them back.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero_point = torch.round(-low / scale).clamp(0, _UINT8_MAX)
        codes = (torch.round(x / scale) + zero_point).clamp(0, _UINT8_MAX)
        return codes.to(torch.uint8), scale, zero_point.to(torch.uint8)

    return run


def _shifted(values: Tensor, zero_point: Tensor | None, column: bool = False) -> Tensor:
    shifted = values.to(torch.float32)
    if zero_point is None:
        return shifted
    shift = zero_point.to(torch.float32)
    # One per row of the first matrix, one per column of the second.
    return shifted - (shift.unsqueeze(-1) if column and shift.dim() else shift)


def _matmul_integer(node: Node) -> Run:
    def run(
        a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
    ) -> Tensor:
        return torch.matmul(_shifted(a, a_zero, column=True), _shifted(b, b_zero))

    return run


def _conv_integer(node: Node) -> Run:
    product = convolve(node)

    def run(
        x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None
    ) -> Tensor:
        if weight_zero is not None and weight_zero.numel() > 1:
            weight_zero = weight_zero.reshape(-1, *(1 for _ in weight.shape[1:]))
        return product(_shifted(x, x_zero), _shifted(weight, weight_zero), None)

    return run


def prepare_nbits(node: Node) -> tuple[Tensor, ...]:
    """The float weight of ONNX Runtime's `MatMulNBits`, (N, K), and its bias if there is one.

    ONNX Runtime may round the other operand to 8 bits (`accuracy_level` 4); here nothing is.
    """
    bits, block = int(node.value("bits", 4)), int(node.value("block_size", 32))
    rows, columns = int(node.value("N", 0)), int(node.value("K", 0))
    if bits not in (4, _BYTE) or node.has(4):
        raise node.refused(f"weights of {bits} bits, or in another order, are not covered")
    blocks = -(-columns // block)
    codes = _unpacked(node.example(1), bits).reshape(rows, blocks, block)
    scale = node.example(2).to(torch.float32).reshape(rows, blocks, 1)
    if not node.has(3):
        zero_points = torch.full_like(scale, float(1 << (bits - 1)))
    elif node.example(3).dtype == torch.uint8:
        unpacked = _unpacked(node.example(3).reshape(rows, -1), bits)
        zero_points = unpacked[:, :blocks].to(torch.float32).unsqueeze(-1)
    else:
        zero_points = node.example(3).to(torch.float32).reshape(rows, blocks, 1)
    weight = ((codes.to(torch.float32) - zero_points) * scale).reshape(rows, -1)[:, :columns]
    bias = (node.example(5),) if node.has(5) else ()
    return (weight.contiguous(), *bias)


def run_nbits(node: Node) -> Run:
    """`MatMulNBits` on the weight that `prepare_nbits` made."""
    return torch.nn.functional.linear


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits, the first in the lowest bits; the last axis grows accordingly."""
    if bits == _BYTE:
        return packed
    return torch.stack([packed & 0x0F, packed >> 4], -1).flatten(-2)


INTEGERS: Final[Mapping[str, Callable[[Node], Run]]] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QuantizeLinear": _quantize,
}
