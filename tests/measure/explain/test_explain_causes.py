from __future__ import annotations

import numpy as np
import onnx
import pytest
from explain_models import (
    CHANNELS,
    OPENVINO,
    Rounded,
    case_of,
    chain,
    model_of,
    node,
    weight,
)
from onnx import helper

from autocompress.device import OnnxRuntimeCudaSettings
from autocompress.measure.explain.findings import Case, Finding, count, milliseconds, names
from autocompress.measure.explain.overheads import overheads
from autocompress.measure.explain.slower import slower_layers
from autocompress.measure.session import NodeTime


def kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


def only(findings: list[Finding], kind: str) -> Finding:
    (finding,) = [f for f in findings if f.kind == kind]
    return finding


def blocked(milliseconds_: float, key: str = "conv0") -> NodeTime:
    return node("Conv", milliseconds_, [key], kernel="CPU nchwc")


def rounded_case(before_ms: float, after_ms: float) -> Case:
    after = node("QLinearConv", after_ms, ["layer"], kind="uint8")
    return case_of((chain((16, 16)), [blocked(before_ms)]), (Rounded().model(), [after]))


@pytest.mark.parametrize(("after_ms", "found"), [(1.2, ["slower_in_integers"]), (0.4, [])])
def test_a_layer_that_integers_make_slower(after_ms: float, found: list[str]) -> None:
    assert kinds(slower_layers(rounded_case(1.0, after_ms))) == found


def test_the_stake_of_a_slower_layer_is_what_it_takes_more() -> None:
    (finding,) = slower_layers(rounded_case(1.0, 1.2))
    assert finding.stake_ms == pytest.approx(0.2)
    assert "1.00 ms before, 1.20 ms now" in finding.seen


def test_a_dynamic_convolution_that_is_slower_is_told_as_such() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("DynamicQuantizeLinear", ["r"], ["q", "s", "z"], "q"),
        helper.make_node("ConvInteger", ["q", "l0.weight_quantized", "z"], ["i"], "layer"),
        helper.make_node("Cast", ["i"], ["f"], "cast", to=1),
        helper.make_node("Mul", ["f", "s"], ["y"], "product"),
    ]
    codes = np.ones((CHANNELS, CHANNELS, 3, 3), np.int8)
    after = model_of(nodes, {"l0.weight_quantized": codes})
    profile = [
        node("DynamicQuantizeLinear", 0.2, ["q"], output="uint8"),
        node("ConvInteger", 3.0, ["layer"], kind="uint8"),
        node("Cast", 0.1, ["cast"], kind="int32", output="float32"),
    ]
    case = case_of((chain((16, 16)), [blocked(1.0)]), (after, profile))
    (finding,) = slower_layers(case)
    assert finding.kind == "dynamic_convolution"
    assert finding.stake_ms == pytest.approx(2.1)
    assert "fixed ranges" in only(overheads(case), "conversions").advice


def test_a_pruned_layer_whose_neighbour_left_the_blocked_kernels() -> None:
    before = chain((16, 64, 64)), [blocked(1.0), blocked(4.0, "conv1")]
    after = chain((16, 37, 64)), [blocked(0.8), node("FusedConv", 3.5, ["conv1"])]
    case = case_of(before, after)
    finding = only(slower_layers(case), "left_fast_kernels")
    assert finding.layers == ("l1",)
    assert "37" in finding.seen
    # Its share of the weights would be 37 / 64 of 4 ms.
    assert finding.stake_ms == pytest.approx(3.5 - 4.0 * 37 / 64)
    # The layer in a general kernel has no steps of channels; the other one has.
    assert only(overheads(case), "missed_tile").layers == ("l0",)


def test_a_pruned_layer_that_is_no_faster() -> None:
    before = chain((16, 64)), [blocked(1.0)]
    after = chain((16, 32)), [blocked(0.99)]
    assert kinds(slower_layers(case_of(before, after))) == ["no_faster"]


def test_a_layer_that_is_unchanged_and_no_faster_is_no_finding() -> None:
    side = chain((16, 64)), [blocked(1.0)]
    assert slower_layers(case_of(side, side)) == []


def test_parts_that_cost_more_than_the_whole() -> None:
    parts = [
        helper.make_node("Conv", ["x", "l0.0.weight"], ["r"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["r", "l0.1.weight"], ["y"], "second"),
    ]
    constants = {"l0.0.weight": weight(8, 16, 3, 3), "l0.1.weight": weight(16, 8, 1, 1)}
    after = model_of(parts, constants), [blocked(0.7, "first"), blocked(0.6, "second")]
    case = case_of((chain((16, 16)), [blocked(1.0)]), after)
    assert kinds(slower_layers(case)) == ["parts_cost_more"]
    # Both parts are narrower or equal; only the one between steps of 16 is told.
    assert only(overheads(case), "missed_tile").layers == ("l0.0",)


@pytest.mark.parametrize(
    ("channels", "tile", "stake_ms"), [(37, 16, 1 - 37 / 48), (36, 8, 1 - 36 / 40), (48, 16, None)]
)
def test_channels_between_steps_waste_the_rest_of_the_step(
    channels: int, tile: int, stake_ms: float | None
) -> None:
    before = chain((16, 64)), [blocked(2.0)]
    after = chain((16, channels)), [blocked(1.0)]
    found = overheads(case_of(before, after, tile=tile))
    if stake_ms is None:
        assert found == []
    else:
        finding = only(found, "missed_tile")
        assert finding.stake_ms == pytest.approx(stake_ms)
        assert str(-(-channels // tile) * tile) in finding.seen


def test_channels_that_the_original_has_too_are_not_complained_of() -> None:
    side = chain((16, 10)), [blocked(1.0)]
    assert overheads(case_of(side, side)) == []


def test_conversions_beside_layers_in_float_point_to_them() -> None:
    nodes = [
        node("QuantizeLinear", 0.1, ["x_q"], output="uint8"),
        node("DequantizeLinear", 0.1, ["x_dq"], kind="uint8", output="float32"),
        node("Conv", 1.0, ["layer"]),
        node("Tanh", 0.1, ["reader"]),
    ]
    case = case_of((chain((16, 16)), [blocked(1.0)]), (Rounded(read_by="Tanh").model(), nodes))
    finding = only(overheads(case), "conversions")
    assert finding.stake_ms == pytest.approx(0.2)
    assert "2 of them" in finding.why
    assert "float" in finding.advice


def inner_conversions() -> tuple[onnx.ModelProto, list[NodeTime]]:
    """Tanh in float between two roundings that are neither the model's first nor last."""
    model = Rounded().model()
    model.graph.node[-1].output[0] = "z"
    zero = ["scale", "z_zero"]
    model.graph.node.extend(
        [
            helper.make_node("Tanh", ["z"], ["t"], "tanh"),
            helper.make_node("QuantizeLinear", ["t", *zero], ["tq"], "t_q"),
            helper.make_node("DequantizeLinear", ["tq", *zero], ["y"], "t_dq"),
        ]
    )
    nodes = [
        node("QLinearConv", 1.0, ["layer"], kind="uint8"),
        node("DequantizeLinear", 0.1, ["z_dq"], kind="uint8", output="float32"),
        node("Tanh", 0.1, ["tanh"]),
        node("QuantizeLinear", 0.1, ["t_q"], output="uint8"),
    ]
    return model, nodes


def test_conversions_around_a_float_operator_name_it() -> None:
    case = case_of((chain((16, 16)), [blocked(2.0)]), inner_conversions())
    finding = only(overheads(case), "conversions")
    assert "Tanh (1)" in finding.why
    assert "let the quantizer round" in finding.advice


def test_the_first_and_the_last_conversion_are_no_finding() -> None:
    nodes = [
        node("QuantizeLinear", 0.1, ["x_q"], output="uint8"),
        node("QLinearConv", 1.0, ["layer"], kind="uint8"),
        node("DequantizeLinear", 0.1, ["z_dq"], kind="uint8", output="float32"),
    ]
    case = case_of((chain((16, 16)), [blocked(2.0)]), (Rounded().model(), nodes))
    assert "conversions" not in kinds(overheads(case))


def test_layout_changes_count_for_what_the_original_has_not() -> None:
    before = chain((16, 16)), [blocked(1.0), node("ReorderOutput", 0.1)]
    after = chain((16, 16)), [blocked(1.0), *(node("ReorderOutput", 0.1) for _ in range(3))]
    finding = only(overheads(case_of(before, after)), "layout_changes")
    assert finding.stake_ms == pytest.approx(0.2)
    assert "ReorderOutput (3)" in finding.seen
    assert overheads(case_of(after, before)) == []


@pytest.mark.parametrize("at_each_run", [False, True])
def test_weights_that_are_only_stored_small(at_each_run: bool) -> None:
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["l0.weight_quantized", "scale"], ["w"], "l0_dq", axis=0
        ),
        helper.make_node("Conv", ["x", "w"], ["y"], "layer", pads=[1, 1, 1, 1]),
    ]
    constants = {
        "l0.weight_quantized": np.ones((16, 16, 3, 3), np.int8),
        "scale": np.ones(16, np.float32),
    }
    unpack = [node("DequantizeLinear", 0.1, ["l0_dq"], kind="int8", output="float32")]
    profile = [*(unpack if at_each_run else []), node("Conv", 1.0, ["layer"])]
    case = case_of((chain((16, 16)), [blocked(1.0)]), (model_of(nodes, constants), profile))
    finding = only(overheads(case), "storage_only")
    assert ("at every run" in finding.seen) is at_each_run
    assert ("when the model is loaded" in finding.seen) is not at_each_run


def test_nodes_of_a_gpus_model_that_ran_on_the_cpu() -> None:
    gpu = OnnxRuntimeCudaSettings(name="onnxruntime_cuda")
    before = chain((16, 16)), [node("Conv", 1.0, ["conv0"], kernel="CUDA")]
    after = (
        chain((16, 16)),
        [
            node("Conv", 1.0, ["conv0"], kernel="CUDA"),
            node("MemcpyToHost", 0.2, kernel="CUDA"),
            node("QLinearAdd", 0.3, kernel="CPU"),
        ],
    )
    finding = only(overheads(case_of(before, after, runtime=gpu)), "other_processor")
    assert finding.stake_ms == pytest.approx(0.5)
    assert "QLinearAdd (1)" in finding.seen


def test_a_large_rest_outside_layers_bounds_what_is_left_to_gain() -> None:
    before = chain((16, 16)), [blocked(3.0)]
    after = chain((16, 16)), [blocked(0.5), node("Softmax", 0.5)]
    finding = only(overheads(case_of(before, after)), "outside_layers")
    assert "at most 6.0 x" in finding.why
    assert "Softmax 0.50 ms" in finding.seen
    assert "outside_layers" not in kinds(overheads(case_of(after, before)))


def test_advice_on_input_channels_is_onnxruntimes_alone() -> None:
    before, after = (
        (chain((16, 64)), [blocked(2.0)]),
        (chain((16, 37)), [node("Conv", 1, ["conv0"])]),
    )
    assert (
        "input channels"
        in only(overheads(case_of(before, (after[0], [blocked(1.0)]))), "missed_tile").why
    )
    openvino = case_of((before[0], [node("Conv", 2, ["conv0"])]), after, runtime=OPENVINO)
    assert "input channels" not in only(overheads(openvino), "missed_tile").why


def test_words() -> None:
    assert (count(1, "layer"), count(2, "layer")) == ("1 layer", "2 layers")
    assert names(["a", "b", "c"], 2) == "a, b and 1 more"
    assert [milliseconds(v) for v in (0.0123, 1.234, 45.67)] == ["0.012 ms", "1.23 ms", "45.7 ms"]
