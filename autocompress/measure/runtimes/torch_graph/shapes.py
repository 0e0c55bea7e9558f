"""Operators about shapes, and those that make constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node, Run

# What ONNX calls a way of resizing, by mode and by where pixels lie, in PyTorch's arguments.
_RESIZES: Final[Mapping[tuple[str, str], Mapping[str, Any]]] = {
    ("nearest", "asymmetric"): {"mode": "nearest"},
    ("linear", "half_pixel"): {"align_corners": False},
    ("linear", "pytorch_half_pixel"): {"align_corners": False},
    ("linear", "align_corners"): {"align_corners": True},
}
_LINEAR: Final = {3: "linear", 4: "bilinear", 5: "trilinear"}


def _shape(node: Node) -> Run:
    shape = node.shape(0)
    start, end = int(node.value("start", 0)), int(node.value("end", len(shape)))
    return _constant_run(node, torch.tensor(shape[start:end], dtype=torch.int64))


def _size(node: Node) -> Run:
    return _constant_run(node, torch.tensor(math.prod(node.shape(0))))


def _constant(node: Node) -> Run:
    values = dict(node.attributes)
    if "value" in values:
        array = numpy_helper.to_array(values["value"])
    elif "value_float" in values or "value_floats" in values:
        array = np.array(values.get("value_float", values.get("value_floats")), np.float32)
    elif "value_int" in values or "value_ints" in values:
        array = np.array(values.get("value_int", values.get("value_ints")), np.int64)
    else:
        raise node.refused(f"a constant of the kind {', '.join(values)} is not covered")
    return _constant_run(node, torch.from_numpy(np.array(array)))


def _constant_of_shape(node: Node) -> Run:
    value = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    one = torch.from_numpy(np.array(fill)).reshape(())
    return _constant_run(node, one.expand(node.constant_ints(0)).clone())


def _range(node: Node) -> Run:
    if not all(node.constant):
        raise node.refused("its ends depend on the data, and its shape depends on them")
    dtype = node.example(0).dtype
    start, end, step = (node.example(index).item() for index in range(3))
    return _constant_run(node, torch.arange(start, end, step, dtype=dtype))


def _constant_run(node: Node, value: Tensor) -> Run:
    made = value.to(node.target.device)
    return lambda *_: made


def _unsqueeze(node: Node) -> Run:
    axes, rank = node.ints("axes", 1) or (), len(node.shape(0))
    places = {axis % (rank + len(axes)) for axis in axes}
    sizes = iter(node.shape(0))
    shape = [1 if place in places else next(sizes) for place in range(rank + len(axes))]
    return lambda x, *_: x.reshape(shape)


def _squeeze(node: Node) -> Run:
    axes, shape = node.ints("axes", 1), node.shape(0)
    if axes is None:
        axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    places = {axis % len(shape) for axis in axes}
    if any(shape[place] != 1 for place in places):
        raise node.refused("an axis to be removed is not of size 1")
    left = [size for axis, size in enumerate(shape) if axis not in places]
    return lambda x, *_: x.reshape(left)


def _resize(node: Node) -> Run:
    shape, mode = node.shape(0), node.value("mode", "nearest")
    where = node.value("coordinate_transformation_mode", "half_pixel")
    key = (mode, where)
    nearest_up = mode == "nearest" and node.value("nearest_mode", "") != "floor"
    special = {"antialias", "axes", "keep_aspect_ratio_policy"} & node.attributes.keys()
    if key not in _RESIZES or nearest_up or special or len(shape) not in _LINEAR:
        raise node.refused(f"mode {mode}, {where} is not covered")
    arguments: dict[str, Any] = {"mode": _LINEAR[len(shape)], **_RESIZES[key]}
    if node.has(3):
        sizes = node.constant_ints(3)
        arguments["size"], factors = sizes[2:], [s / o for s, o in zip(sizes, shape, strict=True)]
    else:
        if not node.constant[2]:
            raise node.refused("its scales depend on the data")
        factors = node.example(2).tolist()
        # Not the sizes, which are rounded: values lie where the scales say.
        arguments["scale_factor"] = factors[2:]
    if factors[:2] != [1, 1]:
        raise node.refused("resizing channels is not covered")
    return lambda x, *_: F.interpolate(x, **arguments)


SHAPES: Final[Mapping[str, Callable[[Node], Run]]] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Resize": _resize,
    "Shape": _shape,
    "Size": _size,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
