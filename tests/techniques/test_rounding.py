from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import correlated_rows, damped_rows, problem_of, random_weight, statistics_of

from autocompress.techniques.reconstruction import damped_moment
from autocompress.techniques.rounding import (
    Feedback,
    Grid,
    feedback_of,
    fitted_ratio,
    gptq,
    output_error,
    round_with_feedback,
    search_scale,
)

seeds = st.integers(0, 10_000)
grids = st.builds(
    Grid,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([None, 5, 8]),
    per_tensor=st.just(False),
)


def heavy_tailed(seed: int, power: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(5, 18, generator=generator)
    return value.sign() * value.abs() ** power


def moment_of(columns: int, seed: int) -> torch.Tensor:
    return damped_moment(statistics_of(correlated_rows(200, columns, seed)), True)


def peak_scale(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    width = grid.group_size or weight.shape[1]
    peaks = [part.abs().amax(1) for part in weight.split(width, 1)]
    return torch.stack(peaks, 1) / grid.largest


@given(seeds, st.floats(0.3, 4), grids)
@settings(max_examples=40, deadline=None)
def test_the_error_is_half_a_step_at_most_when_nothing_is_clipped(
    seed: int, power: float, grid: Grid
) -> None:
    weight = heavy_tailed(seed, power)
    scale = peak_scale(weight, grid)
    error = (grid.nearest(weight, scale) - weight).abs()
    assert bool((error <= 0.5001 * grid.expand(scale, weight.shape[1])).all())


@given(seeds, st.floats(0.3, 4), grids)
@settings(max_examples=40, deadline=None)
def test_the_chosen_scale_is_never_worse_than_the_largest_weights(
    seed: int, power: float, grid: Grid
) -> None:
    weight = heavy_tailed(seed, power)
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    chosen = search_scale(weight, grid, importance)
    assert chosen.shape == peak_scale(weight, grid).shape
    errors = [
        float(((grid.nearest(weight, s) - weight).square() * importance).sum())
        for s in (chosen, peak_scale(weight, grid))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_one_scale_for_the_whole_weight_is_that_of_the_weight_as_one_row() -> None:
    weight = heavy_tailed(3, 2)
    whole = search_scale(weight, Grid(4, per_tensor=True))
    assert whole.shape == (5, 1) and len(whole.unique()) == 1
    torch.testing.assert_close(whole[:1], search_scale(weight.reshape(1, -1), Grid(4)))


def test_groups_are_rows_of_their_own() -> None:
    weight = heavy_tailed(4, 2)
    scale = search_scale(weight, Grid(4, group_size=8))
    apart = [search_scale(part, Grid(4))[:, 0] for part in weight.split(8, 1)]
    torch.testing.assert_close(scale, torch.stack(apart, 1))
    rounded = Grid(4, group_size=8).nearest(weight, scale)
    parts = [Grid(4).nearest(w, s[:, None]) for w, s in zip(weight.split(8, 1), apart, strict=True)]
    torch.testing.assert_close(rounded, torch.cat(parts, 1))


def test_clipping_pays_at_few_bits() -> None:
    weight = torch.linspace(-1, 1, 2001)[None].clone()
    weight[0, 0] = -1.2
    assert float(search_scale(weight, Grid(4))) < 0.95 * 1.2 / 7


def test_important_columns_move_the_scale_towards_them() -> None:
    weight = torch.tensor([[1.0, 0.23, 0.21]])
    plain = search_scale(weight, Grid(2))
    other = search_scale(weight, Grid(2), torch.tensor([0.001, 1.0, 1.0]))
    assert float(other) < 0.3 < float(plain)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1.0])
@pytest.mark.parametrize("bits", [2, 8])
def test_constant_rows_survive(value: float, bits: int) -> None:
    weight = torch.full((2, 6), value)
    scale = search_scale(weight, Grid(bits))
    assert bool((scale > 0).all())
    found = Grid(bits).nearest(weight, scale)
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("width", [1, 4])
def test_the_factor_is_triangular_and_reproduces_the_moments(width: int) -> None:
    moment = moment_of(12, 1)
    feedback = feedback_of(moment, width)
    assert torch.equal(feedback.factor, feedback.factor.triu())
    ordered = moment[feedback.order][:, feedback.order]
    product = (feedback.factor @ feedback.factor.T).double()
    torch.testing.assert_close(product, ordered, rtol=1e-4, atol=1e-4 * float(ordered.max()))
    energy = moment.diagonal()[feedback.order].reshape(-1, width).sum(1)
    assert bool((energy.diff() <= 0).all())
    blocks = feedback.order.reshape(-1, width)
    assert bool((blocks[:, 1:] == blocks[:, :-1] + 1).all())


def test_pivots_are_the_reciprocals_of_the_inverse_of_what_is_left() -> None:
    """The cost of an error that all later columns make up for: 1 / [H_rest⁻¹]_kk (OBS)."""
    moment = moment_of(9, 2)
    feedback = feedback_of(moment)
    ordered = moment[feedback.order][:, feedback.order]
    for k in range(9):
        rest = torch.linalg.inv(ordered[k:, k:])
        found = feedback.pivots[feedback.order[k]]
        assert float(found) == pytest.approx(1 / float(rest[0, 0]), rel=1e-4)


@given(seeds, st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_targets_are_the_least_squares_refit_of_the_columns_that_are_left(
    seed: int, width: int
) -> None:
    """The OBS update: what is rounded stays, and the others take the best values for the data."""
    rows, weight = correlated_rows(60, 8, seed), random_weight(3, 8, seed)
    feedback = feedback_of(damped_moment(statistics_of(rows), True), width)
    data = damped_rows(rows, free_bias=True)[:, feedback.order.numpy()]
    ordered = weight[:, feedback.order].double().numpy()
    fixed = np.empty_like(ordered)

    def rounder(part: slice, target: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        start = part.start
        goal = data @ ordered.T - data[:, :start] @ fixed[:, :start].T
        refit = np.linalg.lstsq(data[:, start:], goal, rcond=None)[0].T
        np.testing.assert_allclose(target.numpy(), refit[:, :width], rtol=2e-3, atol=2e-3)
        rounded = target.round()
        fixed[:, part] = rounded.numpy()
        return rounded

    found = round_with_feedback(weight, feedback, rounder, width)
    np.testing.assert_array_equal(found[:, feedback.order].numpy(), fixed)


def test_many_columns_give_what_few_give() -> None:
    """Lazy updates by blocks of columns change nothing."""
    weight, feedback = random_weight(4, 300, 5), feedback_of(moment_of(300, 5))
    factor = feedback.factor.double()
    ordered = weight[:, feedback.order].double()
    wanted = torch.empty_like(ordered)
    for k in range(300):
        owed = (ordered[:, :k] - wanted[:, :k]) @ factor[:k, k] / factor[k, k]
        wanted[:, k] = ((ordered[:, k] + owed) / 0.5).round() * 0.5
    found = round_with_feedback(weight, feedback, lambda p, target, b: (target / 0.5).round() * 0.5)
    differ = (found[:, feedback.order].double() - wanted).abs() > 1e-6
    # A tie in the last bit may fall to either side, and what follows it then differs too.
    assert float(differ.double().mean()) < 0.2
    errors = [
        output_error(weight - w, feedback).sum()
        for w in (found, wanted.float()[:, inverse(feedback)])
    ]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=0.05)


def inverse(feedback: Feedback) -> torch.Tensor:
    return feedback.order.argsort()


@given(seeds, grids)
@settings(max_examples=25, deadline=None)
def test_gptq_is_never_worse_than_the_nearest_grid_points(seed: int, grid: Grid) -> None:
    weight, feedback = random_weight(6, 18, seed), feedback_of(moment_of(18, seed))
    scale = search_scale(weight, grid, feedback.pivots)
    found, nearest = gptq(weight, grid, scale, feedback), grid.nearest(weight, scale)
    errors = [output_error(weight - w, feedback) for w in (found, nearest)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    codes = found / grid.expand(scale, 18)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert float(codes.abs().max()) <= grid.largest + 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_clearly_better_on_correlated_inputs(bits: int) -> None:
    ratios = []
    for seed in range(8):
        weight, feedback = random_weight(16, 40, seed), feedback_of(moment_of(40, seed))
        scale = search_scale(weight, Grid(bits))
        found = gptq(weight, Grid(bits), scale, feedback)
        nearest = Grid(bits).nearest(weight, scale)
        errors = [float(output_error(weight - w, feedback).sum()) for w in (found, nearest)]
        ratios.append(errors[0] / errors[1])
    assert np.mean(ratios) < 0.6


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_without_correlation_gptq_rounds_to_the_nearest(seed: int) -> None:
    weight = random_weight(5, 12, seed)
    spread = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    feedback = feedback_of(torch.diag(spread + 0.1))
    scale = search_scale(weight, Grid(3))
    nearest = Grid(3).nearest(weight, scale)
    assert torch.equal(gptq(weight, Grid(3), scale, feedback), nearest)


def test_pruned_weights_stay_zero_and_others_make_up_for_them() -> None:
    weight, feedback = random_weight(6, 30, 1), feedback_of(moment_of(30, 1))
    gone = torch.rand(6, 30, generator=torch.Generator().manual_seed(1)) < 0.4
    weight[gone] = 0
    scale = search_scale(weight, Grid(3))
    found = gptq(weight, Grid(3), scale, feedback, gone)
    assert bool((found[gone] == 0).all())
    errors = [
        output_error(weight - w, feedback).sum() for w in (found, Grid(3).nearest(weight, scale))
    ]
    assert errors[0] < 0.9 * errors[1]


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_the_fitted_ratio_has_the_least_error(seed: int) -> None:
    weight, feedback = random_weight(4, 10, seed), feedback_of(moment_of(10, seed))
    rounded = weight.round()
    ratio = fitted_ratio(weight, rounded, feedback)
    best = output_error(weight - ratio * rounded, feedback)
    assert bool((ratio > 0).all())
    for other in (0.98, 1.02):
        worse = output_error(weight - other * ratio * rounded, feedback)
        fitted = rounded.abs().sum(1) > 0
        free = fitted & (ratio[:, 0] != 1)
        assert bool((best[free] <= worse[free] * (1 + 1e-5)).all())


def test_the_output_error_is_that_of_the_data() -> None:
    rows, error = correlated_rows(80, 7, 3), random_weight(4, 7, 3)
    statistics = problem_of(error, rows, free_bias=True).statistics
    assert statistics is not None
    feedback = feedback_of(damped_moment(statistics, True))
    data = damped_rows(rows, free_bias=True)
    wanted = np.square(data @ error.double().numpy().T).sum(0)
    np.testing.assert_allclose(output_error(error, feedback).numpy(), wanted, rtol=1e-4)
