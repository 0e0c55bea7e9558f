from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from autocompress.graph import ChannelGroup, Member
from autocompress.workload import Split, Workload

SEARCH = Path(__file__).resolve().parents[2] / "experiments" / "search"


@pytest.fixture
def plain_loop(monkeypatch):
    monkeypatch.syspath_prepend(str(SEARCH))
    return importlib.import_module("plain_loop")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SEARCH))
    return importlib.import_module("benchmark")


def make_row(plain_loop, accuracy, latency_ms, **changes):
    fields = {
        "t_s": 1.0,
        "ratios": {"a": 0.5},
        "int8": ("a",),
        "accuracy_1000": accuracy,
        "latency_ms": latency_ms,
        "model": "00000.onnx",
        "seconds": {"export": 1.0},
    }
    return plain_loop.Row(**(fields | changes))


# --- the loop's parts


def test_channels_are_ordered_by_the_l1_norm_of_their_filters(plain_loop):
    network = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 2, 1))
    network[0].weight.data = torch.tensor([-3.0, 1.0, 2.0]).reshape(3, 1, 1, 1)
    members = (Member("0", "out", (0, 1, 2), 1), Member("1", "in", (0, 1, 2), 1))
    assert plain_loop.l1_order(network, ChannelGroup("0", 3, members)) == [1, 2, 0]


def test_producers_of_other_scale_weigh_the_same(plain_loop):
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False))
    network[0].weight.data = torch.tensor([100.0, 101.0]).reshape(2, 1, 1, 1)
    network[1].weight.data = torch.tensor([0.9, 0.1]).reshape(2, 1, 1, 1)
    members = (Member("0", "out", (0, 1), 1), Member("1", "out", (0, 1), 1))
    assert plain_loop.l1_order(network, ChannelGroup("0+1", 2, members)) == [1, 0]


def residual_graph() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["a"], "conv_a"),
        helper.make_node("Relu", ["a"], ["relu"], "relu"),
        helper.make_node("Conv", ["relu", "b.weight"], ["b"], "conv_b"),
        helper.make_node("Add", ["b", "relu"], ["sum"], "add"),
        helper.make_node("Mul", ["sum", "constant"], ["y"], "mul"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    return helper.make_model(helper.make_graph(nodes, "residual", ends[:1], ends[1:]))


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ({"a", "b"}, ["conv_a", "relu", "conv_b", "add", "mul"]),
        ({"a"}, ["conv_a", "relu"]),
        ({"b"}, ["conv_b"]),
        (set(), []),
    ],
)
def test_nodes_between_layers_follow_what_they_read(plain_loop, layers, names):
    assert plain_loop.nodes_to_quantize(residual_graph(), layers) == names


def test_only_a_row_that_is_better_in_one_figure_and_worse_in_none_dominates(plain_loop):
    rows = [make_row(plain_loop, 0.9, 2.0), make_row(plain_loop, math.nan, math.nan)]
    assert plain_loop.dominated(rows, 0.8, 2.0)
    assert plain_loop.dominated(rows, 0.9, 2.5)
    assert not plain_loop.dominated(rows, 0.9, 2.0)
    assert not plain_loop.dominated(rows, 0.1, 1.9)
    assert not plain_loop.dominated([], 0.1, 9.0)


def test_steps_are_averaged_over_all_trials(plain_loop):
    rows = [
        make_row(plain_loop, 0.9, 1.0, seconds={"export": 3.0, "quantize": 1.0}),
        make_row(plain_loop, 0.9, 1.0, seconds={"export": 1.0}),
    ]
    assert plain_loop.step_seconds(rows) == {"export": 2.0, "quantize": 0.5}


# --- the benchmark's figures


def make_cell(benchmark, name="plain-0", points=(), front=()):
    original = benchmark.Original(accuracy=0.9, file_bytes=1000.0, download_bytes=800.0)
    return benchmark.Cell(name, 10.0, 40, 20, original, points, front, {"export": 1.5}, 0.5)


def test_hypervolume_counts_what_was_known_at_the_time(benchmark):
    points = (
        benchmark.Point(30.0, 0.85, 0.5),
        benchmark.Point(90.0, 0.90, 0.5),
        benchmark.Point(90.0, 0.79, 0.1),
    )
    cell = make_cell(benchmark, points=points)
    assert benchmark.hypervolume_at(cell, 10) == 0
    assert benchmark.hypervolume_at(cell, 60) == pytest.approx(5 * 0.5)
    assert benchmark.hypervolume_at(cell, 600) == pytest.approx(10 * 0.5)


def test_best_points_keep_their_limits(benchmark):
    front = (
        benchmark.Judged(drop_pp=0.4, speedup=3.0, download_bytes=200.0),
        benchmark.Judged(drop_pp=1.0, speedup=5.0, download_bytes=100.0),
        benchmark.Judged(drop_pp=1.1, speedup=9.0, download_bytes=10.0),
    )
    assert benchmark.best_points(make_cell(benchmark, front=front)) == (3.0, 5.0, 10.0)
    assert benchmark.best_points(make_cell(benchmark)) == (1.0, 1.0, 1.25)


def test_cells_are_read_back_and_tables_fit_the_width(benchmark):
    point = benchmark.Point(30.0, 0.85, 0.5)
    front = (benchmark.Judged(0.4, 3.0, 200.0),)
    cells = [
        make_cell(benchmark, f"{part}-{seed}", (point,), front)
        for part in ("plain", "ours", "mutation_alone")
        for seed in range(3)
    ]
    data = [benchmark.asdict(cell) for cell in cells]
    assert [benchmark.Cell.from_dict(d).points for d in data] == [c.points for c in cells]
    text = benchmark.results(cells, [{"title": "Depth", "columns": ["layers"], "rows": [[20]]}])
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) <= 100
    assert "| plain | 10.0 | 4.0 | 2.0 |" in tables
    assert "| ours | 2.500 | 2.500 | 2.500 | 2.500 | 2.500 |" in tables
    # Four minutes of run have no figure for the fifth.
    short = replace(cells[0], name="short-0", minutes=4.0)
    assert "| short | 2.500 | 2.500 |  |  | 2.500 |" in benchmark.results([short], [])
    assert "| 20 |" in tables


# --- everything together


def make_workload() -> Workload:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    inputs = torch.randn(192, 1, 8, 8)
    for norm in (network[1], network[4]):
        norm.momentum = None
    network.train()(inputs)
    network.eval()
    targets = network(inputs).argmax(1)
    parts = [Split(inputs[i : i + 64], targets[i : i + 64]) for i in range(0, 192, 64)]
    return Workload(network, inputs[:1], parts[0], None, parts[1], parts[2], "accuracy")


@pytest.mark.slow
def test_the_first_trial_is_int8_of_everything_and_rows_are_on_disk(plain_loop, tmp_path):
    threads = torch.get_num_threads()
    rows = plain_loop.run_plain_loop(make_workload(), 6.0, 0, tmp_path / "plain")
    assert torch.get_num_threads() == threads
    assert plain_loop.read_rows(tmp_path / "plain") == rows
    assert not any(row.failure for row in rows)
    first = rows[0]
    assert set(first.ratios.values()) == {0.0}
    assert first.int8 == ("0", "3", "8")
    # The network's own answers are the targets; its means are of other samples, chance is 0.25.
    assert first.accuracy_1000 > 0.7
    kept = {row.model for row in rows if row.model}
    assert {path.name for path in (tmp_path / "plain" / "models").iterdir()} == kept
    model = onnx.load(tmp_path / "plain" / "models" / first.model)
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}


def test_norms_are_estimated_as_plain_means_and_pruned_channels_are_gone(plain_loop):
    workload = make_workload()
    loop = plain_loop._Loop(workload)
    ratios = {name.removesuffix("|ratio"): 0.0 for name in loop.known_good if "ratio" in name}
    network = loop.prune(ratios | {"0": 0.5})
    assert network[0].out_channels == network[3].in_channels == 8
    assert workload.network[0].out_channels == 16
    loop.estimate_norms(network)
    assert not network[1].training
    with torch.no_grad():
        written = network[0](workload.calibration.inputs[0])
    torch.testing.assert_close(network[1].running_mean, written.mean((0, 2, 3)))


@pytest.mark.slow
def test_layers_left_out_stay_in_float(plain_loop, tmp_path):
    loop = plain_loop._Loop(make_workload())
    loop.export(loop.prune(dict.fromkeys(["0", "3"], 0.0)), tmp_path / "a.onnx")
    loop.quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", {"3"})
    onnxruntime.InferenceSession(tmp_path / "b.onnx")
    assert loop.accuracy(tmp_path / "b.onnx") > 0.9
    weights = {i.name: i.data_type for i in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert weights["0.weight"] == TensorProto.FLOAT
    assert weights["3.weight_quantized"] == TensorProto.INT8
