"""Decomposed layers in the skeleton: a chain of nodes in place of one."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import all_decomposed, all_pruned, assert_tidy, candidate, operators, run_onnx, values
from networks import enliven, exporter_of, graph_of, make_case, run
from torch import Tensor, nn

from autocompress.bank import Bank, stitch
from autocompress.config import CalibrationSettings
from autocompress.export.exporter import Exporter
from autocompress.export.skeleton import _chain
from autocompress.graph import trace
from autocompress.plan import Plan, Step
from autocompress.techniques.decomposed import Kind, fits
from autocompress.techniques.low_rank import LOW_RANK, LowRank

KINDS: tuple[Kind, ...] = ("svd", "spatial", "tucker", "cp")
PARTS = {"svd": 2, "spatial": 2, "tucker": 3, "cp": 4}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", ["residual", "concat", "flatten", "signal"])
def test_every_kind_fills_the_skeleton(name: str, kind: Kind, pruned: bool) -> None:
    """Small ranks, so that even the smallest layers become cheaper by every kind."""
    steps = all_decomposed(name, 0.2, kind)
    if name == "signal" and kind == "spatial":
        assert not steps
        return
    assert steps
    network = candidate(name, *(all_pruned(name) if pruned else ()), *steps)
    floating = exporter_of(name).export(network)
    assert not floating.fresh and floating.parity <= 1e-4
    assert_tidy(floating.graph.model)
    inputs = tuple(x[-3:] for x in make_case(name).inputs)
    found = run_onnx(floating.graph.model, [x.numpy() for x in inputs])
    for a, b in zip(found, run(network, inputs), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-3, atol=1e-4 * np.abs(b.numpy()).max())
    layers = {n for n, m in network.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))}
    sites = {n for n in floating.graph.sites if "head" not in n and "hidden" not in n}
    assert sites == layers
    parts = [n for n in sites if n.startswith(f"{steps[0].target}.")]
    assert len(parts) == (3 if name == "signal" else PARTS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_weights_in_the_file(kind: Kind) -> None:
    for step in all_decomposed("residual", 0.2, kind):
        graph = exporter_of("residual").export(candidate("residual", step)).graph
        stored = values(graph.model)
        layer = graph_of("residual").layer(step.target)
        total = sum(
            stored[site.initializer].nbytes
            for name, site in graph.sites.items()
            if name.startswith(f"{step.target}.")
        )
        assert total == LOW_RANK.stored_bytes(layer, step.decision, 1) > 0


class _Windows(nn.Module):
    """Every way of padding; strides and dilations that differ by dimension; even kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(2, 1), bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.dilated = nn.Conv2d(6, 6, 3, padding=(2, 0), dilation=(2, 1))
        self.same = nn.Conv2d(6, 6, 3, padding="same")
        self.uneven = nn.Conv2d(6, 6, (2, 4), padding="same", dilation=(1, 3))
        self.reflected = nn.Conv2d(6, 6, 3, padding=(1, 2), padding_mode="reflect")
        self.ring = nn.Conv2d(6, 6, 3, stride=2, padding=1, padding_mode="circular")
        self.edge = nn.Conv2d(6, 6, (3, 2), padding="same", padding_mode="replicate")
        self.flat = nn.Conv2d(6, 6, (1, 3), stride=(2, 1), padding=(1, 1))
        self.inside = nn.Conv2d(6, 6, (2, 2), padding="valid")
        self.line = nn.Conv1d(6, 6, 4, padding="same")
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.strided(x)))
        for layer in (self.dilated, self.same, self.uneven, self.reflected):
            x = torch.relu(layer(x))
        for layer in (self.ring, self.edge, self.flat, self.inside):
            x = torch.relu(layer(x))
        return self.head(torch.relu(self.line(x.mean(2))).mean(2))


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Exporter, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = _Windows(), torch.randn(24, 3, 19, 21) + 0.3
        enliven(network, (x,))
    graph = trace(network, (x[:2],))
    bank = Bank(network, graph, 1, Path(tmp_path_factory.mktemp("bank")))
    bank.calibrate((x,), CalibrationSettings())
    return bank, Exporter(network, graph, (x[:2],), (x[:4],)), x


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_split_as_the_modules_are(
    windows: tuple[Bank, Exporter, Tensor], kind: Kind
) -> None:
    bank, exporter, x = windows
    layers = [layer for layer in bank.graph.layers if fits(layer, kind)]
    assert len(layers) == {"svd": 11, "spatial": 8, "tucker": 10, "cp": 10}[kind]
    decision = LowRank(rank_ratio=0.6, kind=kind)
    network = stitch(bank, Plan(tuple(Step(x.name, decision) for x in layers))).network
    floating = exporter.export(network)
    assert not floating.fresh and floating.parity <= 1e-4
    assert_tidy(floating.graph.model)
    found = run_onnx(floating.graph.model, [x.numpy()])[0]
    np.testing.assert_allclose(found, run(network, (x,))[0].numpy(), rtol=1e-3, atol=1e-4)


def test_full_rank_keeps_the_outputs_through_every_window(
    windows: tuple[Bank, Exporter, Tensor],
) -> None:
    bank, _, x = windows
    wanted = run(bank.network, (x,))[0]
    for kind in KINDS[:3]:
        decision = LowRank(rank_ratio=1, kind=kind)
        steps = tuple(Step(y.name, decision) for y in bank.graph.layers if fits(y, kind))
        found = run(stitch(bank, Plan(steps)).network, (x,))[0]
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


class _Twice(nn.Module):
    """A convolution and a linear layer that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.conv(x)))).mean((2, 3))
        return self.linear(torch.relu(self.linear(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_called_twice_is_decomposed_twice(kind: Kind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = _Twice().eval(), torch.randn(16, 6, 6, 6)
    graph = trace(network, (x[:2],))
    bank = Bank(network, graph, 1, tmp_path)
    bank.calibrate((x,), CalibrationSettings())
    before = copy.deepcopy(network.state_dict())
    steps = (
        Step("conv", LowRank(rank_ratio=0.3, kind=kind)),
        Step("linear", LowRank(rank_ratio=0.5)),
    )
    stitched = stitch(bank, Plan(steps)).network
    floating = Exporter(network, graph, (x[:2],), (x[:8],)).export(stitched)
    assert not floating.fresh and floating.parity <= 1e-4
    assert_tidy(floating.graph.model)
    assert operators(floating.graph.model).count("Conv") == 2 * PARTS[kind]
    assert len(floating.graph.sites) == PARTS[kind] + 2
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_attributes_of_a_chain() -> None:
    node = onnx.helper.make_node(
        "Conv", ["x", "w", "b"], ["y"], name="conv",
        kernel_shape=[3, 5], strides=[2, 1], pads=[1, 2, 0, 3], dilations=[1, 2], group=1,
    )  # fmt: skip
    kernels = {"v0": (1, 1), "v1": (3, 1), "v2": (1, 5), "v3": (1, 1)}
    chain = _chain(node, tuple(kernels), kernels)
    assert [list(n.input) for n in chain] == [
        ["x", "v0"], ["y_part0", "v1"], ["y_part1", "v2"], ["y_part2", "v3", "b"],
    ]  # fmt: skip
    assert [list(n.output) for n in chain] == [["y_part0"], ["y_part1"], ["y_part2"], ["y"]]
    found = [{a.name: list(a.ints) for a in n.attribute if a.name != "group"} for n in chain]
    plain = {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}
    assert found[0] == found[3] == plain
    assert found[1] == {**plain, "kernel_shape": [3, 1], "strides": [2, 1], "pads": [1, 0, 0, 0]}
    assert found[2] == {
        **plain, "kernel_shape": [1, 5], "pads": [0, 2, 0, 3], "dilations": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_suits_every_part(auto_pad: str) -> None:
    """Rank-one parts with kernels of even size, where the two sides differ."""
    rng = np.random.default_rng(0)
    weights = {
        "v0": rng.normal(size=(1, 2, 4, 1)).astype(np.float32),
        "v1": rng.normal(size=(3, 1, 1, 2)).astype(np.float32),
    }
    whole = np.einsum("rcij,orkl->ocil", weights["v0"], weights["v1"])
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="conv", auto_pad=auto_pad)
    kernels = {name: weight.shape[2:] for name, weight in weights.items()}
    x = rng.normal(size=(2, 2, 7, 7)).astype(np.float32)
    results = [
        run_onnx(_model(nodes, stored), [x])[0]
        for nodes, stored in (
            ([node], {"w": whole}),
            (_chain(node, ("v0", "v1"), kernels), weights),
        )
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def _model(nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray]) -> onnx.ModelProto:
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4)
        for name in ("x", "y")
    )
    initializers = [onnx.numpy_helper.from_array(v, k) for k, v in stored.items()]
    graph = onnx.helper.make_graph(nodes, "graph", [x], [y], initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
