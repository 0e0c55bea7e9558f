from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Matrix,
    correlated_rows,
    damped_rows,
    group_of,
    problem_of,
    random_weight,
    statistics_of,
)
from torch import Tensor

from autocompress.techniques import removal
from autocompress.techniques.reconstruction import damped_moment, refit
from autocompress.techniques.removal import Consumer, consumer_columns, removal_order
from autocompress.techniques.technique import LayerProblem

seeds = st.integers(0, 10_000)


def least_squares(
    weight: Tensor, rows: Tensor, keep: list[int], *, free_bias: bool
) -> tuple[Matrix, float]:
    """The kept columns' best weights and their squared error, by numpy on the data itself."""
    a = damped_rows(rows, free_bias=free_bias)
    wanted = a @ weight.double().numpy().T
    fitted = np.linalg.lstsq(a[:, keep], wanted, rcond=None)[0]
    return fitted.T, float(np.square(a[:, keep] @ fitted - wanted).sum())


def channel_costs(problem: LayerProblem, rows: Tensor, size: int) -> Matrix:
    """Error of removing each channel alone as a share of the layer's energy."""
    per_channel = problem.weight.shape[1] // size
    everything = range(problem.weight.shape[1])
    a = damped_rows(rows, free_bias=problem.free_bias)
    energy = np.square(a @ problem.weight.double().numpy().T).sum()
    costs = []
    for channel in range(size):
        keep = [i for i in everything if i // per_channel != channel]
        costs.append(least_squares(problem.weight, rows, keep, free_bias=problem.free_bias)[1])
    return np.array(costs) / energy


@given(seeds, st.booleans(), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_refit_is_the_least_squares_solution(seed: int, free_bias: bool, gone: int) -> None:
    rows, weight = correlated_rows(50, 8, seed), random_weight(3, 8, seed)
    keep = sorted(np.random.default_rng(seed).permutation(8)[gone:].tolist())
    fitted, _ = refit(problem_of(weight, rows, free_bias=free_bias), keep)
    expected, _ = least_squares(weight, rows, keep, free_bias=free_bias)
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=2e-4, atol=2e-5)


def test_refit_of_every_column_is_the_weight_itself() -> None:
    rows, weight = correlated_rows(50, 6, 0), random_weight(3, 6, 0)
    fitted, shift = refit(problem_of(weight, rows, free_bias=True), range(6))
    torch.testing.assert_close(fitted, weight)
    torch.testing.assert_close(shift, torch.zeros(3), rtol=0, atol=1e-5)


def test_the_shift_keeps_the_outputs_mean() -> None:
    rows, weight = correlated_rows(200, 6, 1), random_weight(3, 6, 1)
    keep = [0, 2, 5]
    fitted, shift = refit(problem_of(weight, rows, free_bias=True), keep)
    before = (rows @ weight.T).mean(0)
    torch.testing.assert_close((rows[:, keep] @ fitted.T).mean(0) + shift, before)


def test_a_repeated_channel_is_taken_over_by_its_twin() -> None:
    rows, weight = correlated_rows(300, 6, 2), random_weight(3, 6, 2)
    rows[:, 4] = rows[:, 1]
    fitted, shift = refit(problem_of(weight, rows, free_bias=True), [0, 1, 2, 3, 5])
    lost = rows @ weight.T - (rows[:, [0, 1, 2, 3, 5]] @ fitted.T + shift)
    assert lost.square().mean() < 1e-3 * (rows @ weight.T).var()


@pytest.mark.parametrize("panel", [1, 8, 96])
@given(seed=seeds, free_bias=st.booleans(), shape=st.sampled_from([(1, ()), (4, (2, 2))]))
@settings(max_examples=25, deadline=None)
def test_the_greedy_costs_are_those_of_refits(
    panel: int, seed: int, free_bias: bool, shape: tuple[int, tuple[int, ...]]
) -> None:
    """Channel after channel costs what solves for the kept columns say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "_PANEL", panel)
        check_greedy_costs(seed, free_bias, shape)


def check_greedy_costs(seed: int, free_bias: bool, shape: tuple[int, tuple[int, ...]]) -> None:
    width, kernel = shape
    size = 6
    rows = correlated_rows(80, size * width, seed)
    weight = random_weight(3, size * width, seed)
    problem = problem_of(weight, rows, free_bias=free_bias, kernel=kernel)
    member = group_of(problem).consumers[0][1]
    state = Consumer(problem, member)
    gone = np.random.default_rng(seed).permutation(size)[:4].tolist()
    for channel in gone:
        cost = float(state.costs()[channel])
        before = [c for c in range(size) if c not in gone[: gone.index(channel)]]
        keep = [c * width + i for c in before for i in range(width)]
        after = [i for i in keep if i // width != channel]
        errors = [least_squares(weight, rows, k, free_bias=free_bias)[1] for k in (keep, after)]
        energy = np.square(damped_rows(rows, free_bias=free_bias) @ weight.double().numpy().T).sum()
        assert cost == pytest.approx((errors[1] - errors[0]) / energy, rel=1e-4, abs=1e-9)
        state.remove(channel)
    assert np.isinf(state.costs().numpy()).tolist() == [c in gone for c in range(size)]
    expected, _ = least_squares(weight, rows, after, free_bias=free_bias)
    fitted, _ = refit(problem, after)
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=2e-4, atol=2e-5)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_the_first_removal_is_the_cheapest_by_brute_force(seed: int) -> None:
    """Two readers, one of them a convolution: the costs as shares of the outputs are summed."""
    size = 5
    problems = (
        problem_of(random_weight(3, size, seed), correlated_rows(60, size, seed), free_bias=True),
        problem_of(
            10 * random_weight(2, size * 4, seed + 1),
            correlated_rows(60, size * 4, seed + 1),
            free_bias=False,
            kernel=(2, 2),
        ),
    )
    rows = (correlated_rows(60, size, seed), correlated_rows(60, size * 4, seed + 1))
    costs = sum(channel_costs(p, x, size) for p, x in zip(problems, rows, strict=True))
    order = removal_order(group_of(*problems))
    assert sorted(order.tolist()) == list(range(size))
    assert costs[order[0]] <= costs.min() * (1 + 1e-6)


def test_flattened_channels_go_as_blocks() -> None:
    """A linear layer after a flatten: each channel has several columns."""
    rows, weight = correlated_rows(80, 12, 3), random_weight(3, 12, 3)
    problem = problem_of(weight, rows, free_bias=True)
    order = removal_order(group_of(problem, per_channel=3))
    costs = channel_costs(problem, rows, 4)
    assert int(order[0]) == int(costs.argmin())
    columns = consumer_columns(problem, group_of(problem, per_channel=3).consumers[0][1])
    assert columns.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("free_bias", [True, False])
def test_a_dead_channel_goes_first(scale: float, free_bias: bool) -> None:
    rows, weight = scale * correlated_rows(60, 6, 4), random_weight(3, 6, 4)
    rows[:, 3] = 0
    weight[:, 3] *= 100
    order = removal_order(group_of(problem_of(weight, rows, free_bias=free_bias)))
    assert int(order[0]) == 3


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_constant_channel_goes_first_where_a_bias_can_replace_it(scale: float) -> None:
    rows, weight = scale * correlated_rows(60, 6, 5), random_weight(3, 6, 5)
    rows[:, 2] = 4 * scale
    order = removal_order(group_of(problem_of(weight, rows, free_bias=True)))
    assert int(order[0]) == 2
    _, shift = refit(problem_of(weight, rows, free_bias=True), [0, 1, 3, 4, 5])
    torch.testing.assert_close(shift, 4 * scale * weight[:, 2], rtol=1e-3, atol=1e-4 * scale)


def test_a_repeated_channel_goes_first() -> None:
    rows, weight = correlated_rows(60, 6, 6), random_weight(3, 6, 6)
    rows[:, 5] = rows[:, 0]
    order = removal_order(group_of(problem_of(weight, rows, free_bias=True)))
    assert int(order[0]) in (0, 5)
    assert {0, 5} != set(order[:2].tolist())


@given(seeds, st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_damped_moment_is_positive_definite(seed: int, free_bias: bool) -> None:
    rows = correlated_rows(4, 8, seed)  # fewer rows than columns
    rows[:, 1] = 0
    moment = damped_moment(statistics_of(rows), free_bias)
    assert float(torch.linalg.eigvalsh(moment)[0]) > 0


@pytest.mark.parametrize("free_bias", [True, False])
def test_inputs_that_are_all_zero_are_survived(free_bias: bool) -> None:
    problem = problem_of(random_weight(3, 6, 0), torch.zeros(20, 6), free_bias=free_bias)
    assert sorted(removal_order(group_of(problem)).tolist()) == list(range(6))
    fitted, shift = refit(problem, [0, 1])
    assert bool(fitted.isfinite().all()) and bool(shift.isfinite().all())
