"""PyTorch's executor of ONNX graphs, operator by operator and on whole networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_builders as files
import pytest
import torch
from networks import NAMES, exporter_of, make_case
from onnx import TensorProto, helper, numpy_helper
from torch_cases import (
    CASES,
    ELSEWHERE,
    IMAGE,
    INTEGERS,
    MICROSOFT,
    ROWS,
    Case,
    build_case,
    ints,
)

from autocompress.device import PyTorchSettings
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.runtimes.pytorch import PyTorch
from autocompress.measure.runtimes.torch_graph import Target, compile_program, read_graph
from autocompress.measure.runtimes.torch_graph.operators import OPERATORS
from autocompress.measure.session import Placement

PLACEMENT = Placement(threads=1)
CPU = Target(torch.device("cpu"), torch.float32)
FP32, FP16, BF16 = (
    PyTorchSettings(name="pytorch", device="cpu", precision=precision)
    for precision in ("fp32", "fp16", "bf16")
)


def run(path: Path, inputs: list[np.ndarray], settings: PyTorchSettings = FP32):
    return PyTorch().load(path, settings, PLACEMENT).run(inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_onnx_runtime_computes(case: Case, tmp_path: Path) -> None:
    model, inputs = build_case(case)
    path = files.save(model, tmp_path, "one")
    for found, wanted in zip(run(path, inputs), files.reference(path, inputs), strict=True):
        assert found.shape == wanted.shape
        # Sums of integer products stand as floats, which hold them exactly.
        if case.operator not in ("MatMulInteger", "ConvInteger"):
            assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    assert {case.operator for case in CASES} | ELSEWHERE == {name for _, name in OPERATORS}


def test_root_mean_squares_are_normalized(tmp_path: Path) -> None:
    node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=1e-3)
    weight = files.draw(8, seed=5)
    path = files.save(
        files.build([node], {"x": [3, 8]}, ["y"], {"w": weight}, opset=23), tmp_path, "r"
    )
    wanted = ROWS / np.sqrt((ROWS**2).mean(1, keepdims=True) + 1e-3) * weight
    np.testing.assert_allclose(run(path, [ROWS])[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_networks_compute_what_onnx_runtime_computes(name: str, tmp_path: Path) -> None:
    case = make_case(name)
    path = files.save(exporter_of(name).export(case.network).graph.model, tmp_path, name)
    inputs = [x.numpy()[:5] for x in case.inputs]
    for found, wanted in zip(run(path, inputs), files.reference(path, inputs), strict=True):
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def shaped_graph() -> onnx.ModelProto:
    """A shape computed from the input's, as exporters write it, and constants of every kind."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Constant", [], ["zero"], value_int=0),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Gather", ["s", "zero"], ["b"]),
        helper.make_node("Unsqueeze", ["b", "at"], ["rows"]),
        helper.make_node("Constant", [], ["rest"], value=numpy_helper.from_array(ints(-1))),
        helper.make_node("Concat", ["rows", "one", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["r"]),
        helper.make_node("Constant", [], ["step"], value_int=1),
        helper.make_node("Range", ["zero", "b", "step"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "ends"], ["column"]),
        helper.make_node("ConstantOfShape", ["rows"], ["zeros"]),
        helper.make_node("Unsqueeze", ["zeros", "ends"], ["zero_column"]),
        helper.make_node("Add", ["r", "column"], ["a"]),
        helper.make_node("Add", ["a", "zero_column"], ["z"]),
        helper.make_node("Mul", ["z", "half"], ["y"]),
    ]
    constants = {"at": ints(0), "ends": ints(1, 2)}
    return files.build(nodes, {"x": [files.BATCH, 2, 3]}, ["y"], constants)


def test_shapes_are_computed_once(tmp_path: Path) -> None:
    path = files.save(shaped_graph(), tmp_path, "shaped")
    graph = read_graph(path, CPU)
    for batch in (1, 4):
        x = files.draw(batch, 2, 3)
        program = compile_program(graph, [torch.from_numpy(x)])
        steps = [step.node.key[1] for step in program.steps]
        assert steps == ["Reshape", "Add", "Add", "Mul"]
        (found,) = program.run([torch.from_numpy(x)])
        np.testing.assert_allclose(found.numpy(), files.reference(path, [x])[0], rtol=1e-6)


def test_weights_are_dequantized_once(tmp_path: Path) -> None:
    path = files.save(files.rounded_convolution(), tmp_path, "rounded")
    graph = read_graph(path, CPU)
    assert [node.key[1] for node in graph.nodes] == [
        "QuantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear",
    ]  # fmt: skip
    assert graph.constants["w"].dtype == torch.float32 and "k" not in graph.constants


@pytest.mark.parametrize("axis, blocks", [(0, (2, 6)), (1, (4, 3))])
def test_blocks_of_four_bits_are_dequantized(tmp_path: Path, axis: int, blocks) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (4, 6))
    scale = np.random.default_rng(1).uniform(0.1, 1, blocks).astype(np.float32)
    stored = helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "s"], ["w"], axis=axis, block_size=2),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = files.build(nodes, {"x": [3, 4]}, ["y"], {"s": scale})
    model.graph.initializer.append(stored)
    x = files.draw(3, 4)
    wanted = x @ (codes * np.repeat(scale, 2, axis))
    np.testing.assert_allclose(run(files.save(model, tmp_path, "b"), [x])[0], wanted, rtol=1e-4)


@pytest.mark.parametrize("zero_points", ["none", "packed", "float"])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_dequantized(tmp_path: Path, zero_points: str, bias: bool) -> None:
    rows, columns, block = 6, 40, 16
    draw = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "w": draw.integers(0, 256, (rows, 3, block // 2)).astype(np.uint8),
        "s": draw.uniform(0.1, 1, (rows, 3)).astype(np.float32),
    }
    inputs = ["x", "w", "s", "", "", ""]
    if zero_points != "none":
        inputs[3] = "z"
        packed = draw.integers(0, 256, (rows, 2)).astype(np.uint8)
        exact = draw.uniform(0, 15, (rows, 3)).astype(np.float32)
        constants["z"] = packed if zero_points == "packed" else exact
    if bias:
        inputs[5] = "b"
        constants["b"] = files.draw(rows)
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], domain=MICROSOFT,
        K=columns, N=rows, bits=4, block_size=block,
    )  # fmt: skip
    path = files.save(files.build([node], {"x": [3, columns]}, ["y"], constants), tmp_path, "n")
    x = files.draw(3, columns)
    np.testing.assert_allclose(
        run(path, [x])[0], files.reference(path, [x])[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("settings, tolerance", [(FP16, 0.01), (BF16, 0.05)])
def test_half_precision_is_near_and_comes_back_as_float32(tmp_path, settings, tolerance) -> None:
    path = files.save(files.convolutions(), tmp_path, "convolutions")
    x = files.draw(3, 3, 32, 32)
    (found,), (wanted,) = run(path, [x], settings), files.reference(path, [x])
    assert found.dtype == np.float32
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    # It really ran in the smaller type, not in float32.
    assert 1e-5 < error < tolerance


def test_what_float16_cannot_hold_stays_finite(tmp_path: Path) -> None:
    mask = np.array([0, np.finfo(np.float32).min, 0, -np.inf], np.float32)
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"]),
    ]
    path = files.save(files.build(nodes, {"x": [2, 4]}, ["y"], {"mask": mask}), tmp_path, "mask")
    (found,) = run(path, [np.zeros((2, 4), np.float32)], FP16)
    np.testing.assert_array_equal(found, [[0.5, 0, 0.5, 0]] * 2)


@pytest.mark.parametrize("settings", [FP16, BF16], ids=lambda s: s.precision)
def test_grids_are_exact_in_half_precision(tmp_path: Path, settings) -> None:
    path = files.save(files.rounded_convolution(), tmp_path, "rounded")
    graph = read_graph(path, Target(torch.device("cpu"), torch.float16))
    assert graph.constants["s_x"].dtype == torch.float32
    x = files.draw(2, 8, 24, 24)
    (found,), (wanted,) = run(path, [x], settings), files.reference(path, [x])
    assert np.abs(found - wanted).max() <= 3 * 0.05


REFUSED = {
    "unknown": (Case("Hardmax"), FP32, "Hardmax"),
    "domain": (Case("Relu", domain="org.example"), FP32, "org.example.Relu"),
    "integers in fp16": (INTEGERS[-1], FP16, "ConvInteger"),
    "integers in bf16": (INTEGERS[-2], BF16, "MatMulInteger"),
}


@pytest.mark.parametrize("case, settings, named", REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_is_refused_at_load(case, settings, named, tmp_path: Path) -> None:
    path = files.save(build_case(case)[0], tmp_path, "refused")
    with pytest.raises(MeasurementError) as caught:
        PyTorch().load(path, settings, PLACEMENT)
    assert named in str(caught.value)


def test_rounding_to_four_bits_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])]
    model = files.build(nodes, {"x": [3, 8]}, ["y"], {"s": np.float32(1)})
    model.graph.initializer.append(helper.make_tensor("z", TensorProto.INT4, [], [0]))
    with pytest.raises(MeasurementError, match="4 bits"):
        PyTorch().load(files.save(model, tmp_path, "four"), FP32, PLACEMENT)


DEPENDENT = {
    "shape": Case("Reshape", (ROWS, ints(2, 12))),
    "dilated average": Case("AveragePool", (IMAGE,), {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    "indices": Case("MaxPool", (IMAGE,), {"kernel_shape": [2, 2]}, outputs=2),
    "bicubic": Case("Resize", (IMAGE,), {"mode": "cubic"}, {1: None, 2: None, 3: ints(2, 4, 9, 9)}),
}


@pytest.mark.parametrize("case", DEPENDENT.values(), ids=DEPENDENT)
def test_what_cannot_be_compiled_names_the_node(case: Case, tmp_path: Path) -> None:
    model, inputs = build_case(case)
    session = PyTorch().load(files.save(model, tmp_path, "refused"), FP32, PLACEMENT)
    with pytest.raises(MeasurementError) as caught:
        session.run(inputs)
    assert f"{case.operator} node" in str(caught.value)


def test_dead_nodes_do_not_run(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Hardmax", ["x"], ["unused"]),
        helper.make_node("Neg", ["x"], ["y"]),
    ]
    path = files.save(files.build(nodes, {"x": [3, 8]}, ["y"]), tmp_path, "dead")
    np.testing.assert_array_equal(run(path, [ROWS])[0], -ROWS)


def test_a_constant_output_and_an_unread_input_are_allowed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Neg", ["c"], ["n"]),
        helper.make_node("Identity", ["n"], ["y"]),
    ]
    path = files.save(files.build(nodes, {"x": [3, 8]}, ["y"], {"c": ROWS}), tmp_path, "constant")
    np.testing.assert_array_equal(run(path, [ROWS])[0], -ROWS)


def test_threads_are_those_of_the_placement(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        path = files.save(files.two_inputs(), tmp_path, "two")
        PyTorch().load(path, FP32, Placement(threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_cuda_graphs_are_refused_on_the_cpu() -> None:
    with pytest.raises(DeviceError, match="CUDA graphs"):
        PyTorch().check_available(PyTorchSettings(name="pytorch", device="cpu", cuda_graphs=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="GPU"):
        PyTorch().check_available(PyTorchSettings(name="pytorch"))
