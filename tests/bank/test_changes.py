"""Modules in a layer's place against the network that a plan of the one step makes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assemble, bank_of, graph_of, make_case, run
from torch import nn

from autocompress.bank import Bank
from autocompress.bank.changes import changed_layers
from autocompress.config import CalibrationSettings
from autocompress.errors import PlanError
from autocompress.graph import trace
from autocompress.plan import Decision, Plan, Step
from autocompress.techniques import (
    TECHNIQUES,
    BlockTechnique,
    GroupTechnique,
    NetworkTechnique,
    technique_named,
)
from autocompress.techniques.block_drop import BlockDrop
from autocompress.techniques.codebook import Codebook
from autocompress.techniques.entropy_grid import EntropyGrid
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.hash_code import HashCode
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision
from autocompress.techniques.weight_prune import WeightPrune

NETWORKS = ("residual", "depthwise", "concat", "attention", "tokens", "stacked")
DECISIONS: dict[str, tuple[Decision, ...]] = {
    "block_drop": (BlockDrop(drop=True),),
    "filter_prune": (
        FilterPrune(pruning_ratio=0.5),
        FilterPrune(pruning_ratio=0.5, refit=False),
        FilterPrune(pruning_ratio=0.25, criterion="taylor"),
    ),
    "low_rank": (LowRank(rank_ratio=0.5), LowRank(rank_ratio=0.5, kind="tucker")),
    "weight_prune": (WeightPrune(sparsity=0.6), WeightPrune(sparsity=0.6, criterion="gradient")),
    "precision": (
        Precision(weight_bits=8, activation_bits=8),
        Precision(weight_bits=3, activation_bits=32, rounding="nearest"),
    ),
    "codebook": (Codebook(code_bits=2),),
    "hash_code": (HashCode(hash_bits=4),),
    "entropy_grid": (EntropyGrid(step=1.0),),
}
SOLVED = [t.name for t in TECHNIQUES if not isinstance(t, NetworkTechnique)]


def test_every_technique_of_groups_or_layers_is_covered() -> None:
    assert set(DECISIONS) == set(SOLVED)


@cache
def original_outputs(name: str) -> tuple[torch.Tensor, ...]:
    case = make_case(name)
    return run(case.network, case.inputs)


def targets(name: str, decision: Decision) -> list[str]:
    """All groups and blocks; of the layers the first, some in the middle and the last."""
    graph = graph_of(name)
    if isinstance(technique_named(decision.technique), BlockTechnique):
        return [block.name for block in graph.blocks]
    if isinstance(technique_named(decision.technique), GroupTechnique):
        return [g.name for g in graph.groups if g.prunable]
    dense = [layer for layer in graph.layers if layer.groups == 1]
    if isinstance(decision, LowRank) and decision.kind == "tucker":
        dense = [layer for layer in dense if max(layer.kernel_size, default=1) > 1]
    return [layer.name for layer in dense[:: max(1, len(dense) // 3)]]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("decision", sum(DECISIONS.values(), ()), ids=str)
def test_changed_layers_compute_what_the_stitched_network_computes(
    name: str, decision: Decision
) -> None:
    case, bank = make_case(name), bank_of(name)
    before = {key: value.clone() for key, value in case.network.state_dict().items()}
    for target in targets(name, decision):
        network = copy.deepcopy(case.network)
        changed = changed_layers(bank, target, decision)
        for layer, module in changed.items():
            network.set_submodule(layer, module)
        expected = run(assemble(bank, Plan((Step(target, decision),))).network, case.inputs)
        found = run(network, case.inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        shapes = shapes_of(name, copy.deepcopy(case.network))
        gone = graph_of(name).block(target).layers if isinstance(decision, BlockDrop) else ()
        assert shapes_of(name, network) == {n: s for n, s in shapes.items() if n not in gone}
        assert any(
            (a - b).abs().max() > 1e-3 for a, b in zip(found, original_outputs(name), strict=True)
        ) or _hardly_changes(decision)
    after = case.network.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not any(m._forward_hooks for m in case.network.modules())


def _hardly_changes(decision: Decision) -> bool:
    return isinstance(decision, Precision) and decision.weight_bits == 8


def shapes_of(name: str, network: nn.Module) -> dict[str, torch.Size]:
    """The output's shape of every layer that the original has, by name."""
    found: dict[str, torch.Size] = {}

    def note(layer: str) -> Any:
        return lambda _, args, output: found.update({layer: output.shape})

    left = {module for module, _ in network.named_modules()}
    for layer in (x for x in graph_of(name).layers if x.name in left):
        network.get_submodule(layer.name).register_forward_hook(note(layer.name))
    run(network, make_case(name).example_inputs)
    return found


def test_a_folded_layer_whose_norm_makes_a_channel_constant(tmp_path: Path) -> None:
    """No division by the scale of zero: the norm that follows gives its shift whatever comes in."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    with torch.no_grad():
        network[1].weight[1] = 0
        network[1].bias[1] = 0.7
    inputs = torch.randn(32, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    network.eval()
    bank = Bank(network, trace(network, (inputs[:2],)), 1, tmp_path)
    bank.calibrate((inputs,), CalibrationSettings())
    decision = Precision(weight_bits=8, activation_bits=8, granularity="tensor")
    changed = copy.deepcopy(network)
    changed.set_submodule("0", changed_layers(bank, "0", decision)["0"])
    expected = assemble(bank, Plan((Step("0", decision),))).network
    torch.testing.assert_close(changed(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changed[:2](inputs)[:, 1], torch.full((32, 4, 4), 0.7))


def test_a_decision_that_removes_nothing_changes_nothing() -> None:
    group = next(g for g in graph_of("residual").groups if g.prunable)
    assert changed_layers(bank_of("residual"), group.name, FilterPrune(pruning_ratio=0.01)) == {}


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot be pruned"):
        changed_layers(bank_of("residual"), "no such group", FilterPrune(pruning_ratio=0.5))
