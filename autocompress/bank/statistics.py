"""Moments of every layer's calibration inputs, gathered in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph import Layer
from autocompress.techniques.technique import LayerStatistics

_BATCH = 64


def unfold_inputs(
    module: nn.Module, inputs: Tensor, generator: torch.Generator, rows: int
) -> Tensor:
    """A layer's input rows as its unfolded weight sees them, shape (at most rows, in_features).

    Where there are more, the same random output positions are taken from every sample.
    """
    if isinstance(module, nn.Linear):
        flat = inputs.reshape(-1, inputs.shape[-1])
        if len(flat) > rows:
            flat = flat[torch.randperm(len(flat), generator=generator)[:rows]]
        return flat
    conv = cast(nn.Conv2d, module)
    kernel, stride, dilation = tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation)
    padded = _pad(conv, inputs)
    if inputs.dim() == 3:
        padded, kernel = padded.unsqueeze(2), (1, *kernel)
        stride, dilation = (1, *stride), (1, *dilation)
    height, width = (
        (size - d * (k - 1) - 1) // s + 1
        for size, k, d, s in zip(padded.shape[2:], kernel, dilation, stride, strict=True)
    )
    positions = max(1, rows // len(padded))
    if height * width <= positions:
        columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    chosen = torch.randperm(height * width, generator=generator)[:positions]
    # Only the chosen patches are copied: there may be a hundred times as many.
    down = (chosen // width * stride[0])[:, None, None] + _offsets(kernel[0], dilation[0])[:, None]
    right = (chosen % width * stride[1])[:, None, None] + _offsets(kernel[1], dilation[1])
    patches = padded[:, :, down, right]
    return patches.transpose(1, 2).reshape(len(padded) * positions, -1)


def _offsets(size: int, dilation: int) -> Tensor:
    return torch.arange(size) * dilation


def _pad(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    # The attribute is private but is the only place that resolves 'same' and per-side padding.
    sides = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs, sides, mode=mode)


def collect_statistics(
    network: nn.Module,
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    rows_per_layer: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, LayerStatistics]:
    """First and second moments of the inputs of every dense layer that may be changed.

    Args:
        network: in evaluation mode; left as it was.
        inputs: calibration inputs, n samples in dimension 0.
        rows_per_layer: about how many unfolded rows enter each layer's moments.
        advance: called after every batch of 64 samples.
    """
    samples = len(inputs[0])
    sums: dict[str, _Sums] = {}
    generator = torch.Generator().manual_seed(0)

    quota = 0

    def gather(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = unfold_inputs(module, args[0].detach().float(), generator, quota)
            if name not in sums:
                sums[name] = _Sums(x.mean(0))
            sums[name].add(x)

        return hook

    handles = [
        network.get_submodule(layer.name).register_forward_pre_hook(gather(layer.name))
        for layer in layers
        if layer.dense and layer.compressible
    ]
    try:
        with torch.no_grad():
            for start in range(0, samples, _BATCH):
                batch = tuple(x[start : start + _BATCH] for x in inputs)
                # In proportion, or the samples of a short last batch would weigh more.
                quota = max(1, rows_per_layer * len(batch[0]) // samples)
                network(*batch)
                advance()
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.statistics() for name, found in sums.items()}


@final
class _Sums:
    """Moments summed about a first guess of the mean.

    Float32 products of raw inputs would lose small variances around large means.
    """

    def __init__(self, guess: Tensor) -> None:
        self._guess = guess
        self._moment = torch.zeros(len(guess), len(guess), dtype=torch.float64)
        self._total = torch.zeros(len(guess), dtype=torch.float64)
        self._magnitude = torch.zeros(len(guess), dtype=torch.float64)
        self._zeros = torch.zeros(len(guess), dtype=torch.float64)
        self._rows = 0

    def add(self, x: Tensor) -> None:
        """Take in rows, shape (n, in)."""
        self._magnitude += torch.linalg.vector_norm(x, 1, dim=0).double()
        self._zeros += len(x) - torch.count_nonzero(x, dim=0)
        x = x - self._guess
        self._moment += (x.T @ x).double()
        self._total += x.mean(0).double() * len(x)
        self._rows += len(x)

    def statistics(self) -> LayerStatistics:
        """The moments about zero."""
        rest = self._total / self._rows
        mean = self._guess.double() + rest
        centred = self._moment / self._rows - torch.outer(rest, rest)
        return LayerStatistics(
            centred + torch.outer(mean, mean),
            mean,
            self._magnitude / self._rows,
            self._zeros / self._rows,
        )
