from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import bank_of, graph_of, make_case, make_device, run
from problems import correlated_rows, problem_of, random_weight
from torch import Tensor, nn

from autocompress.errors import PlanError
from autocompress.techniques.reconstruction import damped_moment
from autocompress.techniques.sparsity import least_squares
from autocompress.techniques.technique import LayerGradients, LayerProblem
from autocompress.techniques.weight_prune import (
    WEIGHT_PRUNE,
    WeightPrune,
    eased,
    kept_sparsity,
    pattern_sparsity,
)

seeds = st.integers(0, 10_000)
CRITERIA = ("obs", "magnitude", "gradient")
PATTERNS = ("2:4", "1:4", "4:8")


def some_problem(
    seed: int, out: int = 6, channels: int = 8, kernel: tuple[int, ...] = ()
) -> tuple[nn.Module, LayerProblem]:
    """A layer with a bias, all that a criterion may need, and correlated inputs."""
    width = kernel[0] * kernel[1] if kernel else 1
    weight = random_weight(out, channels * width, seed)
    layer = nn.Conv2d(channels, out, kernel) if kernel else nn.Linear(channels, out)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
    rows = correlated_rows(4 * channels * width, channels * width, seed)
    problem = problem_of(weight, rows, free_bias=True, kernel=kernel)
    generator = torch.Generator().manual_seed(seed)
    gradients = LayerGradients(torch.rand(weight.shape, generator=generator), torch.ones(channels))
    return layer, replace(problem, bias=layer.bias, gradients=gradients)


def prune(layer: nn.Module, problem: LayerProblem, decision: WeightPrune) -> nn.Module:
    return WEIGHT_PRUNE.install(layer, WEIGHT_PRUNE.solve(problem, decision), decision, 1)


def mask_of(module: nn.Module) -> Tensor:
    mask = module.weight_mask
    assert isinstance(mask, Tensor) and mask.dtype == torch.bool
    return mask


@given(
    seeds,
    st.sampled_from(CRITERIA),
    st.floats(0, 0.95),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from(((), (3, 2))),
)
@settings(max_examples=60, deadline=None)
def test_the_sparsity_is_realised(
    seed: int, criterion: str, sparsity: float, out: int, channels: int, kernel: tuple[int, ...]
) -> None:
    layer, problem = some_problem(seed, out, channels, kernel)
    pruned = prune(layer, problem, WeightPrune(sparsity=sparsity, criterion=criterion))
    weight = pruned.weight
    size = weight.numel()
    gone = int((weight == 0).sum())
    assert gone == min(round(size * kept_sparsity(sparsity)), size - 1)
    if gone:
        mask = mask_of(pruned)
        assert mask.shape == weight.shape
        assert torch.equal(mask, weight != 0)
        assert "weight_mask" not in pruned.state_dict()


@given(st.floats(0, 0.95))
def test_kept_sparsity_is_the_nearest_multiple(sparsity: float) -> None:
    kept = kept_sparsity(sparsity)
    assert abs(kept - sparsity) <= 0.025 + 1e-12
    assert 0 <= kept <= 0.95
    assert kept * 20 == pytest.approx(round(kept * 20), abs=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_solve_serves_every_sparsity(criterion: str) -> None:
    _, problem = some_problem(0)
    low, high = (WeightPrune(sparsity=s, criterion=criterion) for s in (0.1, 0.9))
    one, other = (WEIGHT_PRUNE.solve(problem, d) for d in (low, high))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert WEIGHT_PRUNE.levels == ("sparsity",)


@pytest.mark.parametrize("sparsity", [step / 20 for step in range(1, 20)])
def test_every_sparsity_has_its_own_refit(sparsity: float) -> None:
    layer, problem = some_problem(1, kernel=(2, 2))
    pruned = prune(layer, problem, WeightPrune(sparsity=sparsity))
    assert problem.statistics is not None
    moment = damped_moment(problem.statistics, True)
    kept = mask_of(pruned).reshape(problem.weight.shape)
    for row, weight in enumerate(pruned.weight.reshape(problem.weight.shape)):
        expected = least_squares(problem.weight[row], moment, kept[row])
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_every_group_keeps_n_of_m_input_channels(
    criterion: str, pattern: str, kernel: tuple[int, ...]
) -> None:
    layer, problem = some_problem(2, channels=16, kernel=kernel)
    sparsity = pattern_sparsity(pattern)
    assert sparsity is not None
    decision = WeightPrune(sparsity=sparsity, pattern=pattern, criterion=criterion)
    pruned = prune(layer, problem, decision)
    kept, size = map(int, pattern.split(":"))
    channels = mask_of(pruned).reshape(6, 16 // size, size, -1)
    assert (channels.sum(2) == kept).all()
    assert torch.equal(mask_of(pruned), pruned.weight != 0)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_smallest_weights_go_and_the_others_stay(pattern: str) -> None:
    layer, problem = some_problem(3)
    decision = WeightPrune(sparsity=0.5, pattern=pattern, criterion="magnitude")
    pruned = prune(layer, problem, decision)
    mask = mask_of(pruned)
    assert torch.equal(pruned.weight, torch.where(mask, problem.weight, 0))
    size = problem.weight.abs()
    groups = [(size, mask)] if pattern == "unstructured" else []
    groups = groups or [(size[r, c : c + 4], mask[r, c : c + 4]) for r in range(6) for c in (0, 4)]
    assert all(s[m].min() > s[~m].max() for s, m in groups)


def test_the_gradient_rule_keeps_what_the_loss_needs() -> None:
    layer, problem = some_problem(4)
    assert problem.gradients is not None
    pruned = prune(layer, problem, WeightPrune(sparsity=0.5, criterion="gradient"))
    mask = mask_of(pruned)
    importance = problem.weight.square() * problem.gradients.fisher
    assert importance[mask].min() > importance[~mask].max()
    assert WEIGHT_PRUNE.uses_gradients(WeightPrune(sparsity=0.5, criterion="gradient"))
    assert not WEIGHT_PRUNE.uses_gradients(WeightPrune(sparsity=0.5))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_bias_takes_the_mean_of_what_went(criterion: str) -> None:
    layer, problem = some_problem(5)
    rows = correlated_rows(32, 8, 5)
    expected = layer(rows).mean(0)
    pruned = prune(layer, problem, WeightPrune(sparsity=0.6, criterion=criterion))
    torch.testing.assert_close(pruned(rows).mean(0), expected, rtol=1e-4, atol=1e-4)


def test_dead_inputs_lose_their_weights_first() -> None:
    layer, problem = some_problem(6)
    rows = correlated_rows(40, 8, 6)
    rows[:, 3] = 2.5
    problem = replace(
        problem, statistics=problem_of(problem.weight, rows, free_bias=True).statistics
    )
    expected = layer(rows)
    pruned = prune(layer, problem, WeightPrune(sparsity=0.1))
    # A tenth of 6 x 8 weights is less than the six of the dead column.
    assert set((~mask_of(pruned)).nonzero()[:, 1].tolist()) == {3}
    torch.testing.assert_close(pruned(rows), expected, rtol=1e-4, atol=1e-4)


def test_pruning_again_keeps_the_zeros() -> None:
    """As gradual pruning does: the second time on what the first time left."""
    layer, problem = some_problem(7)
    first = mask_of(prune(layer, problem, WeightPrune(sparsity=0.4))).clone()
    again = replace(problem, weight=layer.weight.detach().clone())
    second = mask_of(prune(layer, again, WeightPrune(sparsity=0.7)))
    assert not (second & ~first).any()


def test_no_sparsity_leaves_the_layer_as_it_is() -> None:
    layer, problem = some_problem(8)
    before = layer.weight.detach().clone()
    for sparsity in (0, 0.02):
        pruned = prune(layer, problem, WeightPrune(sparsity=sparsity))
        assert pruned is layer and torch.equal(layer.weight, before)
    assert WEIGHT_PRUNE.identity == WeightPrune(sparsity=0)


def test_a_pattern_with_another_sparsity_is_neither_offered_nor_installed() -> None:
    layer, problem = some_problem(9)
    wrong = WeightPrune(sparsity=0.75, pattern="2:4")
    right = WeightPrune(sparsity=0.49, pattern="2:4")
    assert WEIGHT_PRUNE.choices(problem.layer, [wrong, right], make_device()) == (right,)
    with pytest.raises(PlanError, match="2:4") as caught:
        prune(layer, problem, wrong)
    assert caught.value.allowed == "0.5"
    assert pattern_sparsity("unstructured") is None


def test_channels_that_make_no_groups_are_neither_offered_nor_solved() -> None:
    _, problem = some_problem(10, channels=6)
    decision = WeightPrune(sparsity=0.5, pattern="2:4")
    assert WEIGHT_PRUNE.choices(problem.layer, [decision], make_device()) == ()
    with pytest.raises(PlanError, match="multiple of 4"):
        WEIGHT_PRUNE.solve(problem, decision)


def test_choices_run_from_the_mildest_and_do_different_things() -> None:
    _, problem = some_problem(11)
    offers = [
        WeightPrune(sparsity=s, criterion=c)
        for c in ("obs", "magnitude") for s in (0.9, 0.5, 0.51, 0.01)
    ]  # fmt: skip
    found = WEIGHT_PRUNE.choices(problem.layer, offers, make_device())
    assert [(d.sparsity, d.criterion) for d in found] == [
        (0.5, "obs"), (0.5, "magnitude"), (0.9, "obs"), (0.9, "magnitude"),
    ]  # fmt: skip


def test_a_grouped_convolution_goes_by_magnitude() -> None:
    layer = graph_of("depthwise").layer("depthwise")
    offers = [WeightPrune(sparsity=0.5, criterion=c) for c in CRITERIA]
    assert WEIGHT_PRUNE.choices(layer, offers, make_device()) == (offers[0],)
    problem = bank_of("depthwise").problem("depthwise", gradients=True)
    by_brain, by_size = (WEIGHT_PRUNE.solve(problem, d) for d in offers[:2])
    assert by_brain.keys() == by_size.keys() == {"order"}
    assert torch.equal(by_brain["order"], by_size["order"])
    with pytest.raises(PlanError, match="no gradients"):
        WEIGHT_PRUNE.solve(problem, offers[2])


def test_a_whole_network_keeps_its_outputs_better_than_by_magnitude() -> None:
    case, bank = make_case("residual"), bank_of("residual")
    (wanted,) = run(case.network, case.inputs)

    def lost(criterion: str) -> float:
        network = bank.copy_network()
        for layer in bank.graph.layers:
            decision = WeightPrune(sparsity=0.5, criterion=criterion)
            prune(network.get_submodule(layer.name), bank.problem(layer.name), decision)
        (found,) = run(network, case.inputs)
        return float((found - wanted).square().mean())

    assert lost("obs") < 0.7 * lost("magnitude")


def test_zeros_take_bytes_like_any_number() -> None:
    layer = graph_of("residual").layer("block1.conv1")
    assert WEIGHT_PRUNE.stored_bytes(layer, WeightPrune(sparsity=0.9), 1) == 4 * 8 * 8 * 9


def test_a_step_on_the_way_has_a_share_of_the_sparsity() -> None:
    decision = WeightPrune(sparsity=0.8, criterion="magnitude")
    assert eased(decision, 0.5) == WeightPrune(sparsity=0.4, criterion="magnitude")
    assert eased(decision, 1) == decision
    pattern = WeightPrune(sparsity=0.5, pattern="2:4")
    assert eased(pattern, 0.3) == pattern
