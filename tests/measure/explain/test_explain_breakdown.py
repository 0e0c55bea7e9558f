from __future__ import annotations

import math

import pytest
from explain_models import Rounded, chain, node
from hypothesis import given
from hypothesis import strategies as st

from autocompress.measure.explain.breakdown import break_down, precision_of
from autocompress.measure.explain.changes import match_layers
from autocompress.measure.explain.explanation import spent_on
from autocompress.measure.explain.graph import graph_of
from autocompress.measure.session import NodeTime

TIMES = st.floats(1e-4, 10)


@given(st.lists(TIMES, min_size=1, max_size=8), TIMES)
def test_what_a_model_spends_adds_up_to_its_latency(times: list[float], latency: float) -> None:
    kinds = ["Conv", "QuantizeLinear", "ReorderInput", "Softmax"]
    nodes = [node(kinds[i % 4], t, ["conv0"] if i % 4 == 0 else []) for i, t in enumerate(times)]
    model = break_down(graph_of(chain((16, 16))), nodes, latency)
    assert sum(spent_on(model).values()) == pytest.approx(latency)
    assert all(value >= 0 for value in spent_on(model).values())
    assert model.profile_ms == pytest.approx(sum(times))
    assert model.node_count == len(times)


def test_an_equal_part_is_taken_off_every_node_for_the_profiles_own_time() -> None:
    nodes = [node("Conv", 1.0, ["conv0"]), node("Softmax", 0.5)]
    model = break_down(graph_of(chain((16, 16))), nodes, 1.3)
    assert model.layers_ms == pytest.approx(0.9)
    assert model.others[0].milliseconds == pytest.approx(0.4)


def test_no_node_loses_more_than_the_shortest_one_took() -> None:
    nodes = [node("Conv", 1.0, ["conv0"]), node("Softmax", 0.1)]
    model = break_down(graph_of(chain((16, 16))), nodes, 0.46)
    # 0.09 off each leaves 0.91 and 0.01, which are halved.
    assert model.layers_ms == pytest.approx(0.455)
    assert model.others[0].milliseconds == pytest.approx(0.005)


def test_time_that_no_node_took_is_between_them() -> None:
    model = break_down(graph_of(chain((16, 16))), [node("Conv", 1.0, ["conv0"])], 1.5)
    assert (model.layers_ms, model.between_ms) == (1.0, 0.5)


def test_nodes_are_sorted_by_what_they_are_for() -> None:
    nodes = [
        node("QuantizeLinear", 1, ["x_q"], output="uint8"),
        node("Transpose", 1, kind="uint8"),
        node("QLinearConv", 1, ["x_dq", "layer", "z_q"], kind="uint8"),
        node("DequantizeLinear", 1, ["l_dq"], kind="int8", output="float32"),
        node("Reorder", 1, output="bfloat16"),
        node("Softmax", 1),
    ]
    model = break_down(graph_of(Rounded().model()), nodes, 6)
    assert [n.operator for n in model.layers[0].nodes] == ["QLinearConv"]
    assert [n.operator for n in model.conversions] == [
        "QuantizeLinear", "DequantizeLinear", "Reorder",
    ]  # fmt: skip
    assert [n.operator for n in model.layouts] == ["Transpose"]
    assert [n.operator for n in model.others] == ["Softmax"]
    assert [n.operator for n in model.weight_conversions(["l"])] == ["DequantizeLinear"]


def test_layers_without_a_node_are_missing() -> None:
    model = break_down(graph_of(chain((16, 16, 16))), [node("Engine", 1.0)], 1.0)
    assert [layer.name for layer in model.missing] == ["l0", "l1"]


@pytest.mark.parametrize(
    ("found", "precision"),
    [
        (node("QLinearConv", 1), "integers"),
        (node("DynamicQuantizeMatMul", 1), "integers"),
        (node("Convolution", 1, kernel="brgconv_avx512_I8", kind="uint8"), "integers"),
        (node("Convolution", 1, kernel="brgconv_avx512_amx_bf16", kind="bfloat16"), "bfloat16"),
        (node("Convolution", 1, kernel="jit_avx512_1x1_f32", kind="uint8"), "float32"),
        (node("Conv", 1, kernel="CPU nchwc"), "float32"),
        (NodeTime("n", "Conv", "", 1.0), ""),
    ],
)
def test_a_nodes_precision_is_read_from_operator_kernel_or_values(
    found: NodeTime, precision: str
) -> None:
    assert precision_of(found) == precision


def test_layers_are_matched_by_name_and_parts_by_the_whole() -> None:
    whole = graph_of(chain((16, 16, 16)))
    old = break_down(whole, [node("Conv", 1, ["conv0"]), node("Conv", 2, ["conv1"])], 3)
    parts = chain((16, 8, 16, 16))
    for initializer, name in zip(
        parts.graph.initializer,
        ("l0.0.weight", "b0", "l0.1.weight", "b1", "l1.weight", "b2"),
        strict=True,
    ):
        for n in parts.graph.node:
            for place, value in enumerate(n.input):
                if value == initializer.name:
                    n.input[place] = name
        initializer.name = name
    for n in parts.graph.node:
        n.name = f"new_{n.name}"
    nodes = [node("Conv", 0.1, [f"new_conv{i}"]) for i in range(3)]
    new = break_down(graph_of(parts), nodes, 0.3)
    first, second = match_layers(old, new)
    assert [t.layer.name for t in first.after] == ["l0.0", "l0.1"]
    assert first.gain_ms == pytest.approx(0.8)
    assert [t.layer.name for t in second.after] == ["l1"]


@pytest.mark.parametrize("extra", [0, 1])
def test_foreign_names_are_matched_by_order_if_the_numbers_fit(extra: int) -> None:
    old = break_down(graph_of(chain((16, 16))), [node("Conv", 1, ["conv0"])], 1)
    foreign = chain((16,) * (2 + extra))
    for n in foreign.graph.node:
        n.name = f"other_{n.name}"
        n.input[:] = [name.replace("l", "z") for name in n.input]
    for initializer in foreign.graph.initializer:
        initializer.name = initializer.name.replace("l", "z")
    nodes = [node("Conv", 1, [f"other_conv{i}"]) for i in range(1 + extra)]
    new = break_down(graph_of(foreign), nodes, 1 + extra)
    changes = match_layers(old, new)
    if extra:
        assert [(c.before is None, len(c.after)) for c in changes] == [
            (False, 0), (True, 1), (True, 1),
        ]  # fmt: skip
    else:
        assert [(c.before is None, len(c.after)) for c in changes] == [(False, 1)]


def test_a_pruned_layer_is_narrowed_and_an_equal_one_is_not() -> None:
    old = break_down(graph_of(chain((16, 16))), [node("Conv", 1, ["conv0"])], 1)
    narrow = break_down(graph_of(chain((16, 8))), [node("Conv", 1, ["conv0"])], 1)
    assert match_layers(old, narrow)[0].narrowed
    assert not match_layers(old, old)[0].narrowed
    assert math.isclose(match_layers(old, narrow)[0].gain_ms, 0, abs_tol=1e-12)
