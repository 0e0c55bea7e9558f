from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from explain_models import CHANNELS, ONNXRUNTIME, Rounded, chain, model_of, weight
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from autocompress.measure.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from autocompress.measure.runtimes.onnxruntime_origins import mark, origins
from autocompress.measure.runtimes.onnxruntime_profile import read_trace
from autocompress.measure.session import NodeTime, Placement

INPUT = np.ones((1, CHANNELS, 8, 8), np.float32)
Events = list[dict[str, Any]]


def profile(path: Path, *inputs: np.ndarray, runs: int = 2) -> tuple[NodeTime, ...]:
    return OnnxRuntimeCpu().profile(path, ONNXRUNTIME, Placement(1), inputs or [INPUT], runs)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def run_event(start: int, length: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": length}


def node_event(name: str, start: int, length: int, operator: str = "Conv") -> dict[str, Any]:
    args = {"op_name": operator, "provider": "CPUExecutionProvider", "node_index": "0"}
    return {
        "cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": length, "args": args,
    }  # fmt: skip


def trace(*runs: tuple[int, int]) -> Events:
    """Runs of two nodes; each run takes what its nodes take and one microsecond."""
    events, start = [], 0
    for first, second in runs:
        events += [
            run_event(start, first + second + 1),
            node_event("a", start, first),
            node_event("b", start + first, second),
        ]
        start += first + second + 10
    return events


def test_times_are_means_over_the_faster_half_of_the_runs_that_count() -> None:
    # The first run warms up; of the others those of 5 and 6 microseconds are the faster half.
    nodes = read_trace(trace((90, 90), (2, 3), (50, 3), (3, 3), (2, 70)), runs=4)
    assert [(n.name, n.milliseconds) for n in nodes] == [("a", 0.0025), ("b", 0.003)]
    assert nodes[0].kernel == "CPU"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=9))
def test_the_sum_of_nodes_is_that_of_the_faster_runs(runs: list[tuple[int, int]]) -> None:
    nodes = read_trace(trace(*runs), runs=len(runs))
    faster = sorted(a + b for a, b in runs)[: -(-len(runs) // 2)]
    assert sum(n.milliseconds for n in nodes) == pytest.approx(sum(faster) / len(faster) / 1e3)


def test_a_node_that_runs_several_times_in_a_run_has_the_sum() -> None:
    events = [run_event(0, 30), node_event("a", 0, 4), node_event("a", 10, 5)]
    assert read_trace(events, runs=1)[0].milliseconds == pytest.approx(0.009)


def test_nodes_within_a_loop_are_counted_in_the_loops_time() -> None:
    events = [
        run_event(0, 50),
        node_event("body", 1, 8),
        node_event("body", 12, 8),
        node_event("loop", 0, 30, "Loop"),
        node_event("after", 30, 5),
    ]
    found = {n.name: n.milliseconds for n in read_trace(events, runs=1)}
    assert found == {"loop": 0.03, "after": 0.005}


def test_a_fused_convolution_stands_for_its_activation_too(tmp_path: Path) -> None:
    nodes = profile(saved(chain((CHANNELS, 32)), tmp_path))
    (convolution,) = [n for n in nodes if "Conv" in n.operator]
    assert convolution.origins == ("conv0", "act0")
    assert convolution.inputs[0] == "float32[1,16,8,8]"
    assert convolution.outputs == ("float32[1,32,8,8]",)


def test_an_integer_convolution_stands_for_the_roundings_it_has_swallowed(tmp_path: Path) -> None:
    nodes = profile(saved(Rounded().model(), tmp_path))
    (convolution,) = [n for n in nodes if n.operator == "QLinearConv"]
    assert convolution.origins == ("x_dq", "l_dq", "layer", "z_q")
    assert [n.origins for n in nodes if n.operator == "Transpose"] == [(), ()]
    assert [n.origins for n in nodes if n.operator == "QuantizeLinear"] == [("x_q",)]
    assert [n.origins for n in nodes if n.operator == "DequantizeLinear"] == [("z_dq",)]


def test_every_layer_has_its_own_node_in_a_network_without_names(tmp_path: Path) -> None:
    model = chain((CHANNELS, 32, 37, 16))
    for node in model.graph.node:
        node.name = ""
    nodes = profile(saved(model, tmp_path))
    owners = [o for n in nodes for o in n.origins if o in ("c0", "c1", "c2")]
    assert owners == ["c0", "c1", "c2"]
    assert all("Conv" in n.operator for n in nodes if set(n.origins) & {"c0", "c1", "c2"})


def test_a_file_with_weights_in_another_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        chain((CHANNELS, 32)), path, save_as_external_data=True, location="w", size_threshold=0
    )
    assert any("conv0" in n.origins for n in profile(path))


def test_values_that_a_subgraph_reads_are_renamed_there_too(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["t"], [f"{operator}_out"], f"inner_{operator}")],
            operator,
            [],
            [helper.make_tensor_value_info(f"{operator}_out", TensorProto.FLOAT, None)],
        )
        for operator in ("Neg", "Exp")
    ]  # fmt: skip
    nodes = [
        helper.make_node("Tanh", ["x"], ["t"], "tanh"),
        helper.make_node("ReduceSum", ["x"], ["s"], "sum", keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["yes"], "greater"),
        helper.make_node(
            "If", ["yes"], ["y"], "if", then_branch=branches[0], else_branch=branches[1]
        ),
    ]
    path = saved(model_of(nodes, {"zero": np.float32(0)}), tmp_path)
    found = {n.operator: n.origins for n in profile(path)}
    assert found["If"] == ("if",)
    assert "Neg" not in found


def test_marking_changes_names_only_and_not_those_of_inputs_and_constants() -> None:
    model = chain((CHANNELS, 32))
    marked = mark(model)
    assert [i.name for i in marked.model.graph.input] == ["x"]
    assert [i.name for i in marked.model.graph.initializer] == ["l0.weight", "l0.bias"]
    assert [o.name for o in marked.model.graph.output] == ["source1_0"]
    assert [n.op_type for n in marked.model.graph.node] == ["Conv", "Relu"]
    assert [n.name for n in model.graph.node] == ["conv0", "act0"]
    assert marked.original_name("source0_0_nchwc") == "c0_nchwc"
    assert marked.original_name("source1__token_3") == "act0_token_3"


def test_a_node_that_kept_its_name_is_preferred_to_one_named_after_it() -> None:
    marked = mark(chain((CHANNELS, 32)))
    optimized = [
        helper.make_node("Transpose", ["x"], ["q"], "source0_0_token_1"),
        helper.make_node("Conv", ["q"], ["r"], "source0_"),
        helper.make_node("Relu", ["r"], ["source1_0"], "anything"),
    ]
    assert origins(marked, optimized) == [(), ("conv0",), ("act0",)]


def test_a_copy_of_a_node_stands_for_it_as_well() -> None:
    marked = mark(chain((CHANNELS, 32)))
    optimized = [
        helper.make_node("Conv", ["x"], ["a"], "source0_"),
        helper.make_node("Conv", ["x"], ["b"], "source0_/duplicated"),
    ]
    assert origins(marked, optimized) == [("conv0", "act0"), ("conv0",)]


def test_constants_made_of_constants_belong_to_the_node_that_reads_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["l.weight"], ["w"], "turn", perm=[1, 0, 2, 3]),
        helper.make_node("Conv", ["x", "w"], ["y"], "layer", pads=[1, 1, 1, 1]),
    ]
    model = model_of(nodes, {"l.weight": weight(CHANNELS, CHANNELS, 3, 3)})
    (found,) = [n for n in profile(saved(model, tmp_path)) if "Conv" in n.operator]
    assert found.origins == ("turn", "layer")


def test_a_transpose_of_the_files_own_keeps_its_origin(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[0, 2, 3, 1]),
        helper.make_node("Softmax", ["t"], ["y"], "softmax", axis=-1),
    ]
    found = profile(saved(model_of(nodes, {}), tmp_path))
    assert [(n.operator, n.origins) for n in found] == [
        ("Transpose", ("turn",)), ("Softmax", ("softmax",)),
    ]  # fmt: skip
