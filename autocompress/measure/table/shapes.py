"""Types and shapes of every tensor of an ONNX model at one batch size."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper, shape_inference

from autocompress.errors import MeasurementError
from autocompress.measure.table.block import TensorType
from autocompress.onnx_sizes import noted_sizes

_MICROSOFT = "com.microsoft"


def tensor_types(model: onnx.ModelProto, batch_size: int) -> dict[str, TensorType]:
    """The type of every tensor whose type can be inferred, by name; constants included.

    Args:
        model: is not changed.
        batch_size: takes the place of every input's first axis; other open axes have the sizes that
            the model notes.

    Raises:
        MeasurementError: an input has another axis of unknown size, which the file does not note.
    """
    sizes = noted_sizes(model)
    stripped = _without_values(model)
    graph = stripped.graph
    constants = {i.name for i in graph.initializer}
    for entry in graph.input:
        if entry.name not in constants:
            _fix_sizes(entry, batch_size, sizes)
    for entry in graph.output:
        entry.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    _stand_in(stripped)
    inferred = shape_inference.infer_shapes(stripped, data_prop=True).graph
    found = {i.name: TensorType(i.data_type, tuple(i.dims)) for i in graph.initializer}
    for entry in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = entry.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shape = tuple(d.dim_value for d in tensor.shape.dim)
            found.setdefault(entry.name, TensorType(tensor.elem_type, shape))
    return found


def _without_values(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which only small constants, such as shapes, keep their values."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for initializer in copy.graph.initializer:
        if initializer.data_type not in (TensorProto.INT64, TensorProto.INT32):
            dims, element, name = list(initializer.dims), initializer.data_type, initializer.name
            initializer.Clear()
            initializer.dims.extend(dims)
            initializer.data_type, initializer.name = element, name
    return copy


def _fix_sizes(entry: onnx.ValueInfoProto, batch_size: int, sizes: Mapping[str, int]) -> None:
    dims = entry.type.tensor_type.shape.dim
    for axis, dim in enumerate(dims):
        size = batch_size if axis == 0 else sizes.get(dim.dim_param)
        if size is not None:
            dim.Clear()
            dim.dim_value = size
    unknown = [d.dim_param or "?" for d in dims if not d.HasField("dim_value")]
    if unknown:
        raise MeasurementError(
            "An input of the model has an axis of unknown size.",
            given=f"{entry.name}: {', '.join(unknown)}",
            allowed="the first axis, the batch, and axes whose sizes the file notes may be open",
            advice="export the model with fixed sizes, or name the axis in Workload(dynamic_axes)",
        )


def _stand_in(model: onnx.ModelProto) -> None:
    """Put operators that ONNX can infer in the place of Microsoft's that have the same shapes."""
    graph = model.graph
    elements = {i.name: i.data_type for i in graph.initializer}
    for node in graph.node:
        if node.domain != _MICROSOFT:
            continue
        if node.op_type == "QuantizeLinear":
            zero = node.input[2] if len(node.input) > 2 else ""
            _become_cast(node, elements.get(zero, TensorProto.UINT8))
        elif node.op_type == "DequantizeLinear":
            _become_cast(node, elements.get(node.input[1], TensorProto.FLOAT))
        elif node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            weight = TensorProto(
                name=f"{node.output[0]}_stand_in",
                data_type=TensorProto.FLOAT,
                dims=[sizes["K"], sizes["N"]],
            )
            graph.initializer.append(weight)
            node.CopyFrom(helper.make_node("MatMul", [node.input[0], weight.name], node.output))


def _become_cast(node: onnx.NodeProto, element: int) -> None:
    node.CopyFrom(helper.make_node("Cast", [node.input[0]], node.output, to=element))


def type_of(types: Mapping[str, TensorType], name: str) -> TensorType:
    """A tensor's type.

    Raises:
        MeasurementError: it could not be inferred.
    """
    if name not in types:
        raise MeasurementError(
            "The shape of a tensor cannot be inferred, so its layer cannot be timed alone.",
            given=name,
            allowed="ONNX's own operators with fixed shapes, and Microsoft's quantized ones",
        )
    return types[name]
