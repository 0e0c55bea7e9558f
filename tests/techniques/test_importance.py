from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import correlated_rows, problem_of, random_weight
from torch import Tensor

from autocompress.errors import PlanError
from autocompress.graph import ChannelGroup, Member
from autocompress.techniques.importance import (
    activation_importance,
    ascending,
    connection_importance,
    l1_importance,
    l2_importance,
    nonzero_importance,
    taylor_importance,
)
from autocompress.techniques.technique import GroupProblem, LayerGradients, LayerProblem

Importance = Callable[[GroupProblem], Tensor]
WEIGHTS = (l1_importance, l2_importance, connection_importance)
STATISTICS = (activation_importance, nonzero_importance)
seeds = st.integers(0, 10_000)


def group_problem(
    writers: list[tuple[LayerProblem, int]], readers: list[tuple[LayerProblem, int]]
) -> GroupProblem:
    """Layers with how many rows or columns belong to a channel."""
    sizes = [p.layer.out_channels // k for p, k in writers]
    sizes += [p.layer.in_channels // k for p, k in readers]
    assert len(set(sizes)) == 1

    def members(layers: list[tuple[LayerProblem, int]], side: str) -> tuple[Member, ...]:
        return tuple(
            Member(f"{side}{i}", side, tuple(range(sizes[0] * k)), k)  # type: ignore[arg-type]
            for i, (_, k) in enumerate(layers)
        )

    out, into = members(writers, "out"), members(readers, "in")
    return GroupProblem(
        ChannelGroup("group", sizes[0], (*out, *into)),
        tuple((p, m) for (p, _), m in zip(writers, out, strict=True)),
        tuple((p, m) for (p, _), m in zip(readers, into, strict=True)),
    )


def writer(weight: Tensor) -> LayerProblem:
    return problem_of(weight, None, free_bias=True)


def reader(weight: Tensor, rows: Tensor | None = None) -> LayerProblem:
    return problem_of(weight, rows, free_bias=True)


def shares(values: list[float]) -> Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    return found / found.mean()


def test_norms_of_filters_by_hand() -> None:
    one = torch.tensor([[3.0, -4.0], [0.0, 1.0], [2.0, 2.0]])
    problem = group_problem([(writer(one), 1)], [(reader(torch.ones(2, 3)), 1)])
    torch.testing.assert_close(l1_importance(problem), shares([7, 1, 4]))
    torch.testing.assert_close(l2_importance(problem), shares([5, 1, 8**0.5]))


def test_connection_strength_by_hand() -> None:
    made = torch.tensor([[3.0, -4.0], [0.0, 1.0], [2.0, 0.0]])
    read = torch.tensor([[1.0, 3.0, 0.0], [0.0, -4.0, 0.0]])
    problem = group_problem([(writer(made), 1)], [(reader(read), 1)])
    torch.testing.assert_close(
        connection_importance(problem), shares([5, 1, 2]) * shares([1, 5, 0])
    )


@pytest.mark.parametrize("importance", WEIGHTS)
@given(seed=seeds, scale=st.sampled_from([1e-4, 1e4]))
@settings(max_examples=15, deadline=None)
def test_coupled_layers_count_alike_whatever_their_scale(
    importance: Importance, seed: int, scale: float
) -> None:
    """One has more weights per filter, and one is scaled: neither may decide alone."""
    made = [random_weight(5, 3, seed), random_weight(5, 90, seed + 1)]
    read = [random_weight(4, 5, seed + 2), random_weight(7, 5, seed + 3)]

    def problem(factor: float) -> GroupProblem:
        return group_problem(
            [(writer(made[0]), 1), (writer(factor * made[1]), 1)],
            [(reader(read[0]), 1), (reader(factor * read[1]), 1)],
        )

    torch.testing.assert_close(importance(problem(scale)), importance(problem(1)))


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_a_channel_that_is_only_scaled_keeps_its_connection_strength(seed: int) -> None:
    """Its order among the others is the same after its writer's scale has moved to its reader."""
    made, read = random_weight(6, 4, seed), random_weight(3, 6, seed + 1)
    factors = torch.logspace(-2, 2, 6)

    def strength(f: Tensor) -> Tensor:
        return connection_importance(
            group_problem([(writer(made * f[:, None]), 1)], [(reader(read / f), 1)])
        )

    before, after = strength(torch.ones(6)), strength(factors)
    torch.testing.assert_close(after / after.sum(), before / before.sum())


def test_several_rows_and_columns_of_a_channel_are_taken_together() -> None:
    """Heads have several rows, flattened channels several columns."""
    rows = correlated_rows(40, 6, 0)
    rows[:, 2] = 0
    made = torch.tensor([[1.0], [1.0], [3.0], [4.0]])
    one = reader(torch.arange(12.0).reshape(2, 6), rows)
    problem = group_problem([(writer(made), 2)], [(one, 3)])
    torch.testing.assert_close(l1_importance(problem), shares([2, 7]))
    torch.testing.assert_close(l2_importance(problem), shares([2**0.5, 5]))
    magnitude = rows.double().abs().mean(0)
    expected = shares([float(magnitude[:3].mean()), float(magnitude[3:].mean())])
    torch.testing.assert_close(activation_importance(problem), expected)
    zeros = nonzero_importance(problem)
    torch.testing.assert_close(zeros, torch.tensor([2 / 3, 1.0], dtype=torch.float64))


def test_columns_of_a_kernel_are_taken_together() -> None:
    rows = torch.ones(10, 8)
    rows[:5, :4] = 0
    rows[:, 4:] = 3
    layer = problem_of(torch.ones(2, 8), rows, free_bias=True, kernel=(2, 2))
    problem = group_problem([(writer(torch.ones(2, 3)), 1)], [(layer, 1)])
    torch.testing.assert_close(activation_importance(problem), shares([0.5, 3]))
    torch.testing.assert_close(
        nonzero_importance(problem), torch.tensor([0.5, 1], dtype=torch.float64)
    )


def test_activations_of_several_readers_are_shares() -> None:
    rows = torch.tensor([[1.0, 3.0]])
    layers = [(reader(torch.ones(2, 2), rows * f), 1) for f in (1, 1000)]
    problem = group_problem([(writer(torch.ones(2, 3)), 1)], layers)
    torch.testing.assert_close(activation_importance(problem), shares([1, 3]))


def test_taylor_sums_readers_and_columns_in_units_of_the_loss() -> None:
    def gradients(*taylor: float) -> LayerGradients:
        return LayerGradients(torch.zeros(1, len(taylor)), torch.tensor(taylor))

    one = replace(reader(torch.ones(2, 4)), gradients=gradients(1, 2, 3, 4))
    two = replace(reader(torch.ones(2, 2)), gradients=gradients(100, 10))
    problem = group_problem([(writer(torch.ones(2, 3)), 1)], [(one, 2), (two, 1)])
    wanted = torch.tensor([103.0, 17.0], dtype=torch.float64)
    torch.testing.assert_close(taylor_importance(problem), wanted)


@pytest.mark.parametrize("importance", WEIGHTS)
def test_without_a_dense_writer_the_readers_weights_are_taken(importance: Importance) -> None:
    """As where a depthwise convolution reads the network's input."""
    read = torch.tensor([[1.0, 3.0, 0.0], [0.0, -4.0, 0.0]])
    found = importance(group_problem([], [(reader(read), 1)]))
    assert ascending(found).tolist() == [2, 0, 1]


@pytest.mark.parametrize("importance", WEIGHTS)
def test_without_a_dense_reader_the_writers_weights_are_taken(importance: Importance) -> None:
    made = torch.tensor([[3.0], [1.0], [2.0]])
    assert ascending(importance(group_problem([(writer(made), 1)], []))).tolist() == [1, 2, 0]


@pytest.mark.parametrize("importance", (*STATISTICS, taylor_importance))
def test_criteria_that_have_nothing_to_look_at_say_so(importance: Importance) -> None:
    blind = group_problem([(writer(torch.ones(3, 2)), 1)], [(reader(torch.ones(2, 3)), 1)])
    with pytest.raises(PlanError, match="group") as caught:
        importance(blind)
    assert "l1" in str(caught.value.allowed)


@pytest.mark.parametrize("importance", WEIGHTS)
def test_nothing_at_all_is_an_error_too(importance: Importance) -> None:
    group = ChannelGroup("group", 3, ())
    with pytest.raises(PlanError):
        importance(GroupProblem(group, (), ()))


@pytest.mark.parametrize("importance", WEIGHTS)
def test_weights_that_are_all_zero_are_survived(importance: Importance) -> None:
    problem = group_problem([(writer(torch.zeros(3, 2)), 1)], [(reader(torch.zeros(2, 3)), 1)])
    assert torch.equal(importance(problem), torch.zeros(3, dtype=torch.float64))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_ascending_sorts_by_all_keys_and_keeps_the_order_of_ties(
    pairs: list[tuple[int, int]],
) -> None:
    first, second = (
        torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True)
    )
    wanted = sorted(range(len(pairs)), key=lambda i: (pairs[i], i))
    assert ascending(first, second).tolist() == wanted
