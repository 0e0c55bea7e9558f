from __future__ import annotations

import numpy as np
import onnx
import pytest
from explain_models import CHANNELS, Rounded, chain, model_of, weight
from onnx import helper

from autocompress.measure.explain.graph import graph_of
from autocompress.measure.explain.layers import Layer, layer_name, layers_of


def only_layer(model: onnx.ModelProto) -> Layer:
    (layer,) = layers_of(graph_of(model))
    return layer


def test_layers_are_called_after_their_weights_and_know_their_sizes() -> None:
    first, second = layers_of(graph_of(chain((16, 24, 40))))
    assert (first.name, first.in_channels, first.out_channels) == ("l0", 16, 24)
    assert second.label == "Conv 3x3, 24 to 40"
    assert second.weights == 24 * 40 * 9
    assert second.scheme == "float" and not second.quantized


@pytest.mark.parametrize(
    ("initializer", "name"),
    [
        ("stages.0.conv1.weight", "stages.0.conv1"),
        ("stages.0.conv1.weight_quantized", "stages.0.conv1"),
        ("onnx::MatMul_12", "node"),
        (".weight", "node"),
    ],
)
def test_a_weight_that_is_not_named_as_by_pytorch_leaves_the_nodes_name(
    initializer: str, name: str
) -> None:
    assert layer_name(initializer, "node") == name


def test_the_rounding_at_both_ends_of_a_layer_is_told() -> None:
    layer = only_layer(Rounded(input_type=np.int8, output_type=np.uint8).model())
    assert layer.scheme == "static"
    assert layer.weight_nodes == ("l_dq",)
    assert (layer.rounding.input_type, layer.rounding.output_type) == ("int8", "uint8")
    assert layer.rounding.nodes == ("x_q", "x_dq", "z_q")
    assert not layer.rounding.input_shared


def test_a_rounded_input_that_something_else_reads_too_is_shared() -> None:
    ends = only_layer(Rounded(shared=True).model()).rounding
    assert ends.input_shared and not ends.output_shared


@pytest.mark.parametrize(
    ("between", "zero_point", "absorbed"),
    [("Relu", 0, True), ("Relu", 3, False), ("Sigmoid", 0, False), ("", 128, True)],
)
def test_an_activation_is_absorbed_where_the_rounding_cuts_as_much(
    between: str, zero_point: int, absorbed: bool
) -> None:
    ends = only_layer(Rounded(between=between, zero_point=zero_point).model()).rounding
    assert ends.absorbed is absorbed
    assert ends.after == ((between,) if between else ())


@pytest.mark.parametrize(("low", "high", "absorbed"), [(0, 12.75, True), (0, 6, False)])
def test_a_clip_is_absorbed_where_the_rounding_ends_no_later(
    low: float, high: float, absorbed: bool
) -> None:
    model = Rounded().model()
    # The rounding's steps of 0.05 end at 255 * 0.05 = 12.75.
    clip = helper.make_node("Clip", ["c", "low", "high"], ["b"], "clip")
    for name, value in (("low", low), ("high", high)):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(value, np.float32), name)
        )
    rounding = next(n for n in model.graph.node if n.name == "z_q")
    rounding.input[0] = "b"
    model.graph.node.insert(4, clip)
    assert only_layer(model).rounding.absorbed is absorbed


def test_an_output_that_is_read_in_float_is_told_by_its_readers() -> None:
    ends = only_layer(Rounded(read_by="Tanh").model()).rounding
    assert (ends.output_type, ends.after) == ("float", ("Tanh",))


def test_a_dynamic_layer_holds_the_nodes_that_make_its_result_float() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "q"),
        helper.make_node("ConvInteger", ["q", "l.weight_quantized", "z"], ["i"], "layer"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=1),
        helper.make_node("Mul", ["s", "l.weight_scale"], ["scales"], "scales"),
        helper.make_node("Mul", ["f", "scales"], ["m"], "product"),
        helper.make_node("Add", ["m", "l.bias"], ["t"], "sum"),
        helper.make_node("Add", ["t", "x"], ["y"], "residual"),
    ]
    constants = {
        "l.weight_quantized": np.ones((CHANNELS, CHANNELS, 1, 1), np.int8),
        "l.weight_scale": np.float32(0.1),
        "l.bias": weight(1, CHANNELS, 1, 1),
    }
    layer = only_layer(model_of(nodes, constants))
    assert layer.scheme == "dynamic"
    assert set(layer.nodes) == {"layer", "cast", "scales", "product", "sum"}


def test_weights_that_a_function_unpacks_make_a_float_layer_that_is_stored_small() -> None:
    body = [
        helper.make_node("Cast", ["codes"], ["f"], to=1),
        helper.make_node("Reshape", ["f", "shape"], ["w"]),
    ]
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function("own", "Int8", ["codes", "shape"], ["w"], body, opsets)
    nodes = [
        helper.make_node(
            "Int8", ["l.weight_quantized", "shape"], ["l.weight"], "unpack", domain="own"
        ),
        helper.make_node("Conv", ["x", "l.weight"], ["y"], "layer"),
    ]
    constants = {
        "l.weight_quantized": np.ones(8 * CHANNELS, np.int8),
        "shape": np.array([8, CHANNELS, 1, 1]),
    }
    layer = only_layer(model_of(nodes, constants, functions=[function]))
    assert (layer.scheme, layer.weight_type) == ("weights only", "Int8")
    assert (layer.name, layer.out_channels, layer.in_channels) == ("l", 8, CHANNELS)
    assert layer.weight_nodes == ("unpack",)


@pytest.mark.parametrize(("operator", "sizes"), [("Gemm", (8, 4)), ("MatMul", (4, 8))])
def test_channels_of_matrix_products(operator: str, sizes: tuple[int, int]) -> None:
    attributes = {"transB": 1} if operator == "Gemm" else {}
    nodes = [helper.make_node(operator, ["x", "l.weight"], ["y"], **attributes)]
    layer = only_layer(model_of(nodes, {"l.weight": weight(*sizes)}, ("batch", 4)))
    assert (layer.in_channels, layer.out_channels) == (4, 8)
    assert layer.nodes == ("y",)


def test_a_weight_that_is_called_twice_is_one_layer() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "l.weight"], ["a"], "first"),
        helper.make_node("Conv", ["a", "l.weight"], ["y"], "second"),
    ]
    layer = only_layer(model_of(nodes, {"l.weight": weight(CHANNELS, CHANNELS, 1, 1)}))
    assert layer.nodes == ("first", "second")


def test_products_of_two_inputs_are_no_layers() -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    assert layers_of(graph_of(model_of(nodes, {}))) == ()
