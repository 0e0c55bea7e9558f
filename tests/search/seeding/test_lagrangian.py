import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import ConfigError
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.seeding.elimination import Eliminator
from autocompress.search.seeding.lagrangian import Lagrangian, frontier, minimise, sweep


def random_sums(seed):
    """Unary losses and costs of up to three parameters, whole numbers."""
    generator = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(generator.integers(2, 6))]
    sizes = {name: int(generator.integers(1, 4)) for name in names}
    loss = [Factor(n, (n,), generator.integers(0, 30, sizes[n]).astype(float)) for n in names]
    cost = []
    for i in range(generator.integers(1, 6)):
        count = int(generator.integers(1, min(3, len(names)) + 1))
        scope = tuple(generator.permutation(names)[:count].tolist())
        values = generator.integers(1, 30, [sizes[n] for n in scope]).astype(float)
        cost.append(Factor(f"layer{i}", scope, values))
    return FactoredSum(3.0, tuple(loss)), FactoredSum(5.0, tuple(cost)), sizes


def all_plans(sizes):
    for values in itertools.product(*(range(n) for n in sizes.values())):
        yield dict(zip(sizes, values, strict=True))


def corners(points):
    """Those (cost, loss) on the lower left hull that are on no line between others."""
    hull = []
    for c, y in sorted(points):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (c - hull[-2][0]) >= (
            y - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((c, y))
    return hull


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_elimination_finds_the_least_sum_and_every_entrys_least_sum(seed):
    loss, cost, sizes = random_sums(seed)
    terms = FactoredSum(0.0, loss.factors + cost.factors)
    values = {tuple(x.values()): terms.value(x) for x in all_plans(sizes)}
    assert terms.value(minimise(terms)) == min(values.values())
    eliminator = Eliminator((terms,))
    marginals = eliminator.marginals(eliminator.flat(terms))
    names = eliminator.parameters
    for i, scope in enumerate(eliminator.scopes):
        table = eliminator.table(marginals, i)
        for entry in np.ndindex(table.shape):
            least = min(
                terms.value(x)
                for x in all_plans(sizes)
                if all(x[names[p]] == v for p, v in zip(scope, entry, strict=True))
            )
            assert table[entry] == least


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_sweep_is_never_better_than_all_plans_and_as_good_at_the_hulls_corners(seed):
    loss, cost, sizes = random_sums(seed)
    points = [(cost.value(x), loss.value(x)) for x in all_plans(sizes)]
    budgets = sorted({c for c, _ in points})
    best = dict.fromkeys(budgets, math.inf)
    for budget in budgets:
        best[budget] = min(value for c, value in points if c <= budget)
    for budget, found in zip(budgets, sweep(loss, cost, budgets), strict=True):
        assert found.feasible and found.cost <= budget
        assert (found.cost, found.loss) == (cost.value(found.indices), loss.value(found.indices))
        assert found.loss >= best[budget]
    at_corners = corners(points)
    for (_, least), found in zip(
        at_corners, sweep(loss, cost, [c for c, _ in at_corners]), strict=True
    ):
        assert found.loss == least


def test_what_is_left_of_the_budget_is_used():
    # Hull: (0, 10) and (10, 0); the plan of cost 6 is above it, so that no price gives it.
    loss = FactoredSum(0.0, (Factor("a", ("a",), np.array([10.0, 5.0, 0.0])),))
    cost = FactoredSum(0.0, (Factor("a", ("a",), np.array([0.0, 6.0, 10.0])),))
    (found,) = sweep(loss, cost, [7.0])
    assert (found.loss, found.cost, found.feasible) == (5.0, 6.0, True)


def test_cheapest_plan_is_given_and_marked_if_the_budget_is_below_it():
    loss = FactoredSum(0.0, (Factor("a", ("a",), np.array([0.0, 5.0, 9.0])),))
    cost = FactoredSum(1.0, (Factor("a", ("a",), np.array([8.0, 6.0, 3.0])),))
    (found,) = sweep(loss, cost, [2.0])
    assert found.indices == {"a": 2}
    assert not found.feasible


def test_frontier_goes_from_the_cheapest_plan_to_the_unchanged_one():
    loss = FactoredSum(0.0, (Factor("a", ("a",), np.array([0.0, 1.0, 4.0, 9.0])),))
    cost = FactoredSum(0.0, (Factor("a", ("a",), np.array([8.0, 4.0, 2.0, 1.0])),))
    assert [x.indices["a"] for x in frontier(loss, cost, 9)] == [3, 2, 1, 0]


def test_budgets_do_not_influence_each_other():
    loss, cost, sizes = random_sums(7)
    budgets = sorted({cost.value(x) for x in all_plans(sizes)})
    together = sweep(loss, cost, budgets)
    assert together == [sweep(loss, cost, [b])[0] for b in budgets]
    assert together == list(reversed(sweep(loss, cost, budgets[::-1])))


def test_coefficients_weigh_the_loss_factors():
    loss = FactoredSum(
        0.0,
        (
            Factor("a", ("a",), np.array([0.0, 1.0])),
            Factor("b", ("b",), np.array([0.0, 2.0])),
        ),
    )
    cost = FactoredSum(
        0.0, tuple(Factor(name, (name,), np.array([1.0, 0.0])) for name in ("a", "b"))
    )
    plain = Lagrangian(loss, cost)
    assert plain.solve(1.0).indices == {"a": 1, "b": 0}
    assert plain.reweighted([5.0, 1.0]).solve(1.0).indices == {"a": 0, "b": 1}


def test_dense_sums_fall_back_to_local_minima():
    generator = np.random.default_rng(0)
    names = [f"p{i}" for i in range(8)]
    factors = [
        Factor(a + b, (a, b), generator.normal(size=(3, 3)))
        for a, b in itertools.combinations(names, 2)
    ]
    terms = FactoredSum(0.0, tuple(factors))
    eliminator = Eliminator((terms,), largest_table=3**4)
    assert not eliminator.exact
    found = eliminator.named(eliminator.minimise(eliminator.flat(terms)))
    assert terms.value(found) < terms.value({})
    for name in names:
        assert terms.value(found) <= min(terms.value({**found, name: v}) for v in range(3)) + 1e-12
    assert terms.value(minimise(terms)) <= terms.value(found)


def test_contradicting_tables_are_refused():
    terms = FactoredSum(
        0.0, (Factor("x", ("a",), np.zeros(2)), Factor("y", ("a", "b"), np.zeros((3, 2))))
    )
    with pytest.raises(ConfigError, match="disagree"):
        minimise(terms)
    with pytest.raises(ConfigError, match="finite"):
        minimise(FactoredSum(0.0, (Factor("x", ("a",), np.array([0.0, np.inf])),)))
