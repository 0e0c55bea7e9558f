"""Moments of every layer's calibration inputs, gathered in passes over the data.

A layer with `in` columns sums up `in * in` numbers of eight bytes; in a big network these are more
than its weights. So as many layers are summed in a pass as a bound in bytes allows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.graph import Layer
from autocompress.techniques.technique import LayerStatistics
from autocompress.workload import NO_PADDING, Padding

_BATCH = 64


def unfold_inputs(
    module: nn.Module, inputs: Tensor, generator: torch.Generator, rows: int
) -> Tensor:
    """A layer's input rows as its unfolded weight sees them, shape (at most rows, in_features).

    Where there are more, the same random output positions are taken from every sample.
    """
    return _unfold(module, inputs, _chosen_rows(module, inputs, generator, rows))


def _chosen_rows(
    module: nn.Module, inputs: Tensor, generator: torch.Generator, rows: int
) -> Tensor | None:
    """Random rows of a linear layer, or random output positions of a convolution; None for all."""
    if isinstance(module, nn.Linear):
        count = inputs.numel() // inputs.shape[-1]
    else:
        window = _window(cast(nn.Conv2d, module), inputs)
        count, rows = window.height * window.width, max(1, rows // len(inputs))
    return torch.randperm(count, generator=generator)[:rows] if count > rows else None


def _unfold(module: nn.Module, inputs: Tensor, chosen: Tensor | None) -> Tensor:
    if isinstance(module, nn.Linear):
        flat = inputs.reshape(-1, inputs.shape[-1])
        return flat if chosen is None else flat[chosen]
    conv = cast(nn.Conv2d, module)
    window = _window(conv, inputs)
    kernel, stride, dilation = window.kernel, window.stride, window.dilation
    padded = _pad(conv, inputs)
    if inputs.dim() == 3:
        padded = padded.unsqueeze(2)
    if chosen is None:
        columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    # Only the chosen patches are copied: there may be a hundred times as many.
    width = window.width
    down = (chosen // width * stride[0])[:, None, None] + _offsets(kernel[0], dilation[0])[:, None]
    right = (chosen % width * stride[1])[:, None, None] + _offsets(kernel[1], dilation[1])
    patches = padded[:, :, down, right]
    return patches.transpose(1, 2).reshape(len(padded) * len(chosen), -1)


@final
@dataclass(frozen=True)
class _Window:
    """How a convolution moves over its input, signals as images of height one.

    Attributes:
        height: output positions, and `width` too.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    height: int
    width: int


def _window(conv: nn.Conv2d, inputs: Tensor) -> _Window:
    kernel, stride, dilation = tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation)
    sides = _padding(conv)
    sizes = [n + sides[-2 * i - 2] + sides[-2 * i - 1] for i, n in enumerate(inputs.shape[2:])]
    if inputs.dim() == 3:
        kernel, stride, dilation, sizes = (1, *kernel), (1, *stride), (1, *dilation), [1, *sizes]
    height, width = (
        (size - d * (k - 1) - 1) // s + 1
        for size, k, d, s in zip(sizes, kernel, dilation, stride, strict=True)
    )
    return _Window(kernel, stride, dilation, height, width)


def _offsets(size: int, dilation: int) -> Tensor:
    return torch.arange(size) * dilation


def _padding(conv: nn.Conv2d) -> list[int]:
    """Before and after each dimension, the last one first."""
    # The attribute is private but is the only place that resolves 'same' and per-side padding.
    return list(conv._reversed_padding_repeated_twice)


def _pad(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs, _padding(conv), mode=mode)


@final
@dataclass(frozen=True)
class Gathering:
    """What statistics are gathered from.

    Attributes:
        network: in evaluation mode; left as it was.
        layers: all of its layers, in order of their first call.
        inputs: calibration inputs, n samples in dimension 0.
        rows: about how many unfolded rows enter each layer's moments.
        padding: of the inputs, which is left out.
    """

    network: nn.Module
    layers: Sequence[Layer]
    inputs: tuple[Tensor, ...]
    rows: int
    padding: Padding = NO_PADDING

    @property
    def observed(self) -> tuple[Layer, ...]:
        """Those that get statistics: every dense layer that may be changed."""
        return tuple(layer for layer in self.layers if layer.dense and layer.compressible)

    @property
    def batches(self) -> int:
        """Batches of one pass over the inputs."""
        return -(-len(self.inputs[0]) // _BATCH)


def plan_passes(layers: Sequence[Layer], most_bytes: int) -> list[tuple[Layer, ...]]:
    """Neighbouring layers whose sums are held together: no more than the bound, or one layer."""
    passes: list[tuple[Layer, ...]] = []
    held = 0
    for layer in layers:
        size = _sums_bytes(layer.in_features)
        if passes and held + size <= most_bytes:
            passes[-1], held = (*passes[-1], layer), held + size
        else:
            passes.append((layer,))
            held = size
    return passes


def collect_statistics(
    gathering: Gathering, wanted: Sequence[Layer], advance: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, LayerStatistics]]:
    """First and second moments of the inputs of some layers, by layer name, in one pass.

    What is given for a layer does not depend on which others are wanted. Each layer's sums are
    forgotten when its moments are given.

    Args:
        wanted: some of `gathering.observed`; those that are never called give nothing.
        advance: called after every batch of 64 samples.
    """
    sums = _pass(gathering, {layer.name for layer in wanted}, advance)
    for name in list(sums):
        yield name, sums.pop(name).statistics()


def _pass(
    gathering: Gathering, wanted: Collection[str], advance: Callable[[], None]
) -> dict[str, _Sums]:
    network = gathering.network
    sums: dict[str, _Sums] = {}
    generator = torch.Generator().manual_seed(0)
    quota = 0

    def gather(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Drawn for all layers, or the rows would depend on which layers go together.
            chosen = _chosen_rows(module, args[0], generator, quota)
            if name in wanted:
                x = _unfold(module, args[0].detach().float(), chosen)
                if name not in sums:
                    sums[name] = _Sums(x.mean(0))
                sums[name].add(x)

        return hook

    handles = [
        network.get_submodule(layer.name).register_forward_pre_hook(gather(layer.name))
        for layer in gathering.observed
    ]
    try:
        with torch.no_grad():
            batches = list(gathering.padding.batches(gathering.inputs, _BATCH))
            sizes = [gathering.padding.positions(batch) for batch in batches]
            for batch, size in zip(batches, sizes, strict=True):
                # In proportion, or the samples of a short last batch would weigh more.
                quota = max(1, gathering.rows * size // sum(sizes))
                network(*batch)
                advance()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _sums_bytes(columns: int) -> int:
    """Bytes of `_Sums` of so many columns, without the guess."""
    return 8 * columns * (columns + 3)


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
        self._moment += x.T @ x
        self._total += x.mean(0).double() * len(x)
        self._rows += len(x)

    def statistics(self) -> LayerStatistics:
        """The moments about zero; the sums are used up."""
        rest = self._total / self._rows
        mean = self._guess.double() + rest
        moment = self._moment.div_(self._rows).sub_(torch.outer(rest, rest))
        return LayerStatistics(
            moment.add_(torch.outer(mean, mean)),
            mean,
            self._magnitude / self._rows,
            self._zeros / self._rows,
        )
