"""Networks whose layers are on a grid or made of codewords, for the export tests."""

from __future__ import annotations

import copy

import onnx
import torch
from networks import exporter_of, make_case, make_device, this_device
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.export.exporter import Exporter, FloatModel
from autocompress.graph import trace
from autocompress.techniques.technique import CodebookWeight, IntegerWeight

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
KERNEL_DEVICE: DeviceProfile = make_device(
    {"Conv": (32, 8), "Gemm": (32, 8), "MatMul": (32, 8), "MatMulNBits": (4,)}
)


def integers(
    bits: int = 8, group_size: int | None = None, *, per_tensor: bool = False,
    activation_bits: int = 32, dynamic: bool = False, signed: bool = False,
    calibration: str = "mse",
) -> IntegerWeight:  # fmt: skip
    if bits == 8 and activation_bits == 8:
        bits = this_device().integer_weight_bits
    return IntegerWeight(
        bits, group_size, per_tensor, activation_bits, dynamic, signed, calibration
    )


STATIC = integers(activation_bits=8)
DYNAMIC = integers(activation_bits=8, dynamic=True)


def layer_names(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, LAYERS)]


def marked(
    network: nn.Module, how: IntegerWeight, *layers: str, trained: tuple[float, int] | None = None
) -> nn.Module:
    """A copy whose layers (all, unless some are named) lie on the grid that is asked for."""
    changed = copy.deepcopy(network)
    for name in layers or layer_names(network):
        layer = changed.get_submodule(name)
        weight = layer.weight.detach().flatten(1)
        scale = torch.ones(len(weight), 1)
        if how.bits < 32:
            scale, rounded = on_grid(weight, how)
            with torch.no_grad():
                layer.weight.copy_(rounded.reshape(layer.weight.shape))
        layer.register_buffer("weight_scale", scale, persistent=False)
        if trained is not None:
            scale, zero_point = trained
            layer.register_buffer("input_scale", torch.tensor(scale), persistent=False)
            layer.register_buffer("input_zero_point", torch.tensor(zero_point), persistent=False)
        layer.integer_weight = how
    return changed


def on_grid(weight: Tensor, how: IntegerWeight) -> tuple[Tensor, Tensor]:
    """Scales, shape (out, groups), that cover the largest weight; and the rounded weight."""
    size = how.group_size or weight.shape[1]
    largest = 2 ** (how.bits - 1) - 1
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % size))
    scale = padded.reshape(len(weight), -1, size).abs().amax(2).clamp(min=1e-9) / largest
    if how.per_tensor:
        scale = scale.max().expand(scale.shape).clone()
    wide = scale.repeat_interleave(size, 1)[:, : weight.shape[1]]
    return scale, (weight / wide).round().clamp(-largest, largest) * wide


def coded(network: nn.Module, code_bits: int, *layers: str) -> nn.Module:
    """A copy whose layers are made of random codewords, as long as two where that divides."""
    changed = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for name in layers or layer_names(network):
        layer = changed.get_submodule(name)
        rows = layer.weight.detach().flatten(1)
        length = 2 if rows.shape[1] % 2 == 0 else 1
        words = min(2**code_bits, 300)
        codebook = torch.randn(words, length, generator=generator)
        codes = torch.randint(words, (len(rows), rows.shape[1] // length), generator=generator)
        codes[0, 0], codes[-1, -1] = 0, words - 1
        scale = rows.std(1, keepdim=True)
        with torch.no_grad():
            weight = scale * codebook[codes].reshape(rows.shape)
            layer.weight.copy_(weight.reshape(layer.weight.shape))
        for key, value in (("codebook", codebook), ("codes", codes), ("weight_scale", scale)):
            layer.register_buffer(key, value, persistent=False)
        layer.codebook_weight = CodebookWeight(code_bits)
    return changed


def float_model(name: str, how: IntegerWeight, *layers: str) -> FloatModel:
    """A test network on a grid, exported."""
    return exporter_of(name).export(marked(make_case(name).network, how, *layers))


def exported(network: nn.Module, original: nn.Module, inputs: tuple[Tensor, ...]) -> FloatModel:
    """A marked network of a test's own."""
    example, parity = tuple(x[:2] for x in inputs), tuple(x[:8] for x in inputs)
    return Exporter(original, trace(original, example), example, parity).export(network)


def bits_after_loading(model: onnx.ModelProto) -> set[int]:
    """Types of the constants with more than one dimension."""
    return {i.data_type for i in model.graph.initializer if len(i.dims) > 1}
