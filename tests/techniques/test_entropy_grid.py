from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assemble, bank_of, graph_of, make_device
from problems import correlated_rows, problem_of, random_weight
from torch import Tensor, nn

from autocompress.plan import Plan, Step
from autocompress.techniques.codebook import feedback_for
from autocompress.techniques.entropy_grid import ENTROPY_GRID, EntropyGrid, steps
from autocompress.techniques.technique import IntegerWeight, LayerGradients, LayerProblem, Variant

seeds = st.integers(0, 10_000)


def problem(seed: int, *, curvature: Tensor | None = None, out: int = 12) -> LayerProblem:
    """A layer whose Fisher information is a row's curvature times the inputs' power."""
    rows, weight = correlated_rows(300, 24, seed), random_weight(out, 24, seed)
    plain = problem_of(weight, rows, free_bias=True)
    assert plain.statistics is not None
    rise = torch.full((out,), 1e-6) if curvature is None else curvature
    fisher = torch.outer(rise, plain.statistics.moment.diagonal().float())
    return replace(plain, gradients=LayerGradients(fisher, torch.zeros(24)))


def codes_of(variant: Variant) -> Tensor:
    return variant["weight"] / variant["scale"]


def entropy(codes: Tensor) -> float:
    """Bits per code."""
    share = codes.round().unique(return_counts=True)[1] / codes.numel()
    return -float((share * share.log2()).sum())


@given(seeds, st.floats(0.05, 4), st.floats(0, 10))
@settings(max_examples=20, deadline=None)
def test_codes_are_integers_of_a_byte(seed: int, step: float, rate_weight: float) -> None:
    variant = ENTROPY_GRID.solve(problem(seed), EntropyGrid(step=step, rate_weight=rate_weight))
    codes = codes_of(variant)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert float(codes.abs().max()) <= 127.01
    assert variant["scale"].shape == (12, 1) and bool((variant["scale"] > 0).all())


def test_the_expected_loss_of_a_step_is_what_the_decision_says() -> None:
    """Half the Fisher information of the output's error, in nats, per weight."""
    known = problem(0, curvature=torch.full((400,), 1e-5), out=400)
    step = 0.5
    variant = ENTROPY_GRID.solve(known, EntropyGrid(step=step, rate_weight=0))
    assert known.statistics is not None
    mean = known.statistics.mean
    covariance = known.statistics.moment - torch.outer(mean, mean)
    lost = (known.weight - variant["weight"]).double()
    loss = 0.5 * 1e-5 * float(((lost @ covariance) * lost).sum()) / lost.numel()
    # The damping of the moments counts among the pivots but not in the loss.
    assert 0.5 * 4e-8 * step**2 < loss < 1.1 * 4.2e-8 * step**2


def curvature_of(known: LayerProblem) -> Tensor:
    """What gradients add to the curvature that steps follow, in units of the rest's."""
    feedback = feedback_for(known, 1)
    rest = steps(replace(known, gradients=None), feedback)
    return (rest / steps(known, feedback)).square()[:, 0] - 1


def test_steps_follow_the_curvature_of_layers_and_half_way_that_of_rows() -> None:
    plain = curvature_of(problem(1))
    sharp = curvature_of(problem(1, curvature=torch.full((12,), 4e-6)))
    torch.testing.assert_close(sharp, 4 * plain, rtol=1e-3, atol=0)
    rise = torch.full((12,), 1e-6)
    rise[3] = 16e-6
    mixed = curvature_of(problem(1, curvature=rise))
    assert float(mixed[3] / mixed[0]) == pytest.approx(4, rel=0.1)


def test_where_gradients_vanish_the_noise_is_bounded() -> None:
    flat = problem(1, curvature=torch.full((12,), 1e-20))
    feedback = feedback_for(flat, 1)
    bound = steps(replace(flat, gradients=None), feedback)
    torch.testing.assert_close(steps(flat, feedback), bound)


def test_without_gradients_the_noise_is_a_share_of_the_outputs_energy() -> None:
    for known in (
        replace(problem(2), gradients=None),
        problem_of(random_weight(12, 24, 2), None, free_bias=True),
    ):
        feedback = feedback_for(known, 1)
        found = steps(known, feedback)
        larger = replace(known, weight=3 * known.weight)
        torch.testing.assert_close(steps(larger, feedback), 3 * found)
        moment = feedback.factor @ feedback.factor.T
        ordered = known.weight[:, feedback.order]
        energy = float(((ordered @ moment) * ordered).sum(1).mean())
        noise = float(found[0] ** 2 / 12 * feedback.pivots.sum())
        assert noise == pytest.approx(0.05 * energy, rel=1e-3)


def test_rows_of_a_grouped_convolution_have_steps_of_their_own() -> None:
    weight = random_weight(12, 9, 3)
    plain = problem_of(weight, None, free_bias=True)
    grouped = replace(plain, layer=replace(plain.layer, kind="conv", groups=12))
    feedback = feedback_for(grouped, 1)
    factors = torch.arange(1.0, 13.0)[:, None]
    found = steps(replace(grouped, weight=factors * weight), feedback)
    torch.testing.assert_close(found, factors * steps(grouped, feedback))
    dead = steps(replace(grouped, weight=(factors > 1) * weight), feedback)
    assert bool(dead.isfinite().all() and (dead > 0).all())


@given(seeds, st.floats(0.05, 4))
@settings(max_examples=20, deadline=None)
def test_scales_have_eight_digits(seed: int, step: float) -> None:
    scale = ENTROPY_GRID.solve(problem(seed), EntropyGrid(step=step))["scale"]
    digits = scale.frexp().mantissa * 256
    torch.testing.assert_close(digits, digits.round(), rtol=0, atol=0)


def test_coarser_steps_and_dearer_bits_give_less_entropy() -> None:
    known = problem(3, out=64)
    bits = [
        [
            entropy(codes_of(ENTROPY_GRID.solve(known, EntropyGrid(step=s, rate_weight=r))))
            for s in (0.1, 0.3, 1.0)
        ]
        for r in (0.0, 1.0, 8.0)
    ]
    for row in bits:
        assert row[0] > row[1] > row[2]
    for column in zip(*bits, strict=True):
        assert column[0] > column[1] > column[2]


def test_a_fine_step_halves_with_every_bit() -> None:
    """At high rates the entropy is that of the density less the logarithm of the step."""
    known = problem(4, out=200)
    fine, coarse = (
        entropy(codes_of(ENTROPY_GRID.solve(known, EntropyGrid(step=s, rate_weight=0))))
        for s in (0.1, 0.2)
    )
    assert fine - coarse == pytest.approx(1, abs=0.1)
    assert fine > math.log2(8)


def test_bits_are_spent_better_than_by_rounding_to_the_nearest() -> None:
    """The same entropy, a smaller error of the output."""
    known = problem(5, out=100)
    assert known.statistics is not None
    mean = known.statistics.mean
    covariance = (known.statistics.moment - torch.outer(mean, mean)).float()
    variant = ENTROPY_GRID.solve(known, EntropyGrid(step=0.5))
    bits = entropy(codes_of(variant))

    def error(weight: Tensor) -> float:
        lost = known.weight - weight
        return float(((lost @ covariance) * lost).sum())

    nearest = [
        error((known.weight / s).round() * s)
        for s in torch.linspace(0.05, 3, 200)
        if entropy(known.weight / s) <= bits
    ]
    assert error(variant["weight"]) < 0.6 * min(nearest)


def test_rows_without_influence_take_fewer_bits_and_zero_rows_none() -> None:
    rise = torch.full((12,), 1e-4)
    rise[5] = 0
    known = problem(6, curvature=rise)
    known.weight[7] = 0
    variant = ENTROPY_GRID.solve(known, EntropyGrid(step=0.5))
    codes = codes_of(variant)
    assert bool((codes[7] == 0).all()) and bool((variant["scale"] > 0).all())
    others = [entropy(codes[i]) for i in range(12) if i not in (5, 7)]
    assert entropy(codes[5]) < min(others)


def test_pruned_weights_stay_zero() -> None:
    known = problem(7)
    gone = torch.rand(12, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    weight = torch.where(gone, 0.0, known.weight)
    variant = ENTROPY_GRID.solve(replace(known, weight=weight, mask=~gone), EntropyGrid(step=0.2))
    assert bool((variant["weight"][gone] == 0).all())
    assert float((variant["weight"][~gone] != 0).float().mean()) > 0.5


def test_the_bias_takes_over_the_mean_of_the_error() -> None:
    rows = correlated_rows(300, 24, 8)
    known = problem(8)
    module = nn.Linear(24, 12)
    module.weight.data.copy_(known.weight)
    wanted = module(rows).detach()
    decision = EntropyGrid(step=1)
    changed = ENTROPY_GRID.install(module, ENTROPY_GRID.solve(known, decision), decision, 1)
    difference = changed(rows).detach() - wanted
    torch.testing.assert_close(difference.mean(0), torch.zeros(12), rtol=0, atol=1e-3)
    assert float(difference.abs().max()) > 0.1


def test_the_layer_is_stored_in_bytes_with_a_scale_per_row() -> None:
    decision, layer = EntropyGrid(step=0.5), graph_of("residual").layer("block1.conv1")
    network = assemble(bank_of("residual"), Plan((Step(layer.name, decision),))).network
    module = network.get_submodule(layer.name)
    assert module.integer_weight == IntegerWeight(8, None, False, 32, False, False, "mse")
    codes = module.weight.detach().flatten(1) / module.weight_scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert ENTROPY_GRID.stored_bytes(layer, decision, 1) == 8 * 72 + 4 * 8


def test_no_step_leaves_the_layer_as_it_is() -> None:
    layer = graph_of("residual").layer("head")
    plan = Plan((Step("head", ENTROPY_GRID.identity),))
    module = assemble(bank_of("residual"), plan).network.get_submodule("head")
    assert torch.equal(module.weight, bank_of("residual").network.get_submodule("head").weight)
    assert not hasattr(module, "integer_weight")
    assert not ENTROPY_GRID.uses_gradients(ENTROPY_GRID.identity)
    offered = [EntropyGrid(step=s) for s in (1, 0, 0.5)]
    found = ENTROPY_GRID.choices(layer, offered, make_device())
    assert found == (offered[2], offered[0])
    assert ENTROPY_GRID.stored_bytes(layer, ENTROPY_GRID.identity, 1) == 4 * 5 * 12
