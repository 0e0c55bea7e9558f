from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import bank_of, graph_of, make_device
from problems import (
    Matrix,
    correlated_rows,
    damped_rows,
    problem_of,
    random_weight,
    weight_of,
)
from torch import Tensor, nn

from autocompress.bank import stitch
from autocompress.errors import PlanError
from autocompress.plan import Plan, Step
from autocompress.techniques.low_rank import LOW_RANK, LowRank, kept_rank

seeds = st.integers(0, 10_000)


def decompose(layer: nn.Module, rows: Tensor | None, ratio: float) -> nn.Module:
    weight = torch.as_tensor(weight_of(layer)).float()
    kernel = tuple(getattr(layer, "kernel_size", ()))
    problem = problem_of(weight, rows, free_bias=layer.bias is not None, kernel=kernel)
    problem = replace(problem, bias=layer.bias)
    decision = LowRank(rank_ratio=ratio)
    return LOW_RANK.install(layer, LOW_RANK.solve(problem, decision), decision, 1)


def product_of(parts: nn.Module) -> Matrix:
    first, second = parts
    return weight_of(second) @ weight_of(first)


def damped_error(error: Matrix, rows: Tensor, *, free_bias: bool) -> float:
    return float(np.square(damped_rows(rows, free_bias=free_bias) @ error.T).sum())


@given(seeds, st.integers(1, 5), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_cut_is_the_best_for_the_data(seed: int, rank: int, bias: bool) -> None:
    """Its error is what Eckart and Young allow in the whitened space, below that of plain SVD."""
    rows = correlated_rows(60, 8, seed)
    torch.manual_seed(seed)
    layer = nn.Linear(8, 6, bias=bias)
    weight = weight_of(layer)
    found = damped_error(
        weight - product_of(decompose(layer, rows, rank / 6)), rows, free_bias=bias
    )
    a = damped_rows(rows, free_bias=bias)
    values, vectors = np.linalg.eigh(a.T @ a)
    whitened = weight @ vectors @ np.diag(np.sqrt(values)) @ vectors.T
    best = float(np.square(np.linalg.svd(whitened)[1][rank:]).sum())
    assert found == pytest.approx(best, rel=1e-3, abs=1e-7)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    plain = damped_error(weight - u[:, :rank] * s[:rank] @ vt[:rank], rows, free_bias=bias)
    assert found <= plain * (1 + 1e-5)


def test_it_beats_plain_svd_clearly_where_the_data_are_uneven() -> None:
    rows = correlated_rows(200, 8, 0) * torch.logspace(-1, 1, 8)
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    weight = weight_of(layer)
    aware = product_of(decompose(layer, rows, 0.5))
    plain = product_of(decompose(layer, None, 0.5))
    errors = [damped_error(weight - w, rows, free_bias=True) for w in (aware, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_without_statistics_it_is_plain_svd() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(7, 6)
    u, s, vt = np.linalg.svd(weight_of(layer), full_matrices=False)
    expected = u[:, :3] * s[:3] @ vt[:3]
    np.testing.assert_allclose(product_of(decompose(layer, None, 0.5)), expected, atol=1e-6)


LAYERS = [
    (nn.Linear(8, 6), (5, 8)),
    (nn.Linear(8, 6, bias=False), (5, 7, 8)),
    (nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2), (5, 3, 9, 9)),
    (nn.Conv2d(3, 6, (1, 3), padding="same", padding_mode="reflect", bias=False), (5, 3, 9, 9)),
    (nn.Conv1d(3, 6, 5, stride=2, padding=2, padding_mode="circular"), (5, 3, 12)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_full_rank_reconstructs_the_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    columns = weight_of(layer).shape[1]
    expected = layer(x)
    parts = decompose(layer, correlated_rows(100, columns, 0), 1.0)
    assert isinstance(parts, nn.Sequential) and len(parts) == 2
    torch.testing.assert_close(parts(x), expected, rtol=1e-4, atol=1e-4)
    assert (parts[1].bias is None) == (layer.bias is None)
    assert parts[0].bias is None


def test_a_dead_input_is_still_reconstructed_at_full_rank() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    rows = 1e-3 * correlated_rows(100, 8, 0)
    rows[:, 2] = 0
    np.testing.assert_allclose(product_of(decompose(layer, rows, 1.0)), weight_of(layer), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_dead_input_takes_no_rank_from_the_others(scale: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    rows = scale * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    rows[:, 2] = 0
    weight = weight_of(layer)
    x = rows.double().numpy()
    centred = x - x.mean(0)
    error = np.square(centred @ (weight - product_of(decompose(layer, rows, 0.5))).T).sum()
    live = [i for i in range(8) if i != 2]
    s = np.linalg.svd(centred[:, live] @ weight[:, live].T)[1]
    assert error <= 1.3 * np.square(s[4:]).sum()


def test_the_bias_takes_the_cut_ranks_mean() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(8, 6)
    rows = correlated_rows(100, 8, 2)
    expected = layer(rows).mean(0)
    torch.testing.assert_close(
        decompose(layer, rows, 0.4)(rows).mean(0), expected, rtol=1e-4, atol=1e-4
    )


def test_one_solve_serves_every_rank() -> None:
    problem = problem_of(random_weight(6, 8, 0), correlated_rows(50, 8, 0), free_bias=True)
    one, other = (LOW_RANK.solve(problem, LowRank(rank_ratio=r)) for r in (0.2, 0.9))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert LOW_RANK.levels == ("rank_ratio",)


@given(st.integers(1, 300), st.floats(0, 1, exclude_min=True), st.integers(1, 32))
def test_kept_rank(full: int, ratio: float, multiple: int) -> None:
    rank = kept_rank(full, ratio, multiple)
    step = min(multiple, full)
    assert step <= rank <= full
    assert rank % step == 0 or rank == full
    assert abs(rank - ratio * full) <= step / 2 + 1e-9 or rank in (step, full)
    assert kept_rank(full, min(1.0, ratio * 1.5), multiple) >= rank


def test_only_ranks_that_save_work_are_offered() -> None:
    layer = graph_of("tokens").layer("up")  # 8 -> 24: below rank 6
    offers = [LowRank(rank_ratio=r / 8) for r in range(1, 9)]
    chosen = LOW_RANK.choices(layer, offers, make_device())
    assert [d.rank_ratio for d in chosen] == [r / 8 for r in range(1, 6)]
    rough = LOW_RANK.choices(layer, offers, make_device(channel_multiple=4))
    ranks = [kept_rank(8, d.rank_ratio, 4) for d in rough]
    assert ranks == [4]


def test_a_grouped_convolution_is_not_offered_and_refused() -> None:
    layer = graph_of("depthwise").layer("depthwise")
    offers = [LowRank(rank_ratio=0.5)]
    assert LOW_RANK.choices(layer, offers, make_device()) == ()
    with pytest.raises(PlanError, match="grouped"):
        stitch(bank_of("depthwise"), Plan((Step("depthwise", offers[0]),)))
