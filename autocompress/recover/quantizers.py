"""Fake quantizers put into a network and taken out again, leaving the grids that they learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.graph.layers import LAYER_TYPES
from autocompress.recover.fake_quantize import (
    ActivationGrid,
    ActivationQuantizer,
    BatchQuantizer,
    WeightQuantizer,
    full_range_grid,
    least_error_grid,
    round_gradient,
)
from autocompress.recover.training_types import Inputs
from autocompress.techniques.technique import IntegerWeight
from autocompress.workload import NO_PADDING, Padding

FLOAT_BITS = 32
_RANGE_SAMPLES, _RANGE_BATCH = 256, 64
_VALUES_PER_BATCH = 8192


@final
@dataclass(frozen=True, eq=False)
class GradientRounding:
    """To how many bits gradients at layers' outputs are rounded, and the generator of its noise."""

    bits: int
    device: torch.device
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device))


@contextmanager
def fake_quantized(
    network: nn.Module,
    calibration: Inputs,
    gradients: GradientRounding | None = None,
    padding: Padding = NO_PADDING,
) -> Iterator[None]:
    """Within, quantized layers round weights and inputs as the exported file does.

    Steps and offsets are parameters of the network. Layers that read one tensor share one grid
    for it, since the file has one of 8 bits. A layer whose inputs have been trained before starts
    from that grid, others from the least squared error or, where their calibration is minmax, the
    whole range. Afterwards the layers are as `train_quantized` says.

    Args:
        network: in evaluation mode.
        gradients: None leaves them as they are.
        padding: of the calibration inputs, which is left out.
    """
    layers = quantized_layers(network)
    static = {n: m for n, m in layers.items() if _is_static(m)}
    some = tuple(x[:_RANGE_SAMPLES] for x in calibration)
    shared = _input_quantizers(network, static, padding.batches(some, _RANGE_BATCH))
    handles = []
    for name, layer in layers.items():
        how = integer_weight(layer)
        if how.bits != FLOAT_BITS:
            quantizer = WeightQuantizer(
                layer.weight_scale, how.bits, how.group_size, per_tensor=how.per_tensor
            )
            parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
        if how.activation_bits != FLOAT_BITS:
            layer.input_quantizer = shared.get(name) or BatchQuantizer(how.activation_bits)
            handles.append(layer.register_forward_pre_hook(_round_input))
        if gradients is not None and gradients.bits != FLOAT_BITS:
            handles.append(layer.register_forward_hook(_gradient_hook(gradients)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            _make_plain(layer)


def quantized_layers(network: nn.Module) -> dict[str, Any]:
    """By name the layers with integer weights or inputs."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LAYER_TYPES) and hasattr(module, "integer_weight")
    }


def integer_weight(layer: Any) -> IntegerWeight:
    """How a quantized layer is to be stored and run."""
    return cast(IntegerWeight, layer.integer_weight)


def _is_static(layer: Any) -> bool:
    how = integer_weight(layer)
    return how.activation_bits != FLOAT_BITS and not how.dynamic


def _round_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_quantizer(args[0]), *args[1:])


def _gradient_hook(gradients: GradientRounding) -> Any:
    def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return round_gradient(output, gradients.bits, gradients.generator)

    return hook


def _make_plain(layer: Any) -> None:
    """Give a layer its rounded weight, and the trained scales as buffers."""
    if parametrize.is_parametrized(layer, "weight"):
        scale = layer.parametrizations.weight[0].scale.detach()
        with torch.no_grad():
            parametrize.remove_parametrizations(layer, "weight")
            layer.weight_scale.copy_(scale)
        layer.weight.grad = None
    quantizer = getattr(layer, "input_quantizer", None)
    if isinstance(quantizer, ActivationQuantizer):
        grid = quantizer.grid.as_signed() if integer_weight(layer).signed else quantizer.grid
        device = quantizer.step.device
        scale = torch.tensor(grid.scale, device=device)
        zero_point = torch.tensor(grid.zero_point, dtype=torch.int32, device=device)
        layer.register_buffer("input_scale", scale, persistent=False)
        layer.register_buffer("input_zero_point", zero_point, persistent=False)
    if quantizer is not None:
        del layer.input_quantizer


@final
@dataclass
class _Observed:
    """A sample of a layer's inputs, and their whole range."""

    values: list[Tensor] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        flat = x.detach().flatten().float().cpu()
        low, high = torch.aminmax(flat)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.values.append(
            flat[torch.randint(len(flat), (_VALUES_PER_BATCH,), generator=generator)]
        )


def _input_quantizers(
    network: nn.Module, layers: dict[str, Any], batches: Iterable[Inputs]
) -> dict[str, ActivationQuantizer]:
    """One quantizer for all layers that read the same tensor, by layer name."""
    if not layers:
        return {}
    observed, sharing = _observe_inputs(network, layers, batches)
    device = next(network.parameters()).device
    quantizers = {}
    for names in sharing:
        grid = _first_grid([layers[n] for n in names], [observed[n] for n in names])
        quantizer = ActivationQuantizer(grid).to(device)
        quantizers.update(dict.fromkeys(names, quantizer))
    return quantizers


def _first_grid(layers: Sequence[Any], observed: Sequence[_Observed]) -> ActivationGrid:
    for layer in layers:
        how = integer_weight(layer)
        if hasattr(layer, "input_scale"):
            grid = ActivationGrid(
                float(layer.input_scale), int(layer.input_zero_point), how.activation_bits
            )
            return grid.as_unsigned() if how.signed else grid
    how = integer_weight(layers[0])
    low, high = min(o.low for o in observed), max(o.high for o in observed)
    if how.calibration == "minmax":
        return full_range_grid(low, high, how.activation_bits)
    values = torch.cat([v for o in observed for v in o.values])
    return least_error_grid(values, low, high, how.activation_bits)


def _observe_inputs(
    network: nn.Module, layers: dict[str, Any], batches: Iterable[Inputs]
) -> tuple[dict[str, _Observed], list[list[str]]]:
    """Samples of the layers' inputs, and the names of layers that read the same tensors."""
    observed = {name: _Observed() for name in layers}
    sharing = {name: [name] for name in layers}
    # The tensors are kept alive, so that no other gets the number of one that is gone.
    readers: dict[tuple[int, int, int], tuple[Tensor, str]] = {}
    generator = torch.Generator().manual_seed(0)

    def hook(name: str) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            observed[name].add(x, generator)
            # The version tells what a tensor held before an operation in place from after.
            key = (id(x), x._version, integer_weight(layer).activation_bits)
            _, first = readers.setdefault(key, (x, name))
            if sharing[first] is not sharing[name]:
                sharing[first] += sharing[name]
                for other in sharing[name]:
                    sharing[other] = sharing[first]

        return note

    handles = [layer.register_forward_pre_hook(hook(n)) for n, layer in layers.items()]
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            for batch in batches:
                network(*(x.to(device) for x in batch))
                readers.clear()
    finally:
        for handle in handles:
            handle.remove()
    return observed, list({id(names): names for names in sharing.values()}.values())
