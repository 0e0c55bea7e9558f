from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Matrix, correlated_rows, damped_rows, problem_of, random_weight
from torch import Tensor

from autocompress.techniques import sparsity
from autocompress.techniques.reconstruction import damped_moment
from autocompress.techniques.sparsity import (
    Groups,
    by_group_score,
    by_score,
    least_squares,
    merged,
    refitted,
    remove,
)

seeds = st.integers(0, 10_000)


def layer_of(
    out: int, columns: int, seed: int, *, free_bias: bool
) -> tuple[Tensor, Tensor, Matrix]:
    """A weight, H, and rows A with AᵀA = H."""
    weight, rows = random_weight(out, columns, seed), correlated_rows(3 * columns, columns, seed)
    statistics = problem_of(weight, rows, free_bias=free_bias).statistics
    assert statistics is not None
    return weight, damped_moment(statistics, free_bias), damped_rows(rows, free_bias=free_bias)


def direct_refit(weight: Tensor, a: Matrix, kept: Tensor) -> Matrix:
    """Each row's kept columns refitted by numpy's least squares."""
    result = np.zeros(weight.shape)
    for row, mask in enumerate(kept.numpy()):
        wanted = a @ weight[row].double().numpy()
        result[row, mask] = np.linalg.lstsq(a[:, mask], wanted, rcond=None)[0]
    return result


def without(weight: Tensor, gone: Tensor) -> Tensor:
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[gone] = False
    return kept.reshape(weight.shape)


def error(weight: Tensor, left: Tensor | Matrix, a: Matrix) -> float:
    return float(np.square(a @ (weight.double().numpy() - np.asarray(left)).T).sum())


@given(seeds, st.integers(1, 5), st.integers(2, 80), st.floats(0, 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_stays_is_the_direct_least_squares_refit(
    seed: int, out: int, columns: int, share: float, bias: bool
) -> None:
    """Also within a block, and with rows packed in between."""
    weight, h, a = layer_of(out, columns, seed, free_bias=bias)
    removal = remove(weight, h)
    gone = merged(removal)[: round(share * weight.numel())]
    kept = without(weight, gone)
    left = refitted(weight, h, removal, gone)
    assert not left[~kept].any()
    expected = direct_refit(weight, a, kept)
    np.testing.assert_allclose(left, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max() + 1e-6)


@given(seeds, st.integers(1, 6), st.integers(1, 80))
@settings(max_examples=25, deadline=None)
def test_the_order_names_every_weight_once(seed: int, out: int, columns: int) -> None:
    weight, h, _ = layer_of(out, columns, seed, free_bias=True)
    removal = remove(weight, h)
    assert sorted(merged(removal).tolist()) == list(range(weight.numel()))
    assert removal.ends[0] == 0 and removal.ends[-1] == columns
    steps = [end - start for start, end in pairwise(removal.ends)]
    assert max(steps) == max(1, columns // 32) and min(steps) >= 1


@given(seeds, st.integers(2, 32))
@settings(max_examples=25, deadline=None)
def test_a_short_row_goes_in_the_exact_greedy_order(seed: int, columns: int) -> None:
    """Against optimal brain surgeon as it is written: one weight at a time, in double precision."""
    weight, h, _ = layer_of(1, columns, seed, free_bias=True)
    order, costs = [], []
    w, inverse = weight[0].double(), torch.linalg.inv(h)
    for _ in range(columns):
        cost = w.square() / inverse.diagonal()
        cost[order] = torch.inf
        p = int(cost.argmin())
        order.append(p)
        costs.append(float(cost[p]))
        w = w - w[p] / inverse[p, p] * inverse[p]
        inverse = inverse - torch.outer(inverse[p], inverse[p]) / inverse[p, p]
        # Exactly zero, so that no rest of a removed column is divided by.
        w[order] = 0
        inverse[order, order] = 1
    removal = remove(weight, h)
    found = removal.costs[0].numpy() * float(h.diagonal().mean())
    np.testing.assert_allclose(found, costs, rtol=2e-2, atol=1e-4 * max(costs))
    assert removal.columns[0, : columns // 2].tolist() == order[: columns // 2]


@given(seeds, st.sampled_from((1, 7, 40, 70)), st.booleans())
@settings(max_examples=20, deadline=None)
def test_costs_add_up_to_the_error(seed: int, columns: int, bias: bool) -> None:
    weight, h, a = layer_of(4, columns, seed, free_bias=bias)
    removal = remove(weight, h)
    for known, end in enumerate(removal.ends):
        cost = float(removal.costs[:, :end].sum() * h.diagonal().mean())
        assert cost == pytest.approx(error(weight, removal.weights[known], a), rel=1e-3, abs=1e-6)


@given(seeds, st.sampled_from((0.3, 0.5, 0.8)))
@settings(max_examples=20, deadline=None)
def test_it_beats_magnitude_with_refit_which_beats_magnitude(seed: int, share: float) -> None:
    weight, h, a = layer_of(6, 24, seed, free_bias=True)
    count = round(share * weight.numel())
    removal = remove(weight, h)
    brain = error(weight, refitted(weight, h, removal, merged(removal)[:count]), a)
    kept = without(weight, by_score(weight.abs())[:count])
    refit = error(weight, direct_refit(weight, a, kept), a)
    assert brain < refit < error(weight, weight * kept, a)


@given(seeds, st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_independent_inputs_make_it_scaled_magnitude_without_update(
    seed: int, columns: int
) -> None:
    weight = random_weight(5, columns, seed)
    scale = torch.rand(columns, generator=torch.Generator().manual_seed(seed)).double() + 0.05
    h = scale.diag()
    removal = remove(weight, h)
    for share in (0.25, 0.5, 0.75):
        count = round(share * weight.numel())
        gone = merged(removal)[:count]
        expected = by_score((weight * scale.sqrt().float()).abs())[:count]
        assert set(gone.tolist()) == set(expected.tolist())
        left = refitted(weight, h, removal, gone)
        torch.testing.assert_close(left, weight * without(weight, gone))


def test_small_batches_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h, _ = layer_of(9, 48, 3, free_bias=True)
    whole = remove(weight, h)
    monkeypatch.setattr(sparsity, "_HELD", 2 * 48**2)
    parts = remove(weight, h)
    assert torch.equal(whole.columns, parts.columns)
    torch.testing.assert_close(whole.weights, parts.weights, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_all_the_same_are_survived_in_single_precision() -> None:
    columns = 300
    h = torch.ones(columns, columns).double() + 0.01 * torch.eye(columns)
    weight = random_weight(2, columns, 0)
    removal = remove(weight, 1e-12 * h)
    gone = merged(removal)[: int(1.4 * columns)]
    left = refitted(weight, h, removal, gone)
    a = np.linalg.cholesky(h.numpy()).T
    best = direct_refit(weight, a, without(weight, gone))
    assert error(weight, left, a) == pytest.approx(error(weight, best, a), rel=1e-3)


def test_a_row_of_zeros_goes_first_and_free() -> None:
    weight, h, _ = layer_of(3, 20, 1, free_bias=True)
    weight[1] = 0
    removal = remove(weight, h)
    assert set(merged(removal)[:20].tolist()) == set(range(20, 40))
    assert not removal.costs[1].any()


patterns = st.sampled_from((Groups(2, 4, 1), Groups(3, 4, 9), Groups(2, 4, 3), Groups(4, 8, 2)))


@given(seeds, patterns, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_every_group_keeps_what_its_pattern_says(
    seed: int, groups: Groups, out: int, count: int
) -> None:
    channels = groups.size * count
    weight, h, a = layer_of(out, channels * groups.width, seed, free_bias=True)
    removal = remove(weight, h, groups)
    brain = merged(removal)
    for gone in (brain, by_group_score(weight.abs(), groups)):
        kept = without(weight, gone)
        by_channel = kept.reshape(out, count, groups.size, groups.width)
        assert (by_channel.sum(2) == groups.size - groups.drop).all()
    left = refitted(weight, h, removal, brain)
    expected = direct_refit(weight, a, without(weight, brain))
    np.testing.assert_allclose(left, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max() + 1e-6)


def test_the_smallest_of_every_group_go() -> None:
    score = torch.tensor([[4.0, 3, 2, 1, 5, 6, 8, 7]])
    assert sorted(by_group_score(score, Groups(2, 4, 1)).tolist()) == [2, 3, 4, 5]
    # Two positions of a kernel: channels stand every second column.
    assert sorted(by_group_score(score, Groups(2, 4, 2)).tolist()) == [0, 1, 2, 3]


@given(patterns, st.integers(1, 4), seeds)
def test_groups_and_columns_are_inverse(groups: Groups, count: int, seed: int) -> None:
    columns = groups.size * groups.width * count
    values = torch.arange(columns)[None]
    split = groups.split(values)
    group = torch.arange(split.shape[1])[:, None].expand(split.shape[1:])
    place = torch.arange(groups.size).expand(split.shape[1:])
    assert torch.equal(groups.column(group, place), split[0])


def test_least_squares_of_all_columns_is_the_row_and_of_none_is_zero() -> None:
    weight, h, _ = layer_of(1, 12, 2, free_bias=False)
    torch.testing.assert_close(
        least_squares(weight[0], h, torch.ones(12, dtype=torch.bool)), weight[0]
    )
    assert not least_squares(weight[0], h, torch.zeros(12, dtype=torch.bool)).any()
