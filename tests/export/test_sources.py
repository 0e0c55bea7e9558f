"""Which initializer holds which parameter, where that is not plain to see."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.export.exporter import Exporter
from autocompress.graph import trace
from autocompress.graph.unpacked import with_unpacked


def exporter_of(network: nn.Module, inputs: Tensor) -> Exporter:
    graph = trace(network.eval(), (inputs[:2],))
    return Exporter(network, graph, (inputs[:2],), (inputs,))


def with_changed(network: nn.Module, name: str) -> nn.Module:
    changed = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in changed.get_submodule(name).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return changed


def test_equal_parameters_are_told_apart_and_keep_their_values() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    for layer in network:
        nn.init.zeros_(layer.bias)
        layer.weight = nn.Parameter(network[0].weight.detach().clone())
    exporter = exporter_of(network, torch.randn(8, 3, 6))
    assert exporter.faults == {}
    for name in "012":
        found = exporter.export(with_changed(network, name))
        assert not found.fresh
    kept = [
        numpy_helper.to_array(i) for i in exporter.export(network).graph.model.graph.initializer
    ]
    assert sum(value.shape == (6,) and not value.any() for value in kept) == 3


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(F.relu(self.layer(x)))))


def test_a_layer_that_is_called_twice_has_one_weight_in_the_graph() -> None:
    torch.manual_seed(0)
    network = Twice()
    exporter = exporter_of(network, torch.randn(8, 5, 6))
    found = exporter.export(with_changed(network, "layer"))
    assert not found.fresh
    assert sum(list(i.dims) == [6, 6] for i in found.graph.model.graph.initializer) == 1
    divided = copy.deepcopy(network)
    divided.layer = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6))
    assert not exporter.export(divided).fresh


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x) + x * self.layer.weight.sum(1))


def test_a_weight_that_something_else_reads_is_found_before_the_search() -> None:
    torch.manual_seed(0)
    exporter = exporter_of(ReadsWeight(), torch.randn(8, 5, 6))
    assert set(exporter.faults) == {"layer"}
    assert "ONNX graph" in exporter.faults["layer"]


class Folded(nn.Module):
    """The exporter computes `scale * weight` once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(x)) + F.linear(x, 2.0 * self.layer.weight))


def test_a_copy_of_a_weight_that_the_graph_made_is_found_before_the_search() -> None:
    torch.manual_seed(0)
    network = Folded()
    exporter = exporter_of(network, torch.randn(8, 5, 6))
    assert set(exporter.faults) == {"layer"}
    assert exporter.export(with_changed(network, "layer")).parity < 1e-3


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4)
        self.head = nn.Linear(4 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


def test_a_weight_into_which_the_exporter_puts_a_norm_is_not_taken_for_the_network_s() -> None:
    torch.manual_seed(0)
    network = Volumes()
    network.train()(torch.randn(32, 1, 4, 4, 4) + 1)
    exporter = exporter_of(network.eval(), torch.randn(8, 1, 4, 4, 4))
    assert not exporter.export(network).fresh
    assert not exporter.export(with_changed(network, "head")).fresh
    assert exporter.export(with_changed(network, "norm")).parity < 1e-3


class Positions(nn.Module):
    """Rows that are the same for all inputs: a runtime may compute them once, the file may not."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x + self.places(torch.arange(x.shape[1]))))


def test_the_graph_follows_a_table_whose_rows_are_read_in_a_fixed_order() -> None:
    torch.manual_seed(0)
    network = Positions()
    exporter = exporter_of(network, torch.randn(8, 5, 6))
    assert exporter.faults == {}
    assert not exporter.export(with_changed(network, "places")).fresh


class Last(nn.Module):
    def __init__(self, cells: nn.Module) -> None:
        super().__init__()
        self.cells, self.head = cells, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_graph_follows_each_matrix_of_a_recurrent_layer(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 6)
    plain = Last(kind(6, 8, num_layers=2, batch_first=True, bidirectional=True))
    network = with_unpacked(plain.eval(), (x[:2],))
    exporter = exporter_of(network, x)
    assert exporter.faults == {}
    tables = [name for name, m in network.named_modules() if isinstance(m, nn.Embedding)]
    assert len(tables) == 8
    for name in tables:
        found = exporter.export(with_changed(network, name))
        assert not found.fresh
        assert kind.__name__ in {node.op_type for node in found.graph.model.graph.node}
