"""Where samples end in padding, found by trying what a network makes of them without it.

Texts are filled up to one length. A network that masks what is filled up makes the same of a text
without it, so statistics that count those positions describe inputs that never matter, and
trainings that run them waste their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.workload.inputs import Axes
from autocompress.workload.padding import NO_PADDING, Padding
from autocompress.workload.scoring import network_outputs

_TRIED, _BATCH = 32, 8
# Of the largest output: sums of other lengths are rounded otherwise.
_TOLERANCE = 1e-4
# With less of it there is nothing to be gained.
_LEAST_SHARE = 0.05

Inputs = tuple[Tensor, ...]


def find_padding(network: nn.Module, inputs: Inputs, dynamic_axes: Sequence[Axes]) -> Padding:
    """What of some samples is padding; nothing where the network's outputs depend on it.

    Args:
        network: in evaluation mode.
        inputs: n samples in dimension 0, of which some are tried.
        dynamic_axes: as in `Workload`; the first name that stands for padding is taken.
    """
    some = tuple(x[:_TRIED] for x in inputs)
    for name in dict.fromkeys(name for axes in dynamic_axes for name in axes.values()):
        padding = Padding(tuple(_axis_of(name, axes) for axes in dynamic_axes))
        size = max(x.shape[a] for x, a in zip(some, padding.axes, strict=True) if a is not None)
        kept = float(padding.lengths(inputs).double().mean()) / size
        if kept <= 1 - _LEAST_SHARE and _same_outputs(network, some, padding):
            return padding
    return NO_PADDING


def _axis_of(name: str, axes: Axes) -> int | None:
    return next((axis for axis, other in axes.items() if other == name), None)


def _same_outputs(network: nn.Module, inputs: Inputs, padding: Padding) -> bool:
    order = torch.cat(padding.parts(inputs, _BATCH))
    wanted = network_outputs(network, tuple(x[order] for x in inputs), _BATCH)
    try:
        parts = [network_outputs(network, batch) for batch in padding.batches(inputs, _BATCH)]
        found = [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
    except (WorkloadError, ValueError):
        # It needs the full length, or its outputs have one.
        return False
    return all(map(_close, found, wanted))


def _close(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    if found.shape != wanted.shape:
        return False
    apart = np.abs(found.astype(np.float64) - wanted).max(initial=0.0)
    return bool(apart <= _TOLERANCE * np.abs(wanted).max(initial=0.0))
