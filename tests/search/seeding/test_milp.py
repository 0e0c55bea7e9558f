import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import ConfigError, SearchError
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.seeding.lagrangian import Lagrangian
from autocompress.search.seeding.milp import solve_exactly


def chain(seed, layers, sizes=(3, 2, 2)):
    """Layers in a row that share groups with the next; two local parameters each."""
    width, ranks, bits = sizes
    generator = np.random.default_rng(seed)
    loss, latency, size = [], [], []
    for i in range(layers):
        scope = (f"g{i}", f"g{i + 1}", f"l{i}|decompose", f"l{i}|quantize")
        shape = (width, width, ranks, bits)
        latency.append(Factor(f"l{i}", scope, generator.integers(1, 40, shape).astype(float)))
        size.append(Factor(f"l{i}", scope, generator.integers(1, 40, shape).astype(float)))
        for name, count in zip(scope[1:], shape[1:], strict=True):
            values = np.cumsum(generator.integers(0, 9, count)).astype(float)
            loss.append(Factor(name, (name,), values))
    return tuple(FactoredSum(c, tuple(f)) for c, f in ((1.0, loss), (2.0, latency), (3.0, size)))


def residual(blocks):
    """Three streams, each shared by all blocks of its stage; two layers per block."""
    generator = np.random.default_rng(0)
    loss, cost, stream = [], [], None
    for stage in range(3):
        loss.append(Factor(f"s{stage}", (f"s{stage}",), np.cumsum(generator.exponential(5, 7))))
        for block in range(blocks):
            inner = f"i{stage}.{block}"
            loss.append(Factor(inner, (inner,), np.cumsum(generator.exponential(0.3, 7))))
            before = stream if stream and block == 0 else f"s{stage}"
            for ends in ((before, inner), (inner, f"s{stage}")):
                name = f"l{len(cost)}"
                keep = np.linspace(1, 0.2, 7)
                values = 0.1 + np.einsum(
                    "i,j,k,l", keep, keep, [1, 0.8, 0.7, 0.6, 0.5], [1, 0.8, 0.5]
                ) * generator.uniform(0.8, 1.2, (7, 7, 5, 3))
                cost.append(Factor(name, (*ends, f"{name}|d", f"{name}|q"), values))
                for local, count in ((f"{name}|d", 5), (f"{name}|q", 3)):
                    drops = np.cumsum(generator.exponential(0.3, count))
                    loss.append(Factor(local, (local,), drops - drops[0]))
        stream = f"s{stage}"
    return FactoredSum(0.0, tuple(loss)), FactoredSum(0.5, tuple(cost))


def all_plans(terms):
    sizes = {n: s for f in terms.factors for n, s in zip(f.parameters, f.values.shape, strict=True)}
    for values in itertools.product(*map(range, sizes.values())):
        yield dict(zip(sizes, values, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_equals_the_best_of_all_plans_under_two_budgets(seed, share, other):
    loss, latency, size = chain(seed, 2)
    points = [(loss.value(x), latency.value(x), size.value(x)) for x in all_plans(latency)]
    budgets = []
    for k, portion in ((1, share), (2, other)):
        values = [p[k] for p in points]
        budgets.append(min(values) + portion * (max(values) - min(values)))
    within = [p[0] for p in points if p[1] <= budgets[0] and p[2] <= budgets[1]]
    if not within:
        with pytest.raises(SearchError, match="No plan is within budget"):
            solve_exactly(loss, (latency, size), budgets, 20)
        return
    found = solve_exactly(loss, (latency, size), budgets, 20)
    assert found.proven
    assert found.loss == min(within)
    assert found.gap <= 1e-6
    assert found.costs == (latency.value(found.indices), size.value(found.indices))
    assert found.costs[0] <= budgets[0] and found.costs[1] <= budgets[1]


def test_a_hundred_layers_of_residual_blocks_are_solved_to_proof():
    loss, cost = residual(18)
    assert len(cost.factors) == 108
    budget = 0.45 * cost.value({})
    quick = Lagrangian(loss, cost).solve(budget)
    found = solve_exactly(loss, (cost,), (budget,), 60)
    assert found.proven
    assert found.costs[0] <= budget and quick.cost <= budget
    assert found.bound <= found.loss <= quick.loss <= 1.02 * found.loss


def test_an_unreachable_budget_is_refused_with_the_least_value():
    loss, latency, _ = chain(3, 2)
    least = min(latency.value(x) for x in all_plans(latency))
    with pytest.raises(SearchError, match="budget 1") as caught:
        solve_exactly(loss, (latency,), (least - 1,), 20)
    assert f"at least {least:g}" in str(caught.value)


def test_budgets_that_exclude_each_other_are_refused_with_the_least_value_given_the_others():
    loss = FactoredSum(0.0, (Factor("a", ("a",), np.array([0.0, 1.0])),))
    fast = FactoredSum(0.0, (Factor("a", ("a",), np.array([1.0, 5.0])),))
    small = FactoredSum(0.0, (Factor("a", ("a",), np.array([7.0, 2.0])),))
    with pytest.raises(SearchError, match="budget 1") as caught:
        solve_exactly(loss, (fast, small), (3.0, 3.0), 20)
    assert "at least 5" in str(caught.value)


def test_no_limit_gives_the_least_loss():
    loss, latency, size = chain(5, 2)
    found = solve_exactly(loss, (latency, size), (math.inf, math.inf), 20)
    assert found.loss == min(loss.value(x) for x in all_plans(latency))
    assert found.proven


def test_numbers_of_costs_and_budgets_must_agree():
    loss, latency, _ = chain(0, 1)
    with pytest.raises(ConfigError, match="one budget"):
        solve_exactly(loss, (latency,), (1.0, 2.0), 20)
