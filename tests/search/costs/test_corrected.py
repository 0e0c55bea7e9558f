import numpy as np
import pytest

from autocompress.errors import MeasurementError
from autocompress.search.costs.corrected import CorrectedCost, CorrectionSettings
from autocompress.search.costs.factored import Factor, FactoredSum

LAYERS = 12


def prior():
    generator = np.random.default_rng(1)
    factors = [
        Factor(f"l{i}", (f"p{i}", f"p{i + 1}"), generator.uniform(0.2, 2.0, (4, 4)))
        for i in range(LAYERS)
    ]
    return FactoredSum(1.5, tuple(factors))


def data(count, noise, seed=0):
    """Plans and values of costs drawn from the prior of the default settings."""
    generator = np.random.default_rng(seed)
    scales = 1 + 0.1 * generator.normal() + 0.25 * generator.normal(size=LAYERS)
    true = prior().scaled(scales.tolist(), 1.5 + 0.3 * generator.normal())
    plans = [{f"p{i}": int(generator.integers(4)) for i in range(LAYERS + 1)} for _ in range(count)]
    values = [true.value(x) * (1 + noise * generator.normal()) for x in plans]
    return true, plans, values


def learnt(plans, values, settings=None):
    cost = CorrectedCost(prior(), settings or CorrectionSettings())
    for plan, value in zip(plans, values, strict=True):
        cost.observe(plan, value)
    return cost


def gaussian(plans, values, new, settings, error):
    """The predictive mean and standard deviation by conditioning one joint normal distribution."""
    terms = np.array([prior().terms(x) for x in [*plans, new]])
    mean = prior().constant + terms.sum(axis=1)
    totals = terms.sum(axis=1)
    covariance = (
        settings.constant_sd**2
        + settings.scale_sd**2 * terms @ terms.T
        + settings.common_sd**2 * np.outer(totals, totals)
    )
    noisy = covariance[:-1, :-1] + np.diag((error * np.array(values)) ** 2)
    gain = np.linalg.solve(noisy, covariance[:-1, -1])
    predicted = mean[-1] + gain @ (np.array(values) - mean[:-1])
    variance = covariance[-1, -1] - gain @ covariance[:-1, -1]
    return predicted, np.sqrt(variance + (error * predicted) ** 2)


def test_nothing_observed_gives_the_prior():
    settings = CorrectionSettings(scale_sd=0.2, common_sd=0.0, constant_sd=0.5)
    cost = CorrectedCost(prior(), settings)
    terms = prior().terms({})
    mean, sd = cost.predict({})
    assert mean == pytest.approx(prior().value({}))
    expected = 0.5**2 + 0.2**2 * (terms**2).sum() + (0.01 * mean) ** 2
    assert sd == pytest.approx(np.sqrt(expected))
    assert cost.corrected().value({"p3": 2}) == pytest.approx(prior().value({"p3": 2}))


@pytest.mark.parametrize("count", [1, 5, 40])
def test_prediction_is_that_of_the_joint_normal_distribution(count):
    settings = CorrectionSettings(constant_sd=0.4)
    _, plans, values = data(count + 1, 0.03)
    cost = learnt(plans[:-1], values[:-1], settings)
    expected = gaussian(plans[:-1], values[:-1], plans[-1], settings, cost.error)
    assert cost.predict(plans[-1]) == pytest.approx(expected, rel=1e-6)
    assert cost.observations == count


def test_error_is_that_of_predictions_without_the_observation_itself():
    settings = CorrectionSettings(constant_sd=0.4, least_error=0.001, noise=0.001)
    _, plans, values = data(30, 0.05)
    error = learnt(plans, values, settings).error
    ratios = []
    for i, (plan, value) in enumerate(zip(plans, values, strict=True)):
        others = [*plans[:i], *plans[i + 1 :]], [*values[:i], *values[i + 1 :]]
        mean, sd = gaussian(*others, plan, settings, error)
        # The predictive variance with the error's part taken at the value, as the model has it.
        variance = sd**2 - (error * mean) ** 2 + (error * value) ** 2
        ratios.append((value - mean) ** 2 / variance)
    # Standardised residuals are of size 1, but for the few prior rows of the smaller error.
    assert np.mean(ratios) == pytest.approx((30 + 4) / 30, rel=0.02)


def test_error_of_many_observations_goes_on_from_that_of_few():
    _, plans, values = data(257, 0.04)
    few, many = learnt(plans[:256], values[:256]), learnt(plans, values)
    assert few.error == pytest.approx(0.04, rel=0.1)
    assert many.error == pytest.approx(few.error, rel=0.01)


def test_intervals_cover_as_often_as_they_say():
    inside = []
    for seed in range(40):
        count = 3 + seed
        _, plans, values = data(count + 10, 0.03, seed)
        cost = learnt(plans[:count], values[:count])
        for plan, value in zip(plans[count:], values[count:], strict=True):
            mean, sd = cost.predict(plan)
            inside.append(abs(value - mean) <= 1.645 * sd)
    assert 0.82 <= np.mean(inside) <= 0.97


def test_order_does_not_matter():
    _, plans, values = data(60, 0.02)
    one, other = learnt(plans, values), learnt(plans[::-1], values[::-1])
    assert one.predict({"p1": 3}) == pytest.approx(other.predict({"p1": 3}), rel=1e-9)


def test_scales_are_found_from_clean_values():
    true, plans, values = data(300, 0.002)
    corrected = learnt(plans, values).corrected()
    assert corrected.constant == pytest.approx(true.constant, abs=0.3)
    for found, expected in zip(corrected.factors, true.factors, strict=True):
        assert found.values == pytest.approx(expected.values, rel=0.08)


def test_prediction_is_never_surer_than_the_least_error():
    _, plans, values = data(400, 0.0)
    cost = learnt(plans, values)
    mean, sd = cost.predict(plans[0])
    assert 0.01 * mean <= sd < 0.012 * mean


def test_corrected_scales_and_constant_stay_positive():
    cost = CorrectedCost(prior(), CorrectionSettings(scale_sd=5.0))
    for value in (0.001, 0.002):
        cost.observe({}, value)
    corrected = cost.corrected()
    assert corrected.constant >= 0
    assert all((f.values > 0).all() for f in corrected.factors)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_values_that_are_no_costs_are_refused(value):
    with pytest.raises(MeasurementError):
        CorrectedCost(prior()).observe({}, value)
