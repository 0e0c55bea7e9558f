from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from networks import NAMES, assemble, bank_of, graph_of, make_case, make_device, run
from torch import nn

from autocompress.bank import Bank
from autocompress.config import CalibrationSettings
from autocompress.graph import ChannelGroup
from autocompress.graph.groups import dense_consumers, dense_producers, kept_size, remove_channels
from autocompress.plan import Plan, Step
from autocompress.techniques.filter_prune import FILTER_PRUNE, FilterPrune

CRITERIA = get_args(FilterPrune.model_fields["criterion"].annotation)
ATTENTION = ("attention", "fused_attention")


def prunable(name: str) -> list[ChannelGroup]:
    return [group for group in graph_of(name).groups if group.prunable]


def rebuilt(name: str, network: nn.Module, folder: Path) -> Bank:
    """A bank of a changed network."""
    bank = Bank(network, graph_of(name), 1, folder)
    bank.calibrate(make_case(name).inputs, CalibrationSettings())
    return bank


def order(name: str, group: str, criterion: str) -> list[int]:
    decision = FilterPrune(pruning_ratio=0.5, criterion=criterion)  # type: ignore[arg-type]
    return bank_of(name).order(graph_of(name).group(group), FILTER_PRUNE, decision).tolist()


def test_each_channel_count_is_offered_once_and_the_full_one_never() -> None:
    group = graph_of("residual").group("stem+1")
    offers = [FilterPrune(pruning_ratio=r / 20) for r in range(20)]
    for multiple, sizes in ((1, [7, 6, 5, 4, 3, 2, 1]), (4, [4]), (8, [])):
        device = make_device(channel_multiple=multiple)
        chosen = FILTER_PRUNE.choices(group, offers, device)
        assert [kept_size(8, d.pruning_ratio, multiple) for d in chosen] == sizes  # type: ignore[attr-defined]


def test_choices_of_several_criteria_go_from_the_mildest_to_the_strongest() -> None:
    group = graph_of("residual").group("stem+1")
    offers = [
        FilterPrune(pruning_ratio=r, criterion=c, refit=f)
        for c in ("l1", "zeros") for f in (True, False) for r in (0.26, 0.5, 0.25)
    ]  # fmt: skip
    chosen = FILTER_PRUNE.choices(group, offers, make_device())
    assert [d.pruning_ratio for d in chosen] == [0.26] * 4 + [0.5] * 4  # type: ignore[attr-defined]
    assert len({(d.criterion, d.refit) for d in chosen}) == 4  # type: ignore[attr-defined]


def test_groups_that_cannot_be_pruned_are_offered_nothing() -> None:
    group = graph_of("residual").group("head")
    assert FILTER_PRUNE.choices(group, [FilterPrune(pruning_ratio=0.5)], make_device()) == ()


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_are_counted_singly_whatever_multiple_the_device_rewards(name: str) -> None:
    group = graph_of(name).group("attention.heads")
    offers = [FilterPrune(pruning_ratio=r) for r in (0.25, 0.5, 0.75, 0.9)]
    assert len(FILTER_PRUNE.choices(group, offers, make_device(channel_multiple=8))) == 3


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_orders_every_group(name: str, criterion: str) -> None:
    for group in prunable(name):
        found = order(name, group.name, criterion)
        assert sorted(found) == list(range(group.size))


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "reconstruction"])
def test_the_criteria_differ_from_one_another(criterion: str) -> None:
    found = {
        c: [tuple(order("residual", g.name, c)) for g in prunable("residual")] for c in CRITERIA
    }
    assert all(found[criterion] != found[c] for c in CRITERIA if c != criterion)


@pytest.mark.parametrize("criterion", ["l1", "l2", "connection"])
@pytest.mark.parametrize("name", ["residual", "flatten", *ATTENTION])
def test_a_channel_without_weights_goes_first(name: str, criterion: str, tmp_path: Path) -> None:
    """Written with zeros by all its layers."""
    case = make_case(name)
    for group in prunable(name):
        network = copy.deepcopy(case.network)
        for member in dense_producers(network, group):
            with torch.no_grad():
                network.get_submodule(member.module).weight[member.select([2])] = 0
        bank = rebuilt(name, network, tmp_path)
        decision = FilterPrune(pruning_ratio=0.5, criterion=criterion)  # type: ignore[arg-type]
        assert int(bank.order(group, FILTER_PRUNE, decision)[0]) == 2


@pytest.mark.parametrize("criterion", ["activation", "zeros", "taylor", "reconstruction"])
def test_a_dead_channel_goes_first(criterion: str, tmp_path: Path) -> None:
    case = make_case("residual")
    network = copy.deepcopy(case.network)
    with torch.no_grad():
        network.block1.bn1.weight[3] = 0
        network.block1.bn1.bias[3] = -1
    bank = rebuilt("residual", network, tmp_path)
    group = graph_of("residual").group("block1.conv1")
    decision = FilterPrune(pruning_ratio=0.5, criterion=criterion)  # type: ignore[arg-type]
    assert int(bank.order(group, FILTER_PRUNE, decision)[0]) == 3


def test_without_zeros_the_magnitude_decides() -> None:
    assert order("fused_attention", "up", "zeros") == order("fused_attention", "up", "activation")


@pytest.mark.parametrize("name", ["residual", *ATTENTION])
def test_without_refit_the_channels_are_plainly_taken_out(name: str) -> None:
    case, groups = make_case(name), prunable(name)
    decision = FilterPrune(pruning_ratio=0.5, criterion="l1", refit=False)
    plan = Plan(tuple(Step(g.name, decision) for g in groups))
    found = assemble(bank_of(name), plan).network
    wanted = copy.deepcopy(case.network)
    removals = [
        (g, order(name, g.name, "l1")[: g.size - kept_size(g.size, 0.5, 1)]) for g in groups
    ]
    remove_channels(wanted, removals)
    for a, b in zip(run(found, case.inputs), run(wanted, case.inputs), strict=True):
        assert torch.equal(a, b)


def loss_of(network: nn.Module, name: str) -> float:
    case = make_case(name)
    one, other = run(network, case.inputs)[0], run(case.network, case.inputs)[0]
    return float((one - other).square().mean() / other.var())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ATTENTION)
def test_refitting_the_projection_makes_up_for_heads(name: str, criterion: str) -> None:
    losses = []
    for refit in (True, False):
        decision = FilterPrune(pruning_ratio=0.5, criterion=criterion, refit=refit)  # type: ignore[arg-type]
        network = assemble(bank_of(name), Plan((Step("attention.heads", decision),))).network
        reader = dense_consumers(network, graph_of(name).group("attention.heads"))[0].module
        assert network.get_submodule(reader).in_features == 6
        losses.append(loss_of(network, name))
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("name", ATTENTION)
def test_the_first_head_to_go_is_the_cheapest_to_make_up_for(name: str) -> None:
    """By brute force: least squares of the projection's outputs from the other heads' columns."""
    case, group = make_case(name), graph_of(name).group("attention.heads")
    (reader,) = dense_consumers(case.network, group)
    layer = case.network.get_submodule(reader.module)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    run(case.network, case.inputs)
    handle.remove()
    x = seen[0].flatten(0, -2).double()
    x = x - x.mean(0)
    damping = 1e-2 * x.square().mean()
    h = x.T @ x / len(x) + damping * torch.eye(x.shape[1], dtype=torch.float64)
    weight = layer.weight.detach().double()
    costs = []
    for head in range(group.size):
        gone = reader.select([head])
        kept = [i for i in range(x.shape[1]) if i not in gone]
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.T).T
        lost = weight - fitted
        costs.append(float(((lost @ h) * lost).sum()))
    assert order(name, "attention.heads", "reconstruction")[0] == costs.index(min(costs))
