import numpy as np
import pytest

from autocompress.errors import SearchError
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.seeding.lagrangian import Lagrangian
from autocompress.search.seeding.spdy import RefineSettings, Scorer, plan_key, refine

NAMES = [f"p{i}" for i in range(8)]
SETTINGS = RefineSettings(tries=60, seed=3)


def sums():
    generator = np.random.default_rng(0)
    loss = [Factor(n, (n,), np.cumsum(generator.exponential(size=5))) for n in NAMES]
    cost = [Factor(n, (n,), np.linspace(2, 0.4, 5) * generator.uniform(1, 2)) for n in NAMES]
    return FactoredSum(0.0, tuple(loss)), FactoredSum(0.0, tuple(cost))


def real_loss(indices):
    """The summed losses weighed in a way that the sum does not know."""
    loss, _ = sums()
    return float(loss.terms(indices) @ np.geomspace(0.1, 10, len(NAMES)))


class Calls:
    def __init__(self, most=10**9):
        self.plans = []
        self.most = most

    def __call__(self, indices):
        if len(self.plans) == self.most:
            raise KeyboardInterrupt
        self.plans.append(plan_key(indices))
        return real_loss(indices)


def run(calls, known, stop=lambda: False):
    loss, cost = sums()
    budget = 0.5 * cost.value({})
    return refine(loss, cost, budget, Scorer(calls, known, stop), SETTINGS)


def same(a, b):
    return (a.indices, a.score, a.scores) == (b.indices, b.score, b.scores) and np.array_equal(
        a.coefficients, b.coefficients
    )


def test_search_beats_the_plain_sum_and_says_how():
    loss, cost = sums()
    budget = 0.5 * cost.value({})
    found = run(Calls(), {})
    assert len(found.scores) == SETTINGS.tries
    assert found.score == min(found.scores) == real_loss(found.indices)
    assert found.scores[0] == real_loss(Lagrangian(loss, cost).solve(budget).indices)
    assert found.score < 0.9 * found.scores[0]
    assert cost.value(found.indices) <= budget
    again = Lagrangian(loss, cost).reweighted(found.coefficients.tolist()).solve(budget)
    assert again.indices == found.indices


def test_no_plan_is_scored_twice():
    calls = Calls()
    run(calls, {})
    assert len(calls.plans) == len(set(calls.plans)) > 5


@pytest.mark.parametrize("most", [1, 7, 15])
def test_an_interrupted_search_goes_on_bit_for_bit(most):
    whole = Calls()
    expected = run(whole, {})
    known, first, second = {}, Calls(most), Calls()
    with pytest.raises(KeyboardInterrupt):
        run(first, known)
    assert same(run(second, known), expected)
    assert first.plans + second.plans == whole.plans


def test_a_search_that_is_told_to_stop_scores_the_plain_plan_only():
    calls = Calls()
    found = run(calls, {}, stop=lambda: True)
    assert len(calls.plans) == 1
    assert found.score == found.scores[0]
    assert np.array_equal(found.coefficients, np.ones(len(NAMES)))


def test_a_budget_below_the_cheapest_plan_is_refused():
    loss, cost = sums()
    with pytest.raises(SearchError, match="within the budget"):
        refine(loss, cost, 0.1, Scorer(real_loss, {}), SETTINGS)
