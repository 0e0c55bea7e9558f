"""How often the entries of embeddings are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autocompress.graph import Layer
from autocompress.workload import NO_PADDING, Padding

_BATCH = 64


class _AllReadError(Exception):
    """Raised in a forward pass once all embeddings have been read."""


def count_usage(
    network: nn.Module,
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    padding: Padding = NO_PADDING,
) -> dict[str, Tensor]:
    """How often each entry of every embedding is read, shape (entries,), float64.

    Networks read their embeddings first: a pass ends with the last of them.

    Args:
        network: in evaluation mode; left as it was.
        inputs: calibration inputs, n samples in dimension 0.
        padding: of the inputs, which is left out.
    """
    tables = [layer.name for layer in layers if layer.kind == "embedding"]
    counts = {x.name: torch.zeros(x.out_channels).double() for x in layers if x.name in tables}

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[name] += torch.bincount(args[0].reshape(-1), minlength=len(counts[name]))
            if name == tables[-1]:
                raise _AllReadError

        return hook

    handles = [
        network.get_submodule(name).register_forward_pre_hook(count(name)) for name in tables
    ]
    try:
        with torch.no_grad():
            for batch in padding.batches(inputs, _BATCH) if tables else ():
                try:
                    network(*batch)
                except _AllReadError:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return counts
