from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from residual_models import FLOAT, Builder, residual

from autocompress.errors import MeasurementError
from autocompress.measure.table.block import READER, TensorType
from autocompress.measure.table.cut import Cut, cut_model


def operators(cut: Cut) -> list[list[str]]:
    return [[n.operator for n in block.nodes if n.operator != READER] for block in cut.blocks]


def test_a_float_network_is_cut_before_heavy_operators() -> None:
    cut = cut_model(residual(), 1)
    assert operators(cut) == [
        ["Conv", "Relu"], ["Conv", "Relu"], ["Conv", "Add", "Relu"], ["ReduceMean", "Reshape"],
        ["Gemm"],
    ]  # fmt: skip
    assert [p.layer for p in cut.placed] == ["stem", "conv1", "conv2", "pooled", "head"]


def test_blocks_of_an_int8_network_meet_at_bytes() -> None:
    cut = cut_model(residual(int8=True), 1)
    assert operators(cut)[:3] == [
        ["QuantizeLinear"], ["Conv", "Relu", "QuantizeLinear"], ["Conv", "Relu", "QuantizeLinear"],
    ]  # fmt: skip
    inner = [edge for edge in cut.edges if edge.consumer < 5]
    kinds = [cut.blocks[e.producer].output_types[e.output].element for e in inner]
    assert kinds and set(kinds) == {TensorProto.UINT8}
    # The skip is read twice, and so dequantized in both blocks.
    assert [p.layer for p in cut.placed][1:4] == ["stem", "conv1", "conv2"]


@pytest.mark.parametrize("int8", [False, True])
def test_no_node_is_left_out_and_only_readers_and_constants_are_copied(int8: bool) -> None:
    model = residual(int8=int8)
    placed = Counter(n.operator for block in cut_model(model, 1).blocks for n in block.nodes)
    written = Counter(n.op_type for n in model.graph.node)
    assert placed.keys() == written.keys()
    for operator, count in written.items():
        assert placed[operator] == count or (operator == READER and placed[operator] > count)


@pytest.mark.parametrize("int8", [False, True])
def test_edges_join_tensors_of_one_type_and_run_forward(int8: bool) -> None:
    cut = cut_model(residual(int8=int8), 3)
    assert cut.inputs == (TensorType(FLOAT, (3, 1, 8, 8)),)
    assert cut.outputs == (TensorType(FLOAT, (3, 10)),)
    read = {(e.consumer, e.input) for e in cut.edges}
    for edge in cut.edges:
        assert edge.producer < edge.consumer
        made = cut.blocks[edge.producer].output_types[edge.output]
        assert made == cut.blocks[edge.consumer].inputs[edge.input]
    for index, placed in enumerate(cut.placed):
        for i, name in enumerate(placed.inputs):
            assert (index, i) in read or name == "x"


def test_a_shape_that_is_computed_becomes_a_constant() -> None:
    b = Builder()
    shape = b.add("Shape", ["x"], "shape")
    batch = b.add("Gather", [shape, b.keep("zero", [0], np.int64)], "batch")
    target = b.add("Concat", [batch, b.keep("flat", [-1], np.int64)], "target", axis=0)
    read = b.add("Reshape", ["x", target], "read")
    b.add("MatMul", [read, b.keep("w", np.ones((8, 4)))], "y")
    cut = cut_model(b.model(["batch", 2, 4], ["batch", 4]), 5)
    assert operators(cut) == [["Reshape"], ["MatMul"]]
    assert [c.values for c in cut.blocks[0].constants] == [(5, -1)]


def test_zero_points_count_by_what_kernels_make_of_them() -> None:
    def key(zero: int) -> str:
        b = Builder()
        b.keep("scale", 0.1)
        b.keep("zero", zero, np.uint8)
        made = b.add("QuantizeLinear", ["x", "scale", "zero"], "q")
        b.add("DequantizeLinear", [made, "scale", "zero"], "y")
        return cut_model(b.model(["batch", 4], ["batch", 4]), 1).blocks[0].key

    assert key(100) == key(128) != key(0)


def test_control_flow_and_open_axes_are_refused() -> None:
    value = helper.make_tensor_value_info
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "branch", [], [value("z", FLOAT, [1])]
    )
    node = helper.make_node("If", ["go"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [value("x", FLOAT, [1]), value("go", TensorProto.BOOL, [1])]
    graph = helper.make_graph([node], "test", inputs, [value("y", FLOAT, [1])])
    with pytest.raises(MeasurementError, match="control flow"):
        cut_model(helper.make_model(graph), 1)
    b = Builder()
    b.add("Relu", ["x"], "y")
    with pytest.raises(MeasurementError, match="unknown size"):
        cut_model(b.model(["batch", "length"], ["batch", "length"]), 1)


def test_microsofts_operators_have_shapes_too() -> None:
    """Four-bit products and 16-bit pairs, which ONNX itself does not know."""
    b = Builder()
    b.keep("scale", 0.1)
    b.keep("zero", 0, np.uint16)
    grid = ["scale", "zero"]
    made = b.add("QuantizeLinear", ["x", *grid], "q", domain="com.microsoft")
    read = b.add("DequantizeLinear", [made, *grid], "dq", domain="com.microsoft")
    codes = b.keep("codes", np.zeros((8, 1, 16)), np.uint8)
    scales = b.keep("scales", np.ones(8))
    b.add(
        "MatMulNBits", [read, codes, scales], "y", domain="com.microsoft", K=32, N=8, bits=4,
        block_size=32,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        b.nodes, "test", [value("x", FLOAT, ["batch", 32])], [value("y", FLOAT, ["batch", 8])],
        b.constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    cut = cut_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), 2)
    assert operators(cut) == [["QuantizeLinear"], ["MatMulNBits"]]
    assert cut.blocks[0].output_types == (TensorType(TensorProto.UINT16, (2, 32)),)
    assert cut.blocks[1].output_types == (TensorType(FLOAT, (2, 8)),)
    assert onnx.TensorProto.UINT8 in [c.type.element for c in cut.blocks[1].constants]
