"""Squared gradients on calibration inputs, with labels drawn from the network's own outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.bank.statistics import unfold_inputs
from autocompress.errors import WorkloadError
from autocompress.graph import Layer
from autocompress.graph.layers import flatten_outputs
from autocompress.graph.plain import plain_input
from autocompress.techniques.technique import LayerGradients
from autocompress.workload import NO_PADDING, Padding

_BATCH = 32
# Values in the inputs and outputs of a batch's layers (1 GiB): about three times as many are kept
# for the backward pass.
_BATCH_VALUES = 2**28
# Entries of the weight gradients of single samples that are held at a time (64 MiB).
_HELD = 2**24
_ALL_ROWS = 2**62


@final
@dataclass(frozen=True)
class _Call:
    """One call of a layer: its input, and zeros added to its output, whose gradient is wanted."""

    inputs: Tensor
    probe: Tensor


def collect_gradients(
    network: nn.Module,
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    advance: Callable[[], None] = lambda: None,
    padding: Padding = NO_PADDING,
) -> dict[str, LayerGradients]:
    """Fisher information of every dense layer's weights, and Taylor importance of its inputs.

    Both come from the gradient G of each sample for the unfolded weight W, summed over positions
    and calls: the Fisher information is E[G²] with labels drawn from the model (Martens 2020,
    section 5), and `Σ x ∂x` of an input channel, as this layer alone reads it, is the sum of
    W * G over the channel's columns (Molchanov et al. 2019, eq. 8, for a gate on the channel).

    Args:
        network: in evaluation mode; left as it was.
        inputs: calibration inputs, n samples in dimension 0.
        advance: called after every batch of `batch_size` samples.
        padding: of the inputs, which is left out.

    Raises:
        WorkloadError: the outputs cannot be differentiated.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    dense = [layer for layer in layers if layer.dense and layer.compressible]
    labels = torch.Generator().manual_seed(0)
    calls: dict[str, list[_Call]] = {}

    def probed(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # A copy: what the network does to its input in place must not reach it.
            inputs = plain_input(module, args[0].detach(), output.detach()).clone()
            call = _Call(inputs, torch.zeros_like(output, requires_grad=True))
            calls.setdefault(name, []).append(call)
            return output + call.probe

        return hook

    for layer in dense:
        network.get_submodule(layer.name).register_forward_hook(probed(layer.name))
    fisher = {layer.name: torch.zeros(layer.out_channels, layer.in_features) for layer in dense}
    taylor = {layer.name: torch.zeros(layer.in_channels) for layer in dense}
    samples = len(inputs[0])
    for part in padding.batches(inputs, batch_size(layers)):
        calls.clear()
        batch = tuple(x.clone() for x in part)
        with torch.enable_grad():
            loss = negative_log_likelihood(network(*batch), labels)
        _backward(loss)
        for layer in dense:
            module = network.get_submodule(layer.name)
            squares = _squares(module, layer, calls.get(layer.name, []), len(batch[0]))
            fisher[layer.name] += squares[0]
            taylor[layer.name] += squares[1]
        advance()
    return {n: LayerGradients(f.div_(samples), taylor[n].div_(samples)) for n, f in fisher.items()}


def batch_size(layers: Sequence[Layer]) -> int:
    """Samples of which gradients are taken together: fewer for networks with large activations."""
    values = sum(x.positions * x.out_channels + _input_values(x) for x in layers if x.dense)
    return max(1, min(_BATCH, _BATCH_VALUES // max(values, 1)))


def _input_values(layer: Layer) -> int:
    """About how many values a layer reads of a sample: strides are steps between its positions."""
    return layer.positions * layer.in_channels * math.prod(layer.stride)


def _backward(loss: Tensor) -> None:
    advice = "leave out decisions that use gradients"
    if not loss.requires_grad:
        raise WorkloadError(
            "The network has no gradients.",
            given="outputs that do not depend on any layer's output in a differentiable way",
            allowed="at least one output of floating point, made without torch.no_grad()",
            advice=advice,
        )
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as cause:
        raise WorkloadError(
            f"The network cannot be differentiated: {str(cause).splitlines()[0]}", advice=advice
        ) from cause


def negative_log_likelihood(outputs: Any, generator: torch.Generator) -> Tensor:
    """Summed over samples and outputs, for labels drawn from the outputs themselves.

    The first output, if it has at least two scores along axis 1, is taken as logits (or as
    probabilities, if it holds such); all others as means of Gaussians of unit deviation. Outputs
    that are no floating-point numbers are left out.
    """
    floating = [x for x in flatten_outputs(outputs) if x.is_floating_point()]
    total = torch.zeros(())
    for index, output in enumerate(floating):
        if index == 0 and output.ndim >= 2 and output.shape[1] >= 2:
            scores = _logits(output.movedim(1, -1).reshape(-1, output.shape[1]))
            labels = torch.multinomial(scores.detach().softmax(1), 1, generator=generator)[:, 0]
            total = total + F.cross_entropy(scores, labels, reduction="sum")
        else:
            noise = torch.randn(output.shape, generator=generator)
            total = total + (output * noise).sum()
    return total


def _logits(scores: Tensor) -> Tensor:
    values = scores.detach()
    if bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < 1e-4).all()):
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    return scores


def _squares(
    module: nn.Module, layer: Layer, calls: Sequence[_Call], samples: int
) -> tuple[Tensor, Tensor]:
    """Sums over a batch of G², shape (out, in), and of the squared `Σ x ∂x`, shape (in_channels,).

    A layer whose inputs have another first dimension than the batch is taken to have several rows
    per sample, one sample after another; where that cannot be, the whole batch counts as one
    sample: gradients of samples are independent with mean zero, so this is unbiased too.
    """
    weight = cast(Tensor, module.weight).reshape(layer.out_channels, -1)
    pairs = [_rows(module, call, samples) for call in calls if call.probe.grad is not None]
    if len({len(outputs) for outputs, _ in pairs}) > 1:
        pairs = [(o.reshape(1, -1, o.shape[2]), x.reshape(1, -1, x.shape[2])) for o, x in pairs]
    fisher, taylor = torch.zeros_like(weight), torch.zeros(layer.in_channels)
    if not pairs:
        return fisher, taylor
    step = max(1, _HELD // weight.numel())
    for start in range(0, len(pairs[0][0]), step):
        chosen = slice(start, start + step)
        gradient = sum(
            (torch.bmm(o[chosen].transpose(1, 2), x[chosen]) for o, x in pairs),
            start=torch.zeros(()),
        )
        fisher += gradient.square().sum(0)
        change = (gradient * weight).sum(1).reshape(len(gradient), layer.in_channels, -1).sum(2)
        taylor += change.square().sum(0)
    return fisher, taylor


def _rows(module: nn.Module, call: _Call, samples: int) -> tuple[Tensor, Tensor]:
    """Output gradients (n, positions, out) and unfolded inputs (n, positions, in) of a call."""
    x = unfold_inputs(module, call.inputs, torch.Generator(), _ALL_ROWS)
    gradient = cast(Tensor, call.probe.grad)
    if not isinstance(module, nn.Linear):
        gradient = gradient.movedim(1, -1)
    gradient = gradient.reshape(-1, gradient.shape[-1])
    n = samples if len(call.inputs) % samples == 0 else 1
    return gradient.reshape(n, -1, gradient.shape[1]), x.reshape(n, -1, x.shape[1])
