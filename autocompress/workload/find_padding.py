"""Where samples end in padding, found by trying what a network makes of them without it.

Texts are filled up to one length. A network that masks what is filled up makes the same of a text
without it, so statistics that count those positions describe inputs that never matter, and
trainings that run them waste their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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

    Some samples are run by themselves without their padding, the shortest one among them: batches
    are never cut to fewer positions than it has. Outputs whose shape follows the length depend
    on it.

    Args:
        network: in evaluation mode.
        inputs: n samples in dimension 0.
        dynamic_axes: as in `Workload`; the first name that stands for padding is taken.
    """
    for name in dict.fromkeys(name for axes in dynamic_axes for name in axes.values()):
        padding = Padding(tuple(_axis_of(name, axes) for axes in dynamic_axes))
        size = max(x.shape[a] for x, a in zip(inputs, padding.axes, strict=True) if a is not None)
        lengths = padding.lengths(inputs)
        tried = _telling(lengths, size)
        if float(lengths.double().mean()) > (1 - _LEAST_SHARE) * size or len(tried) == 0:
            continue
        if _same_outputs(network, tuple(x[tried] for x in inputs), padding):
            return replace(padding, shortest=int(lengths[tried].min()))
    return NO_PADDING


def _axis_of(name: str, axes: Axes) -> int | None:
    return next((axis for axis, other in axes.items() if other == name), None)


def _telling(lengths: Tensor, size: int) -> Tensor:
    """Numbers of some samples that get shorter, evenly spaced by length from the shortest one.

    A sample that is the same all over tells nothing: its mean, too, is the same at every length.
    """
    order = lengths.argsort(stable=True)
    order = order[(lengths[order] > 1) & (lengths[order] < size)]
    count = min(_TRIED, len(order))
    return order[torch.arange(count) * len(order) // max(count, 1)]


def _same_outputs(network: nn.Module, inputs: Inputs, padding: Padding) -> bool:
    """Whether a network makes the same of samples, of rising length, if each is cut by itself."""
    wanted = network_outputs(network, inputs, _BATCH)
    try:
        # Together only the longest would lose all of its padding.
        parts = [network_outputs(network, sample) for sample in padding.batches(inputs, 1)]
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
