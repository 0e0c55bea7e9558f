from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from marked import STATIC, marked
from models import (
    all_decomposed,
    all_int8,
    all_pruned,
    arrays,
    assert_tidy,
    candidate,
    one,
    relative_error,
    run_onnx,
    values,
)
from networks import NAMES, enliven, exporter_of, graph_of, make_case, make_device, run
from onnx import numpy_helper
from torch import Tensor, nn

import autocompress.export.exporter as exporter_module
from autocompress.errors import ExportError
from autocompress.export.exporter import PARITY_TOLERANCE, Exporter
from autocompress.export.quantize import quantize
from autocompress.export.skeleton import Graph, Skeleton
from autocompress.graph import trace
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank

CANDIDATES = {
    "original": lambda name: (),
    "pruned": all_pruned,
    "decomposed": all_decomposed,
    "pruned and decomposed": lambda name: all_pruned(name) + all_decomposed(name),
    "rounded": all_int8,
}
# Its graph holds the number of heads: queries, keys and values come from one layer.
RESHAPING = ("fused_attention",)


@pytest.mark.parametrize("kind", CANDIDATES)
@pytest.mark.parametrize("name", NAMES)
def test_candidates_fill_the_skeleton(name: str, kind: str) -> None:
    network = candidate(name, *CANDIDATES[kind](name))
    floating = exporter_of(name).export(network)
    assert floating.fresh == (name in RESHAPING and "pruned" in kind)
    assert 0 <= floating.parity <= 1e-4
    assert_tidy(floating.graph.model)
    for batch in (1, 3, 64):
        inputs = tuple(x[-batch:] for x in make_case(name).inputs)
        found, wanted = run_onnx(floating.graph.model, arrays(inputs)), run(network, inputs)
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == tuple(b.shape) and len(a) == batch
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-3, atol=1e-4 * np.abs(b.numpy()).max())


@pytest.mark.parametrize("name", ["residual", "depthwise", "tokens"])
def test_sites_say_where_the_weights_stand(name: str) -> None:
    network = candidate(name, *all_decomposed(name))
    graph = exporter_of(name).export(network).graph
    stored = values(graph.model)
    norms = exporter_of(name)._norms
    parts = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert set(graph.sites) == set(parts)
    for part, site in graph.sites.items():
        weight = network.get_submodule(part).weight.detach().numpy()
        value = stored[site.initializer]
        assert value.shape[site.axis] == weight.shape[0]
        if part not in norms and part.rpartition(".")[0] not in norms:
            np.testing.assert_array_equal(value.T if site.axis else value, weight)


def test_filling_leaves_no_trace_in_the_skeleton() -> None:
    exporter = exporter_of("depthwise")
    first = exporter.export(candidate("depthwise")).graph.model.SerializeToString()
    exporter.export(candidate("depthwise", *all_pruned("depthwise"), *all_decomposed("depthwise")))
    again = exporter.export(candidate("depthwise")).graph.model.SerializeToString()
    assert first == again


def test_a_pruned_depthwise_convolution_has_fewer_groups() -> None:
    network = candidate("depthwise", one("expand", FilterPrune(pruning_ratio=0.5)))
    model = exporter_of("depthwise").export(network).graph.model
    groups = [a.i for n in model.graph.node for a in n.attribute if a.name == "group"]
    assert sorted(groups) == [1, 1, 6]


def test_a_channel_count_in_the_graph_is_exported_afresh() -> None:
    name = "fused_attention"
    exporter, case = exporter_of(name), make_case(name)
    assert not exporter.export(candidate(name)).fresh
    network = candidate(name, *all_pruned(name), one("up", LowRank(rank_ratio=0.5)))
    floating = exporter.export(network)
    assert floating.fresh and floating.parity <= 1e-4
    layers = {layer.name for layer in graph_of(name).layers}
    assert set(floating.graph.sites) == layers - {"up"} | {"up.0", "up.1"}
    assert_tidy(floating.graph.model)
    for batch in (1, 3, 64):
        x = case.inputs[0][:batch]
        found = run_onnx(floating.graph.model, [x.numpy()])[0]
        np.testing.assert_allclose(found, network(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def tampered(graph: Graph, change) -> Graph:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for initializer in model.graph.initializer:
        if initializer.name == "head.weight":
            value = change(numpy_helper.to_array(initializer))
            initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    return Graph(model, graph.sites)


def last_row(value: float):
    def change(weight):
        changed = weight.copy()
        changed[-1, -1] = value
        return changed

    return change


@pytest.mark.parametrize("value", [5.0, np.nan, np.inf])
def test_a_file_that_computes_something_else_is_refused(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, network = exporter_of("residual"), candidate("residual")
    graph = exporter.export(network).graph
    wrong = tampered(graph, last_row(value))
    monkeypatch.setattr(Skeleton, "fill", lambda self, network: wrong)
    monkeypatch.setattr(exporter_module, "export_afresh", lambda *args: wrong)
    with pytest.raises(ExportError, match="does not compute") as caught:
        exporter.export(network)
    assert f"{PARITY_TOLERANCE:g}" in str(caught.value.allowed)


def test_a_wrong_fill_is_mended_by_a_fresh_export(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, network = exporter_of("residual"), candidate("residual")
    good = exporter.export(network).graph
    monkeypatch.setattr(Skeleton, "fill", lambda self, n: tampered(good, last_row(5.0)))
    monkeypatch.setattr(exporter_module, "export_afresh", lambda *args: good)
    assert exporter.export(network).fresh


def test_a_lost_output_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, network = exporter_of("residual"), candidate("residual")
    graph = exporter.export(network).graph
    with torch.no_grad():
        longer = copy.deepcopy(network)
        longer.head = nn.Linear(12, 6)
    monkeypatch.setattr(Skeleton, "fill", lambda self, n: graph)
    monkeypatch.setattr(exporter_module, "export_afresh", lambda *args: graph)
    with pytest.raises(ExportError, match="shape"):
        exporter.export(longer)


class _Unexportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        return made if made.detach().sum().item() > 0 else -made


def test_a_network_that_cannot_be_exported_is_an_export_error() -> None:
    network, x = _Unexportable().eval(), torch.randn(4, 4)
    with pytest.raises(ExportError, match="cannot be exported") as caught:
        Exporter(network, trace(network, (x,)), (x,), (x,))
    assert caught.value.given == "_Unexportable" and caught.value.advice


class _Variadic(nn.Module):
    """Wraps a network of two inputs, as users do to pick among its outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.network(x, *others)


def test_a_forward_function_with_any_number_of_inputs() -> None:
    case = make_case("two_inputs")
    network = _Variadic(case.network).eval()
    graph = trace(network, case.example_inputs)
    floating = Exporter(network, graph, case.example_inputs, case.inputs).export(network)
    assert len(floating.graph.model.graph.input) == 2 and floating.parity <= 1e-4
    found = run_onnx(floating.graph.model, arrays(tuple(x[:5] for x in case.inputs)))[0]
    assert found.shape == (5, 5)


class _Shared(nn.Module):
    """One convolution that is called twice, with the same bias values as another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.output = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.output(torch.relu(self.twice(torch.relu(self.twice(x)))))


@pytest.fixture(scope="module")
def shared() -> tuple[nn.Module, Exporter, Tensor]:
    torch.manual_seed(0)
    network, x = _Shared().eval(), torch.randn(16, 2, 5, 5)
    with torch.no_grad():
        for layer in (network.stem, network.twice, network.output):
            layer.bias.copy_(torch.tensor([0.1, 0.0, -0.2, 0.3]))
    enliven(network, (x,))
    return network, Exporter(network, trace(network, (x[:2],)), (x[:2],), (x[:8],)), x


def test_layers_with_equal_biases_keep_their_own(shared) -> None:
    """An exporter may share equal initializers; a candidate's biases differ again."""
    network, exporter, _ = shared
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.twice.bias += 1
        changed.output.bias -= 1
    assert exporter.export(changed).parity <= 1e-4


def test_a_layer_that_is_called_twice_becomes_integer_twice(shared) -> None:
    network, exporter, x = shared
    rounded = marked(network, STATIC)
    quantized = quantize(exporter.export(rounded), [x.numpy()], make_device())
    assert quantized.integer_layers == 3
    assert_tidy(quantized.model)
    found = run_onnx(quantized.model, [x.numpy()])[0]
    assert relative_error(found, network(x).detach().numpy()) < 0.05
