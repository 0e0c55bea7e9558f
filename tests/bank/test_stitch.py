from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NAMES, SAMPLES, assemble, bank_of, graph_of, make_case, new_bank, run
from torch import Tensor, nn

from autocompress.bank import stitch
from autocompress.bank.statistics import unfold_inputs
from autocompress.errors import PlanError
from autocompress.graph.groups import remove_channels
from autocompress.plan import Decision, Plan, Step
from autocompress.recover import BatchNormRepair
from autocompress.techniques.codebook import Codebook
from autocompress.techniques.entropy_grid import EntropyGrid
from autocompress.techniques.filter_prune import FILTER_PRUNE, FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision
from autocompress.techniques.reconstruction import DAMPING
from autocompress.techniques.weight_prune import WeightPrune


def plan(**steps: Decision | Sequence[Decision]) -> Plan:
    """Targets by keyword, `__` for a dot."""
    return Plan(
        tuple(
            Step(target.replace("__", "."), decision)
            for target, decisions in steps.items()
            for decision in ([decisions] if isinstance(decisions, Decision) else decisions)
        )
    )


def prune(**ratios: float) -> Plan:
    return plan(**{name: FilterPrune(pruning_ratio=ratio) for name, ratio in ratios.items()})


def kept_channels(network: str, group: str, kept: int) -> list[int]:
    found = graph_of(network).group(group)
    order = bank_of(network).order(found, FILTER_PRUNE, FILTER_PRUNE.identity).tolist()
    return sorted(order[found.size - kept :])


def refit_by_hand(layer: nn.Module, inputs: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    """Weight and shift by numpy's least squares on the layer's own inputs, damped and centred."""
    rows = unfold_inputs(layer, inputs, torch.Generator(), 10**9).double().numpy()
    weight = layer.weight.detach().double().numpy().reshape(len(layer.weight), -1)
    mean = rows.mean(0)
    x = (rows - mean) / np.sqrt(len(rows))
    damping = np.sqrt(DAMPING * np.square(x).sum(0).mean()) * np.eye(x.shape[1])
    a = np.concatenate([x, damping])
    fitted = np.linalg.lstsq(a[:, keep], a @ weight.T, rcond=None)[0].T
    shift = weight @ mean - fitted @ mean[keep]
    return torch.as_tensor(fitted).float(), torch.as_tensor(shift).float()


@pytest.mark.parametrize("pruned", [{"left": 0.5}, {"left": 0.5, "right": 0.5}])
def test_a_stitched_network_is_the_pruned_one_with_its_readers_refitted(
    pruned: dict[str, float],
) -> None:
    """Two groups that one convolution reads are refitted together."""
    case = make_case("concat")
    network = copy.deepcopy(case.network)
    left = kept_channels("concat", "left", 3 if "left" in pruned else 6)
    right = kept_channels("concat", "right", 4 if "right" in pruned else 8)
    x = case.inputs[0]
    with torch.no_grad():
        both = torch.cat([F.relu(network.left(x)), F.relu(network.right(x))], 1)
        columns = [c * 9 + i for c in [*left, *(6 + r for r in right)] for i in range(9)]
        weight, shift = refit_by_hand(network.join, both, columns)
        features = torch.cat(
            [F.relu(network.left(x))[:, left], F.relu(network.right(x))[:, right]], 1
        )
        joined = F.conv2d(
            features, weight.reshape(8, -1, 3, 3), network.join.bias + shift, padding=1
        )
        expected = network.head(F.relu(joined).mean((2, 3)))
    stitched = assemble(bank_of("concat"), prune(**pruned)).network
    assert stitched.left.out_channels == len(left) and stitched.right.out_channels == len(right)
    torch.testing.assert_close(stitched(x).detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_flattened_group_is_refitted_by_hand() -> None:
    case = make_case("flatten")
    network, x = case.network, case.inputs[0]
    keep = kept_channels("flatten", "conv", 3)
    with torch.no_grad():
        features = F.max_pool2d(F.relu(network.conv(x)), 2)
        columns = [c * 9 + i for c in keep for i in range(9)]
        weight, shift = refit_by_hand(network.hidden, features.flatten(1), columns)
        hidden = F.linear(features[:, keep].flatten(1), weight, network.hidden.bias + shift)
        expected = network.head(F.relu(hidden))
    stitched = assemble(bank_of("flatten"), prune(conv=0.5)).network
    torch.testing.assert_close(stitched(x).detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_reader_that_loses_its_own_outputs_keeps_the_right_rows() -> None:
    stitched = assemble(bank_of("flatten"), prune(conv=0.5, hidden=0.5)).network
    alone = assemble(bank_of("flatten"), prune(conv=0.5)).network
    rows = kept_channels("flatten", "hidden", 8)
    assert torch.equal(stitched.hidden.weight, alone.hidden.weight[rows])
    assert torch.equal(stitched.hidden.bias, alone.hidden.bias[rows])
    original = make_case("flatten").network
    assert torch.equal(
        stitched.conv.weight, original.conv.weight[kept_channels("flatten", "conv", 3)]
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_refit_lessens_the_harm_of_pruning(name: str) -> None:
    """Summed over the groups, on the data that it was fitted to, norms repaired in both cases."""
    case = make_case(name)
    repair = BatchNormRepair(case.network, case.inputs, SAMPLES)
    original = run(case.network, case.inputs)
    harm = {"refit": 0.0, "plain": 0.0}
    for group in (g for g in graph_of(name).groups if g.prunable):
        stitched = assemble(
            bank_of(name), Plan((Step(group.name, FilterPrune(pruning_ratio=0.5)),))
        )
        gone = (
            bank_of(name)
            .order(group, FILTER_PRUNE, FILTER_PRUNE.identity)[: group.size // 2]
            .tolist()
        )
        plain = copy.deepcopy(case.network)
        remove_channels(plain, [(group, gone)])
        for kind, network in (("refit", stitched.network), ("plain", plain)):
            repair(network, stitched.kept_channels)
            pairs = zip(run(network, case.inputs), original, strict=True)
            harm[kind] += sum(float((a - b).square().mean()) for a, b in pairs)
    assert harm["refit"] < 0.75 * harm["plain"]


@pytest.mark.parametrize("name", NAMES)
def test_a_ratio_of_zero_changes_nothing(name: str) -> None:
    case = make_case(name)
    groups = [g for g in graph_of(name).groups if g.prunable]
    nothing = Plan(tuple(Step(g.name, FilterPrune(pruning_ratio=0)) for g in groups))
    found = run(assemble(bank_of(name), nothing).network, case.inputs)
    assert all(
        torch.equal(a, b) for a, b in zip(found, run(case.network, case.inputs), strict=True)
    )


def test_norms_tell_which_channels_they_kept() -> None:
    stitched = assemble(bank_of("residual"), prune(**{"stem+1": 0.5, "block2.conv1": 0.25}))
    stem, inner = (
        kept_channels("residual", "stem+1", 4),
        kept_channels("residual", "block2.conv1", 9),
    )
    assert stitched.kept_channels == {
        "bn": tuple(stem), "block1.bn2": tuple(stem), "block2.bn1": tuple(inner),
    }  # fmt: skip
    original = make_case("residual").network
    for name, kept in stitched.kept_channels.items():
        old, new = original.get_submodule(name), stitched.network.get_submodule(name)
        for field in ("running_mean", "running_var", "weight", "bias"):
            assert torch.equal(getattr(new, field), getattr(old, field)[list(kept)])


def test_a_depthwise_convolution_keeps_the_filters_of_its_channels() -> None:
    stitched = assemble(bank_of("depthwise"), prune(expand=0.5)).network
    keep = kept_channels("depthwise", "expand", 6)
    original = make_case("depthwise").network
    assert stitched.depthwise.groups == 6
    assert torch.equal(stitched.depthwise.weight, original.depthwise.weight[keep])


def test_levels_are_nested() -> None:
    """What a milder level removes, a stronger one removes too."""
    mild = kept_channels("residual", "stem+1", 6)
    strong = kept_channels("residual", "stem+1", 2)
    assert set(strong) < set(mild)


def test_channel_counts_are_multiples_that_the_device_rewards(tmp_path) -> None:
    bank = new_bank("residual", tmp_path, multiple=4)
    steps = (
        Step("stem+1", FilterPrune(pruning_ratio=0.4)),
        Step("block2.conv1", FilterPrune(pruning_ratio=0.25)),
        Step("block2.conv2", LowRank(rank_ratio=0.6)),
    )
    network = assemble(bank, Plan(steps)).network
    assert network.stem.out_channels == 4
    assert network.block2.conv1.out_channels == 8
    assert network.block2.conv2[0].out_channels == 8


def test_decomposing_a_pruned_layer_uses_its_pruned_inputs() -> None:
    """Full rank gives the pruned network back; the factors know what was pruned before."""
    case = make_case("residual")
    pruned = prune(**{"stem+1": 0.5, "block1.conv1": 0.25})
    full = Plan((*pruned.steps, Step("block1.conv1", LowRank(rank_ratio=1))))
    one, other = (assemble(bank_of("residual"), p).network for p in (pruned, full))
    assert isinstance(other.block1.conv1, nn.Sequential)
    torch.testing.assert_close(one(*case.inputs), other(*case.inputs), rtol=1e-3, atol=1e-3)


def test_both_parts_of_a_decomposed_layer_are_rounded() -> None:
    steps = (LowRank(rank_ratio=0.5), Precision(weight_bits=8, activation_bits=8))
    network = assemble(bank_of("residual"), plan(block1__conv1=steps)).network
    for part in network.block1.conv1:
        codes = part.weight.detach().flatten(1) / part.weight_scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    alone = assemble(bank_of("residual"), plan(block1__conv1=steps[:1])).network
    for rounded, exact in zip(network.block1.conv1, alone.block1.conv1, strict=True):
        step = rounded.weight_scale.reshape(-1, 1, 1, 1)
        assert bool(((rounded.weight - exact.weight).abs() <= 27 * step).all())
        assert not torch.equal(rounded.weight, exact.weight)


@pytest.mark.parametrize(
    ("bad", "given", "allowed"),
    [
        (prune(nowhere=0.5), "no such group", "block1.conv1"),
        (prune(head=0.5), "output", "stem+1"),
        (plan(bn=LowRank(rank_ratio=0.5)), "low_rank of bn", "block2.shortcut"),
        (plan(nope=Precision(weight_bits=8, activation_bits=8)), "precision of nope", "stem"),
    ],
)
def test_a_plan_for_another_network_is_refused(bad: Plan, given: str, allowed: str) -> None:
    with pytest.raises(PlanError) as caught:
        assemble(bank_of("residual"), bad)
    assert given in str(caught.value.given)
    assert allowed in str(caught.value.allowed)


def test_the_order_of_the_steps_does_not_matter() -> None:
    steps = [
        Step("stem+1", FilterPrune(pruning_ratio=0.5)),
        Step("block1.conv1", LowRank(rank_ratio=0.5)),
        Step("block1.conv1", Precision(weight_bits=8, activation_bits=8)),
    ]
    bank = bank_of("residual")
    one, other = (assemble(bank, Plan(tuple(s))).network for s in (steps, steps[::-1]))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_a_part_is_solved_for_the_part_before_it_and_not_for_another(tmp_path) -> None:
    """The second part of a decomposed layer reads the first, which one plan prunes more."""

    def sparse(sparsity: float) -> Plan:
        return plan(block1__conv1=(LowRank(rank_ratio=0.5), WeightPrune(sparsity=sparsity)))

    fresh = stitch(new_bank("residual", tmp_path / "one"), sparse(0.5)).network
    bank = new_bank("residual", tmp_path / "other")
    stitch(bank, sparse(0.9))
    later = stitch(bank, sparse(0.5)).network
    for one, other in zip(fresh.state_dict().values(), later.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "decision",
    [
        Precision(weight_bits=4, activation_bits=32),
        Codebook(code_bits=4),
        EntropyGrid(step=0.5),
    ],
    ids=lambda d: d.technique,
)
@pytest.mark.parametrize("sparsity", [0.05, 0.6])
def test_pruned_weights_stay_zero_when_they_are_quantized(decision, sparsity: float) -> None:
    steps = plan(block1__conv1=(WeightPrune(sparsity=sparsity), decision))
    layer = assemble(bank_of("residual"), steps).network.block1.conv1
    assert float((~layer.weight_mask).float().mean()) == pytest.approx(sparsity, abs=0.02)
    assert not bool(layer.weight[~layer.weight_mask].any())
