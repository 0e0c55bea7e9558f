from __future__ import annotations

import copy

import pytest
import torch
from models import all_decomposed, all_int8, all_pruned, candidate
from networks import enliven, graph_of, make_case, run
from torch import Tensor, nn

from autocompress.graph import trace
from autocompress.graph.norms import fold_batch_norms

NORMED = ("residual", "depthwise", "signal")


def normed(norm: nn.Module, bias: bool) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 6, 3, bias=bias), norm, nn.ReLU(), nn.Conv2d(6, 3, 1))
    x = torch.randn(16, 2, 5, 5)
    enliven(network, (x,))
    return network, (x,)


def has_norm(network: nn.Module) -> bool:
    return any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in network.modules())


def assert_same_outputs(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for a, b in zip(run(one, inputs), run(other, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [(), all_pruned, all_decomposed], ids=["plain", "prune", "rank"])
@pytest.mark.parametrize("name", NORMED)
def test_folding_keeps_the_outputs(name: str, steps) -> None:
    network = candidate(name, *(steps(name) if steps else ()))
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network, graph_of(name).norms)
    assert has_norm(network) and not has_norm(folded)
    assert_same_outputs(folded, network, make_case(name).inputs)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_with_and_without_bias_and_affine_weights(bias: bool, affine: bool) -> None:
    network, inputs = normed(nn.BatchNorm2d(6, affine=affine), bias)
    folded = fold_batch_norms(network, trace(network, inputs).norms)
    assert not has_norm(folded)
    assert_same_outputs(folded, network, inputs)


def test_negative_and_zero_scales_of_a_norm() -> None:
    network, inputs = normed(nn.BatchNorm2d(6), bias=True)
    with torch.no_grad():
        network[1].weight[:2] = torch.tensor([-1.5, 0.0])
    folded = fold_batch_norms(network, {"0": "1"})
    assert_same_outputs(folded, network, inputs)
    assert not bool(folded[0].weight[1].any())


@pytest.mark.parametrize("name", NORMED)
def test_the_integers_of_a_rounded_layer_stay_the_same(name: str) -> None:
    network = candidate(name, *all_int8(name))
    with torch.no_grad():
        for norm in graph_of(name).norms.values():
            network.get_submodule(norm).weight[::2] *= -1
    folded = fold_batch_norms(network, graph_of(name).norms)
    for layer in graph_of(name).layers:
        before, after = network.get_submodule(layer.name), folded.get_submodule(layer.name)
        one, other = (m.weight.detach().flatten(1) / m.weight_scale for m in (before, after))
        torch.testing.assert_close(other.abs(), one.abs().round(), rtol=0, atol=1e-2)
        assert bool((after.weight_scale > 0).all())


def test_the_last_part_of_a_decomposed_layer_takes_the_norm() -> None:
    network = candidate("residual", *all_decomposed("residual"))
    folded = fold_batch_norms(network, graph_of("residual").norms)
    before, after = network.block1.conv1, folded.block1.conv1
    assert torch.equal(before[0].weight, after[0].weight) and after[0].bias is None
    assert not torch.equal(before[1].weight, after[1].weight) and after[1].bias is not None
