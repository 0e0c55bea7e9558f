"""Nodes for the tests of PyTorch's executor of ONNX graphs, one per way of using an operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_builders as files
from onnx import TensorProto, helper

MICROSOFT = "com.microsoft"
IMAGE = files.draw(2, 4, 7, 9)
ROWS = files.draw(3, 8, seed=1)
COUNTS = np.arange(-6, 18).reshape(2, 3, 4)
POSITIVE = np.abs(ROWS) + 0.5


@dataclass(frozen=True)
class Case:
    """A node with inputs; constants may stand between them, `None` for one left out."""

    operator: str
    inputs: tuple[Any, ...] = (ROWS,)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[int, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    domain: str = ""

    def __str__(self) -> str:
        return f"{self.operator}-{'-'.join(self.attributes)}-{self.opset}"


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def plain(*operators: str, inputs: tuple[Any, ...] = (ROWS,)) -> list[Case]:
    return [Case(operator, inputs) for operator in operators]


CONVOLUTIONS = [
    Case("Conv", (IMAGE,), {"pads": [1, 0, 2, 1]}, {1: files.draw(6, 4, 3, 3), 2: files.draw(6)}),
    Case("Conv", (IMAGE,), {"group": 4, "dilations": [2, 1]}, {1: files.draw(8, 1, 3, 3)}),
    Case(
        "Conv", (IMAGE,), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {1: files.draw(6, 4, 2, 4)}
    ),
    Case(
        "Conv", (IMAGE,), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}, {1: files.draw(6, 4, 2, 4)}
    ),
    Case("Conv", (files.draw(2, 3, 11),), {"strides": [2]}, {1: files.draw(5, 3, 4)}),
    Case("Conv", (files.draw(1, 2, 5, 6, 7),), {}, {1: files.draw(3, 2, 2, 3, 2)}),
    Case(
        "ConvTranspose",
        (IMAGE,),
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {1: files.draw(4, 3, 3, 3)},
    ),
    Case(
        "ConvTranspose",
        (IMAGE,),
        {"strides": [2, 3], "pads": [1, 0, 0, 2], "output_padding": [1, 1], "group": 2},
        {1: files.draw(4, 3, 3, 3), 2: files.draw(6)},
    ),
    Case("MaxPool", (IMAGE,), {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", (IMAGE,), {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1]}),
    Case("MaxPool", (IMAGE,), {"kernel_shape": [2, 2], "dilations": [2, 3]}),
    Case("AveragePool", (IMAGE,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", (IMAGE,), {"kernel_shape": [3, 3], "pads": [0, 1, 2, 0]}),
    Case(
        "AveragePool",
        (IMAGE,),
        {"kernel_shape": [2, 3], "pads": [0, 1, 1, 0], "count_include_pad": 1},
    ),
    *plain("GlobalAveragePool", "GlobalMaxPool", inputs=(IMAGE,)),
]
PRODUCTS = [
    Case("MatMul", (files.draw(2, 3, 4, 5), files.draw(5, 6))),
    Case("Gemm", (ROWS,), {"transB": 1}, {1: files.draw(5, 8), 2: files.draw(5)}),
    Case("Gemm", (ROWS.T,), {"transA": 1, "alpha": 0.5}, {1: files.draw(8, 5)}),
    Case("Gemm", (ROWS,), {"beta": 2.0}, {1: files.draw(8, 5), 2: files.draw(3, 1)}),
    Case("Gemm", (ROWS,), {}, {1: files.draw(8, 5), 2: np.float32(3)}),
    Case("Einsum", (files.draw(2, 3, 4), files.draw(2, 5, 4)), {"equation": "bij,bkj->bik"}),
    Case(
        "BatchNormalization",
        (IMAGE,),
        {"epsilon": 1e-3},
        dict(enumerate(np.abs(files.draw(4, 4)), 1)),
    ),
    Case("InstanceNormalization", (IMAGE,), {}, {1: files.draw(4), 2: files.draw(4, seed=1)}),
    Case(
        "GroupNormalization",
        (IMAGE,),
        {"num_groups": 2},
        {1: files.draw(4), 2: files.draw(4, seed=1)},
    ),
    Case(
        "GroupNormalization",
        (IMAGE,),
        {"num_groups": 2},
        {1: files.draw(2), 2: files.draw(2)},
        opset=18,
    ),
    Case(
        "LayerNormalization",
        (IMAGE,),
        {"axis": 2},
        {1: files.draw(7, 9), 2: files.draw(7, 9, seed=1)},
    ),
    Case("LayerNormalization", (IMAGE,), {}, {1: files.draw(9)}),
    Case("LayerNormalization", (IMAGE,), {"axis": -2}, {1: files.draw(7, 1), 2: files.draw(9)}),
    Case("Softmax", (IMAGE,), {"axis": 1}),
    Case("Softmax", (IMAGE,), opset=11),
    Case("LogSoftmax", (ROWS,)),
]
ELEMENTWISE = [
    *plain(
        "Abs",
        "Ceil",
        "Cos",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "IsNaN",
        "Identity",
        "Mish",
        "Neg",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Tanh",
        "Elu",
        "LeakyRelu",
        "Dropout",
    ),
    *plain("Log", "Reciprocal", "Sqrt", inputs=(POSITIVE,)),
    *plain(
        "Add",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Mul",
        "Sub",
        "PRelu",
        inputs=(ROWS, files.draw(8, seed=3)),
    ),
    *plain(
        "Max", "Mean", "Min", "Sum", inputs=(ROWS, files.draw(8, seed=3), files.draw(3, 1, seed=4))
    ),
    *plain("And", "Or", "Xor", inputs=(ROWS > 0, ROWS < 0.5)),
    *plain("Not", inputs=(ROWS > 0,)),
    *plain("Div", "Mod", inputs=(COUNTS, COUNTS[:, ::-1] * 2 + 1)),
    *plain("BitwiseAnd", "BitwiseOr", "BitwiseXor", inputs=(COUNTS, COUNTS[::-1])),
    *plain("BitwiseNot", inputs=(COUNTS,)),
    Case("Mod", (ROWS, files.draw(8, seed=3)), {"fmod": 1}),
    Case("Pow", (POSITIVE,), {}, {1: np.float32(2.5)}),
    Case("Pow", (ROWS,), {}, {1: np.int64(3)}),
    Case("Gelu", attributes={"approximate": "tanh"}),
    Case("Gelu", domain=MICROSOFT),
    Case("HardSigmoid", attributes={"alpha": 1 / 6, "beta": 0.5}),
    Case("Clip", constants={1: np.float32(-0.2), 2: np.float32(0.4)}),
    Case("Clip", constants={1: None, 2: np.float32(0.4)}),
    Case("Clip", attributes={"min": -0.1, "max": 0.3}, opset=10),
    Case("Cast", (ROWS * 9,), {"to": TensorProto.INT32}),
    Case("Cast", (COUNTS,), {"to": TensorProto.FLOAT}),
    Case("Cast", (ROWS,), {"to": TensorProto.BOOL}),
    Case("CastLike", (ROWS * 9, COUNTS)),
    Case("BitShift", (COUNTS.astype(np.uint8),), {"direction": "RIGHT"}, {1: np.uint8(2)}),
    Case("BitShift", (COUNTS.astype(np.uint8),), {"direction": "LEFT"}, {1: np.uint8(3)}),
    Case("Where", (ROWS > 0, ROWS, files.draw(8, seed=3))),
]
REDUCTIONS = [
    *(
        Case(
            f"Reduce{kind}",
            (POSITIVE.reshape(3, 2, 4),),
            {"keepdims": keep},
            {1: ints(-1, 0)},
            opset=18,
        )
        for kind in (
            "Mean",
            "Sum",
            "Max",
            "Min",
            "Prod",
            "L1",
            "L2",
            "LogSum",
            "LogSumExp",
            "SumSquare",
        )
        for keep in (0, 1)
    ),
    Case("ReduceMean", (IMAGE,), {"axes": [2, 3], "keepdims": 0}, opset=13),
    Case("ReduceMax", (IMAGE,)),
    Case("ReduceSum", (COUNTS,), {"noop_with_empty_axes": 1}),
    Case("ArgMax", (IMAGE,), {"axis": 1, "keepdims": 0}),
    Case("ArgMin", (IMAGE,), {"axis": -1}),
    Case("TopK", (ROWS,), {"largest": 0}, {1: ints(3)}, outputs=2),
    Case("CumSum", (ROWS,), {}, {1: np.array(1)}),
]
LAYOUT = [
    Case("Reshape", (IMAGE,), {}, {1: ints(0, -1, 9)}),
    Case("Flatten", (IMAGE,), {"axis": -2}),
    Case("Flatten", (IMAGE,), {"axis": 0}),
    Case("Transpose", (IMAGE,), {"perm": [0, 2, 3, 1]}),
    Case("Transpose", (IMAGE,)),
    Case("Concat", (IMAGE, IMAGE[:, :1]), {"axis": -3}),
    Case("Split", (IMAGE,), {"axis": 1}, {1: ints(1, 3)}, outputs=2),
    Case("Split", (IMAGE,), {"axis": 3, "num_outputs": 2}, outputs=2),
    Case("Split", (IMAGE,), {"axis": 1}, outputs=2, opset=13),
    Case(
        "Slice",
        (IMAGE,),
        {},
        {1: ints(1, -100), 2: ints(2**63 - 1, -2), 3: ints(3, 1), 4: ints(3, 1)},
    ),
    Case("Slice", (IMAGE,), {}, {1: ints(-1), 2: ints(-(2**63)), 3: ints(-1), 4: ints(-2)}),
    Case("Slice", (IMAGE,), {"starts": [1], "ends": [3], "axes": [1]}, opset=9),
    Case("Gather", (IMAGE,), {"axis": 1}, {1: np.array([[0, -1], [2, 2]])}),
    Case("Gather", (IMAGE,), {"axis": 2}, {1: np.array(-2)}),
    Case("Gather", (ROWS, np.array([[-1, 0, 2]]))),
    Case("GatherElements", (ROWS, np.array([[0, -1], [3, 2]])), {"axis": 1}),
    Case("GatherND", (ROWS, np.array([[[0, -1], [1, 2]]]))),
    Case("GatherND", (IMAGE, np.array([[0, 1], [-1, 0]]))),
    Case("Unsqueeze", (ROWS,), {}, {1: ints(-1, 0)}),
    Case("Unsqueeze", (ROWS,), {"axes": [1]}, opset=11),
    Case("Squeeze", (ROWS[:, None, :, None],), {}, {1: ints(-1)}),
    Case("Squeeze", (ROWS[:, None],)),
    Case("Expand", (ROWS[:, None],), {}, {1: ints(2, 1, 4, 1)}),
    Case("Tile", (ROWS,), {}, {1: ints(2, 3)}),
    Case("Trilu", (IMAGE,), {"upper": 0}, {1: np.array(-1)}),
    Case("Pad", (IMAGE,), {}, {1: ints(0, 1, 0, 2, 1, 0, 3, 0), 2: np.float32(7)}),
    Case("Pad", (IMAGE,), {"mode": "reflect"}, {1: ints(0, 0, 1, 2, 0, 0, 2, 1)}),
    Case("Pad", (IMAGE,), {"mode": "edge"}, {1: ints(1, 2, 2, 1), 2: None, 3: ints(3, 2)}),
    Case("Pad", (IMAGE,), {"pads": [0, 0, 1, 1, 0, 0, 1, 1]}, opset=10),
    Case("DepthToSpace", (IMAGE,), {"blocksize": 2}),
    Case("DepthToSpace", (IMAGE,), {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", (IMAGE[:, :, :6, :8],), {"blocksize": 2}),
    Case("Shape", (IMAGE,), {"start": 1, "end": -1}),
    Case("Size", (IMAGE,)),
    Case(
        "Resize",
        (IMAGE,),
        {"mode": "linear"},
        {1: None, 2: np.array([1, 1, 2, 1.5], np.float32)},
    ),
    Case(
        "Resize",
        (IMAGE,),
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
        {1: None, 2: None, 3: ints(2, 4, 14, 27)},
    ),
]
PER_CHANNEL = {1: np.array([0.1, 0.2, 0.3, 0.4], np.float32), 2: np.array([1, 2, 3, 4], np.int8)}
BYTES = (COUNTS + 100).astype(np.uint8)
INTEGERS = [
    Case("QuantizeLinear", (ROWS,), {}, {1: np.float32(0.02), 2: np.uint8(120)}),
    Case("QuantizeLinear", (IMAGE,), {"axis": 1}, PER_CHANNEL),
    Case("QuantizeLinear", (ROWS,), {}, {1: np.float32(0.001), 2: np.int16(5)}),
    Case(
        "QuantizeLinear",
        (np.array([[-1.5, -0.5, 0.5, 1.5, 2.5, 300]], np.float32),),
        {},
        {1: np.float32(1)},
    ),
    Case("DequantizeLinear", (COUNTS.astype(np.int8).reshape(2, 4, 3),), {"axis": 1}, PER_CHANNEL),
    Case("DynamicQuantizeLinear", (ROWS,), outputs=3),
    Case("MatMulInteger", (BYTES,), {}, {1: COUNTS.astype(np.int8).reshape(4, 6), 2: np.uint8(3)}),
    Case(
        "MatMulInteger",
        (BYTES,),
        {},
        {1: COUNTS.astype(np.int8).reshape(4, 6), 2: np.uint8(3), 3: np.arange(6, dtype=np.int8)},
    ),
    Case(
        "ConvInteger",
        ((np.abs(IMAGE) * 50).astype(np.uint8),),
        {"pads": [1, 1, 1, 1]},
        {1: (files.draw(5, 4, 3, 3) * 40).astype(np.int8), 2: np.uint8(9)},
    ),
]
CASES = [*CONVOLUTIONS, *PRODUCTS, *ELEMENTWISE, *REDUCTIONS, *LAYOUT, *INTEGERS]
# Made by the nodes around them in every graph, or run in tests of their own.
ELSEWHERE = {"Constant", "ConstantOfShape", "Range", "MatMulNBits", "RMSNormalization"}


def build_case(case: Case) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    feed, names, constants = [], [], {}
    dynamic = iter(case.inputs)
    for place in range(len(case.inputs) + len(case.constants)):
        if place not in case.constants:
            names.append(f"i{place}")
            feed.append((names[-1], np.ascontiguousarray(next(dynamic))))
        elif case.constants[place] is None:
            names.append("")
        else:
            names.append(f"c{place}")
            constants[names[-1]] = case.constants[place]
    outputs = [f"o{place}" for place in range(case.outputs)]
    node = helper.make_node(
        case.operator, names, outputs, "node", domain=case.domain, **case.attributes
    )
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feed}
    shapes = {name: array.shape for name, array in feed}
    model = files.build([node], shapes, outputs, constants, opset=case.opset, types=types)
    return model, [array for _, array in feed]
