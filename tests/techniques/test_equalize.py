from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import (
    DENSE,
    assemble,
    bank_of,
    enliven,
    gathered,
    graph_of,
    make_case,
    make_device,
    run,
)
from torch import Tensor, nn

from autocompress.bank.gradients import collect_gradients
from autocompress.graph import NetworkGraph, trace
from autocompress.graph.norms import fold_batch_norms
from autocompress.plan import Plan, Step
from autocompress.techniques.equalize import EQUALIZE, Equalize, equalize, equalized
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.rounding import Grid, search_scale

THREE = Equalize(iterations=3)


class Separable(nn.Module):
    """Two depthwise blocks whose channels have badly different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn1(self.depthwise(x)))
        return self.head(F.relu(self.project(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def separable() -> tuple[nn.Module, NetworkGraph, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(64, 2, 8, 8, generator=generator),)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = Separable()
        enliven(network, inputs)
    with torch.no_grad():
        for layer, norm in ((network.stem, network.bn0), (network.depthwise, network.bn1)):
            spread = torch.logspace(-1.5, 1.5, 8)[torch.randperm(8, generator=generator)]
            norm.weight *= spread
            norm.bias *= spread
            following = network.depthwise if layer is network.stem else network.project
            shape = (-1, 1, 1, 1) if layer is network.stem else (1, -1, 1, 1)
            following.weight /= spread.reshape(shape)
    return network, trace(network, (inputs[0][:2],)), inputs


def rounded(network: nn.Module, graph: NetworkGraph, bits: int) -> nn.Module:
    """Weights with their norms folded in, one scale for each whole weight."""
    folded = fold_batch_norms(network, graph.norms)
    grid = Grid(bits, per_tensor=True)
    with torch.no_grad():
        for layer in graph.layers:
            weight = folded.get_submodule(layer.name).weight
            rows = weight.flatten(1)
            weight.copy_(grid.nearest(rows, search_scale(rows, grid)).reshape(weight.shape))
    return folded


@pytest.mark.parametrize("name", DENSE)
def test_outputs_stay(name: str) -> None:
    case = make_case(name)
    network = copy.deepcopy(case.network)
    equalize(network, graph_of(name), case.example_inputs, THREE)
    for a, b in zip(run(network, case.inputs), run(case.network, case.inputs), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize(
    ("name", "groups"),
    [("residual", 4), ("concat", 3), ("flatten", 2), ("signal", 2), ("two_inputs", 2)],
)
def test_every_plain_group_is_equalized(name: str, groups: int) -> None:
    case = make_case(name)
    network = copy.deepcopy(case.network)
    assert equalize(network, graph_of(name), case.example_inputs, THREE) == groups
    changed = [
        not torch.equal(a, b)
        for a, b in zip(network.parameters(), case.network.parameters(), strict=True)
    ]
    assert any(changed)


def test_activations_that_are_not_homogeneous_are_left_alone() -> None:
    case = make_case("tokens")
    network = copy.deepcopy(case.network)
    assert equalize(network, graph_of("tokens"), case.example_inputs, THREE) == 0
    pairs = zip(network.parameters(), case.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any("input_factor" in name for name, _ in network.named_buffers())


def test_relu6_is_seen_although_small_inputs_never_reach_it() -> None:
    case = make_case("depthwise")
    network = copy.deepcopy(case.network)
    small = tuple(0.1 * x for x in case.example_inputs)
    equalize(network, graph_of("depthwise"), small, THREE)
    layers = ("expand", "depthwise", "bn1", "bn2")
    assert all(
        torch.equal(network.get_submodule(n).weight, case.network.get_submodule(n).weight)
        for n in layers
    )


def test_no_iterations_change_nothing() -> None:
    case = make_case("residual")
    network = copy.deepcopy(case.network)
    assert equalize(network, graph_of("residual"), case.example_inputs, EQUALIZE.identity) == 0
    pairs = zip(network.parameters(), case.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_ranges_of_writer_and_reader_meet_in_the_middle() -> None:
    """One pair of layers: both have the range sqrt(r1 r2) in every channel, up to one factor."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for layer, seed in ((network[0], 0), (network[2], 1)):
            generator = torch.Generator().manual_seed(seed)
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        network[0].weight *= torch.tensor([0.01, 0.1, 1, 30])[:, None]
    x = (torch.randn(2, 3, generator=torch.Generator().manual_seed(2)),)
    first = network[0].weight.detach().abs().amax(1)
    second = network[2].weight.detach().abs().amax(0)
    assert equalize(network, trace(network, x), x, Equalize(iterations=1)) == 1
    after = [network[0].weight.detach().abs().amax(1), network[2].weight.detach().abs().amax(0)]
    wanted = (first * second).sqrt()
    for found in after:
        torch.testing.assert_close(found / found.max(), wanted / wanted.max())


@pytest.mark.parametrize("bits", [8, 6])
def test_one_scale_per_weight_loses_less_on_a_depthwise_network(separable, bits: int) -> None:
    network, graph, inputs = separable
    wanted = run(network, inputs)[0]
    before = float((run(rounded(network, graph, bits), inputs)[0] - wanted).square().mean())
    changed = copy.deepcopy(network)
    assert equalize(changed, graph, (inputs[0][:2],), THREE) == 2
    after = float((run(rounded(changed, graph, bits), inputs)[0] - wanted).square().mean())
    assert after < 0.2 * before


def test_statistics_and_gradients_follow_the_weights(separable) -> None:
    network, graph, inputs = separable
    changed = copy.deepcopy(network)
    equalize(changed, graph, (inputs[0][:2],), THREE)
    known = [gathered(n, graph.layers, inputs, 4096) for n in (network, changed)]
    slopes = [collect_gradients(n, graph.layers, inputs) for n in (network, changed)]
    for name in ("project", "head", "stem"):
        layer, module = graph.layer(name), changed.get_submodule(name)
        found, moved = equalized(module, layer, known[0][name], slopes[0][name])
        assert found is not None and moved is not None
        for field in ("moment", "mean", "magnitude", "zero_share"):
            a, b = getattr(found, field), getattr(known[1][name], field)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
        wanted = slopes[1][name].fisher
        torch.testing.assert_close(moved.fisher, wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))
    assert hasattr(changed.project, "input_factor") and hasattr(changed.project, "output_factor")
    assert not hasattr(changed.stem, "input_factor") and not hasattr(changed.stem, "output_factor")


def test_a_pruned_and_decomposed_network_is_equalized_as_it_stands() -> None:
    case, bank = make_case("residual"), bank_of("residual")
    group = next(g for g in graph_of("residual").groups if g.prunable)
    for steps in (
        (Step(group.name, FilterPrune(pruning_ratio=0.5)),),
        (Step("block1.conv1", LowRank(rank_ratio=0.5)),),
        (
            Step(group.name, FilterPrune(pruning_ratio=0.5)),
            Step("block1.conv1", LowRank(rank_ratio=0.5)),
        ),
    ):
        network = assemble(bank, Plan(steps)).network
        wanted = run(network, case.inputs)[0]
        assert equalize(network, graph_of("residual"), case.example_inputs, THREE) >= 3
        found = run(network, case.inputs)[0]
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_choices_leave_out_what_does_nothing() -> None:
    offered = [Equalize(iterations=k) for k in (2, 0, 1)]
    found = EQUALIZE.choices(graph_of("residual"), offered, make_device())
    assert found == (offered[2], offered[0])
