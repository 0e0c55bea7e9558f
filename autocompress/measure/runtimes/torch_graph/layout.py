"""Operators that move values, cut them out or put them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node, Run

_PAD_MODES: Final = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _reshape(node: Node) -> Run:
    wanted, sizes = node.constant_ints(1), node.shape(0)
    if node.value("allowzero", 0):
        shape = list(wanted)
    else:
        shape = [sizes[place] if size == 0 else size for place, size in enumerate(wanted)]
    return lambda x, _: x.reshape(shape)


def _flatten(node: Node) -> Run:
    shape = node.shape(0)
    axis = int(node.value("axis", 1))
    rows = math.prod(shape[: axis + len(shape) if axis < 0 else axis])
    columns = math.prod(shape) // rows if rows else 0
    return lambda x: x.reshape(rows, columns)


def _transpose(node: Node) -> Run:
    axes = tuple(node.value("perm", reversed(range(len(node.shape(0))))))
    return lambda x: x.permute(axes)


def _concat(node: Node) -> Run:
    axis = node.axis(0)
    return lambda *values: torch.cat(values, axis)


def _split(node: Node) -> Run:
    axis = node.axis(0)
    size = node.shape(0)[axis]
    sizes = node.ints("split", 1)
    if sizes is None:
        each = -(-size // int(node.value("num_outputs", node.outputs)))
        sizes = tuple(min(each, size - start) for start in range(0, size, each))
    parts = list(sizes)
    return lambda x, *_: torch.split(x, parts, axis)


def _slice(node: Node) -> Run:
    starts, ends = node.ints("starts", 1), node.ints("ends", 2)
    if starts is None or ends is None:
        raise node.refused("it has no starts or ends")
    rank = len(node.shape(0))
    axes = node.ints("axes", 3) or tuple(range(len(starts)))
    steps = node.ints("steps", 4) or (1,) * len(starts)
    cuts, turned = [slice(None)] * rank, []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = node.shape(0)[axis]
        if step > 0:
            cuts[axis % rank] = slice(*slice(start, end, step).indices(size))
            continue
        # PyTorch takes no negative steps.
        places = list(range(size))[start:end:step]
        turned.append((axis % rank, torch.tensor(places, device=node.target.device)))
    index = tuple(cuts)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        x = x[index]
        for axis, places in turned:
            x = x.index_select(axis, places)
        return x

    return run


def _gather(node: Node) -> Run:
    axis, shape = node.axis(0), node.shape(0)
    size, places = shape[axis], node.shape(1)
    if node.constant[1] and not places:
        place = node.constant_ints(1)[0] % size
        return lambda x, _: x.select(axis, place)
    result = (*shape[:axis], *places, *shape[axis + 1 :])
    from_front = node.constant[1] and bool((node.example(1) >= 0).all())

    def run(x: Tensor, index: Tensor) -> Tensor:
        index = index.reshape(-1)
        if not from_front:
            index = torch.where(index < 0, index + size, index)
        return x.index_select(axis, index).reshape(result)

    return run


def _gather_elements(node: Node) -> Run:
    axis = node.axis(0)
    size = node.shape(0)[axis]
    return lambda x, index: torch.gather(
        x, axis, torch.where(index < 0, index + size, index).to(torch.int64)
    )


def _gather_nd(node: Node) -> Run:
    if node.value("batch_dims", 0):
        raise node.refused("batch_dims is not covered")

    # PyTorch counts negative indices from the end too.
    def run(x: Any, index: Any) -> Any:
        return x[tuple(index.to(torch.int64).unbind(-1))]

    return run


def _pad(node: Node) -> Run:
    rank, mode = len(node.shape(0)), node.value("mode", "constant")
    pads = node.ints("pads", 1)
    if pads is None:
        raise node.refused("it has no pads")
    axes = node.ints("axes", 3) or tuple(range(rank))
    ends = {axis % rank: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    flat = [pad for axis in reversed(range(rank)) for pad in ends.get(axis, (0, 0))]
    if mode == "constant":
        value = node.value("value", 0.0)
        if node.has(2):
            if not node.constant[2]:
                raise node.refused("the padding's value depends on the data")
            value = node.example(2).item()
        return lambda x, *_: F.pad(x, flat, value=value)
    # PyTorch's other modes leave the batch and the channels alone.
    if mode not in _PAD_MODES or any(flat[-4:]):
        raise node.refused(f"mode {mode} on these axes is not covered")
    return lambda x, *_: F.pad(x, flat[:-4], mode=_PAD_MODES[mode])


def _expand(node: Node) -> Run:
    shape = np.broadcast_shapes(node.shape(0), node.constant_ints(1))
    return lambda x, _: x.expand(shape)


def _tile(node: Node) -> Run:
    repeats = node.constant_ints(1)
    return lambda x, _: x.repeat(repeats)


def _trilu(node: Node) -> Run:
    diagonal = node.constant_ints(1)[0] if node.has(1) else 0
    function = torch.triu if node.value("upper", 1) else torch.tril
    return lambda x, *_: function(x, diagonal)


def _depth_to_space(node: Node) -> Run:
    block, (batch, channels, height, width) = int(node.value("blocksize", 1)), node.shape(0)
    depth = channels // block**2
    if node.value("mode", "DCR") == "CRD":
        split, order = (batch, depth, block, block, height, width), (0, 1, 4, 2, 5, 3)
    else:
        split, order = (batch, block, block, depth, height, width), (0, 3, 4, 1, 5, 2)
    result = (batch, depth, height * block, width * block)
    return lambda x: x.reshape(split).permute(order).reshape(result)


def _space_to_depth(node: Node) -> Run:
    block, (batch, channels, height, width) = int(node.value("blocksize", 1)), node.shape(0)
    split = (batch, channels, height // block, block, width // block, block)
    result = (batch, channels * block**2, height // block, width // block)
    return lambda x: x.reshape(split).permute(0, 3, 5, 1, 2, 4).reshape(result)


LAYOUT: Final[Mapping[str, Callable[[Node], Any]]] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
}
