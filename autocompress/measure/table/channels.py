"""A block's channels, and the same block with other numbers of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import onnx

from autocompress.errors import MeasurementError
from autocompress.measure.table.block import READER, Block, BlockNode, Constant, TensorType
from autocompress.measure.table.scaffold import finished_model
from autocompress.measure.table.shapes import tensor_types

# Instead of the channels' numbers, in the block that stands for a whole family.
_ANY = -1
_WEIGHT = 1
_IMAGE_RANK = 4


@final
@dataclass(frozen=True)
class Channels:
    """How many channels a block reads and how many it writes."""

    inputs: int
    outputs: int


def channels_of(block: Block) -> Channels | None:
    """A block's channels; None for operators whose weights are laid out in another way.

    A block without weights writes as many as it reads.
    """
    lead = block.lead
    weight = _weight(block)
    if weight is None:
        reads = sorted(block.main_inputs)
        if len(lead.inputs) > _WEIGHT and lead.operator in ("Conv", "Gemm", "MatMulNBits"):
            return None
        if not reads or not block.inputs[reads[0]].shape:
            return None
        kind = block.inputs[reads[0]]
        count = kind.shape[channel_axis(len(kind.shape))]
        return Channels(count, count)
    out_axis = _weight_axis(block)
    shape = weight.type.shape
    if out_axis is None:
        return None
    return Channels(shape[1 - out_axis] * _groups(lead), shape[out_axis])


def family_of(block: Block) -> str:
    """Equal for blocks that differ in their channels only; else the block's own key."""
    found = channels_of(block)
    return block.key if found is None else _with(block, found, Channels(_ANY, _ANY)).key


def with_channels(block: Block, channels: Channels) -> Block:
    """The same block with other numbers of channels.

    Args:
        channels: both above zero; equal for blocks without weights and for depthwise convolutions.

    Raises:
        MeasurementError: the block cannot have so many.
    """
    found = channels_of(block)
    if found is None or not _possible(block, found, channels):
        raise _refusal(block, channels)
    changed = _with(block, found, channels)
    model = finished_model(
        [_proto(node) for node in changed.nodes],
        [_constant_proto(f"c{i}", constant) for i, constant in enumerate(changed.constants)],
        changed.inputs,
        changed.output_types,
        changed.opsets,
    )
    try:
        types = tensor_types(onnx.ModelProto.FromString(model), 1)
    except onnx.shape_inference.InferenceError as cause:
        raise _refusal(block, channels) from cause
    if any(
        types.get(name) != kind
        for name, kind in zip(changed.outputs, changed.output_types, strict=True)
    ):
        raise _refusal(block, channels)
    return changed


def _possible(block: Block, old: Channels, new: Channels) -> bool:
    if min(new.inputs, new.outputs) < 1:
        return False
    groups = _groups(block.lead)
    if _weight(block) is None or groups == old.inputs > 1:
        # Every channel is on its own.
        return new.outputs * old.inputs == new.inputs * old.outputs
    return new.inputs % groups == new.outputs % groups == 0


def _refusal(block: Block, channels: Channels) -> MeasurementError:
    return MeasurementError(
        "A block cannot have that many channels.",
        given=f"{block.lead.operator} with {channels.inputs} -> {channels.outputs}",
        allowed="positive numbers that fit its groups and reshapes",
    )


def _proto(node: BlockNode) -> onnx.NodeProto:
    proto = onnx.helper.make_node(
        node.operator, list(node.inputs), list(node.outputs), domain=node.domain
    )
    proto.attribute.extend(node.protos())
    return proto


def _constant_proto(name: str, constant: Constant) -> onnx.TensorProto:
    """The constant with its values, where it has any; shapes are all that the others matter for."""
    kind = constant.type
    if constant.values is None:
        return onnx.TensorProto(name=name, data_type=kind.element, dims=kind.shape)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.element)
    values = np.resize(np.asarray(constant.values).astype(dtype), kind.shape)
    return onnx.numpy_helper.from_array(values, name)


def _weight(block: Block) -> Constant | None:
    """The constant that the lead multiplies with, its dequantization looked through."""
    lead = block.lead
    if lead.operator not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    name, makers = lead.inputs[_WEIGHT], block.makers()
    if name in makers and makers[name].operator == READER:
        name = makers[name].inputs[0]
    return block.constant(name)


def _weight_axis(block: Block) -> int | None:
    """Which axis of the weight the output channels are on."""
    lead, weight = block.lead, _weight(block)
    if lead.operator == "Conv":
        return 0
    if lead.operator == "Gemm":
        return 0 if dict(lead.attributes).get("transB") == "1" else 1
    if lead.operator == "MatMul" and weight is not None and len(weight.type.shape) == 2:
        return 1
    return None


def _groups(lead: BlockNode) -> int:
    return int(json.loads(dict(lead.attributes).get("group", "1")))


def channel_axis(rank: int) -> int:
    """The axis of the channels: the second of images, else the last."""
    return 1 if rank >= _IMAGE_RANK else rank - 1


def _with(block: Block, old: Channels, new: Channels) -> Block:
    """The block with other sizes wherever a channel count stands; shapes are not checked."""
    swap = _Swap(block, old, new)
    return replace(
        block,
        inputs=tuple(swap.tensor(f"i{i}", kind) for i, kind in enumerate(block.inputs)),
        constants=tuple(swap.constant(f"c{i}", c) for i, c in enumerate(block.constants)),
        nodes=tuple(swap.node(node) for node in block.nodes),
        output_types=tuple(
            swap.tensor(name, kind)
            for name, kind in zip(block.outputs, block.output_types, strict=True)
        ),
    )


@final
class _Swap:
    """Puts new channel counts in the place of old ones, by what each value is to the lead."""

    def __init__(self, block: Block, old: Channels, new: Channels) -> None:
        self._old, self._new = old, new
        self._lead = block.lead
        makers = block.makers()
        self._weight, self._weight_grid = "", set[str]()
        self._upstream = set(block.upstream)
        self._out_axis = _weight_axis(block)
        if _weight(block) is not None:
            self._weight = self._lead.inputs[_WEIGHT]
            maker = makers.get(self._weight)
            if maker is not None:
                self._weight_grid = set(maker.inputs[1:])
                self._weight = maker.inputs[0]
            for name in self._lead.inputs[_WEIGHT + 1 :]:
                self._upstream -= {name, *(makers[name].inputs if name in makers else ())}
        self._shapes = {n.inputs[1] for n in block.nodes if n.operator == "Reshape"}

    def tensor(self, name: str, kind: TensorType) -> TensorType:
        if not kind.shape:
            return kind
        axis = channel_axis(len(kind.shape))
        before, after = self._counts(name)
        return replace(kind, shape=_put(kind.shape, axis, before, after))

    def constant(self, name: str, constant: Constant) -> Constant:
        if name == self._weight and self._out_axis is not None:
            shape, axis = constant.type.shape, self._out_axis
            shape = _put(shape, axis, self._old.outputs, self._new.outputs)
            groups = _groups(self._lead)
            if groups == 1 or groups != self._old.inputs:
                old, new = self._old.inputs // groups, self._new.inputs // groups
                shape = _put(shape, 1 - axis, old, new)
            return replace(constant, type=replace(constant.type, shape=shape))
        if name in self._shapes and constant.values is not None:
            old, new = self._old.outputs, self._new.outputs
            values = tuple(_scaled(int(v), old, new) for v in constant.values)
            return replace(constant, values=values)
        if constant.type.element == onnx.TensorProto.INT64:
            # Axes and the like: as many as there are, whatever the channels.
            return constant
        return replace(constant, type=self.tensor(name, constant.type))

    def node(self, node: BlockNode) -> BlockNode:
        if node is not self._lead or _groups(node) == 1 or _groups(node) != self._old.inputs:
            return node
        attributes = dict(node.attributes) | {"group": str(self._new.inputs)}
        return replace(node, attributes=tuple(sorted(attributes.items())))

    def _counts(self, name: str) -> tuple[int, int]:
        if name in self._upstream and name not in self._weight_grid:
            return self._old.inputs, self._new.inputs
        return self._old.outputs, self._new.outputs


def _put(shape: tuple[int, ...], axis: int, old: int, new: int) -> tuple[int, ...]:
    return tuple(_scaled(size, old, new) if i == axis else size for i, size in enumerate(shape))


def _scaled(size: int, old: int, new: int) -> int:
    """A size that is a multiple of the old count as the same multiple of the new one."""
    return size // old * new if size >= old and size % old == 0 and old > 1 else size
