from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress.recover.fake_quantize import (
    ActivationGrid,
    ActivationQuantizer,
    BatchQuantizer,
    WeightQuantizer,
    full_range_grid,
    least_error_grid,
    round_gradient,
    stochastic_round,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(x: Tensor, grid: ActivationGrid) -> Tensor:
    """ONNX's QuantizeLinear, in float64 and without a rounding of the quotient."""
    codes = (x.double() / torch.tensor(grid.scale).double()).round() + grid.zero_point
    return codes.clamp(0, 2**grid.bits - 1).long()


# Weights


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group_size", [None, 4])
def test_a_rounded_weight_is_integers_times_its_scale(bits: int, group_size: int | None) -> None:
    weight = randn(3, 5, 2, seed=bits).requires_grad_()
    scale = randn(3, 1 if group_size is None else 3, seed=9).abs() * 0.3 + 0.1
    quantizer = WeightQuantizer(scale, bits, group_size, per_tensor=False)
    torch.testing.assert_close(quantizer.scale, scale, rtol=0, atol=0)
    steps = scale.expand(3, 10) if group_size is None else scale.repeat_interleave(4, 1)[:, :10]
    largest = 2 ** (bits - 1) - 1
    codes = (weight.reshape(3, 10) / steps).round().clamp(-largest, largest)
    expected = (codes * steps).reshape(3, 5, 2)
    torch.testing.assert_close(quantizer(weight), expected, rtol=0, atol=0)


def test_weight_gradients_are_those_of_the_paper() -> None:
    """Esser et al. 2020, eq. 3 and 5, written out for four weights of two rows."""
    step = 0.5
    weight = torch.tensor([[0.3, 5.0, -0.9, 0.0], [-4.0, 1.3, 1.6, 0.6]], requires_grad=True)
    quantizer = WeightQuantizer(torch.full((2, 1), step), 3, None, per_tensor=False)
    upstream = randn(2, 4)
    (quantizer(weight) * upstream).sum().backward()
    inside = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 1]])
    assert torch.equal(weight.grad, upstream * inside)
    ratio = weight.detach() / step
    slope = torch.where(inside > 0, ratio.round() - ratio, ratio.sign() * 3)
    expected = (upstream * slope).sum(1) / math.sqrt(4 * 3)
    torch.testing.assert_close(quantizer.step.grad, expected)


def test_one_step_for_a_whole_weight_gets_the_gradient_of_all_rows() -> None:
    weight, upstream = randn(4, 6), randn(4, 6, seed=1)
    scale = torch.full((4, 1), 0.2)
    one = WeightQuantizer(scale, 4, None, per_tensor=True)
    rows = WeightQuantizer(scale, 4, None, per_tensor=False)
    for quantizer in (one, rows):
        (quantizer(weight) * upstream).sum().backward()
    assert one.step.shape == (1,) and one.scale.shape == rows.scale.shape == (4, 1)
    # The scale 1/sqrt(n Q) has four times as many weights.
    torch.testing.assert_close(one.step.grad[0], rows.step.grad.sum() / 2)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_on_the_outermost_level_are_not_clipped(bits: int) -> None:
    """That is where half of all 2-bit weights start; rounding errors must not freeze them."""
    largest = 2.0 ** (bits - 1) - 1
    scale = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) + 0.01
    weight = (scale * torch.tensor([-largest, 0, largest])).requires_grad_()
    WeightQuantizer(scale, bits, None, per_tensor=False)(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(500, 3))


def test_the_step_gradient_leads_to_the_best_step() -> None:
    """Descent on the squared error ends where a search over all steps finds the least one."""
    weight = randn(1, 4096)

    def error(step: float) -> float:
        rounded = (weight / step).round().clamp(-3, 3) * step
        return float((rounded - weight).square().mean())

    quantizer = WeightQuantizer(torch.tensor([[0.15]]), 3, None, per_tensor=False)
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        ((quantizer(weight) - weight).square().mean() * math.sqrt(4096 * 3)).backward()
        optimizer.step()
    best = min((error(0.1 + i / 1000), 0.1 + i / 1000) for i in range(900))
    assert error(0.15) > 4 * best[0]
    assert error(quantizer.scale.item()) < 1.01 * best[0]


def test_a_step_never_falls_to_zero_and_can_rise_again() -> None:
    quantizer = WeightQuantizer(torch.tensor([[0.32]]), 4, None, per_tensor=False)
    with torch.no_grad():
        quantizer.step.fill_(-1.0)
    torch.testing.assert_close(quantizer.scale, torch.tensor([[0.01]]))
    quantizer(torch.tensor([[5.0]])).sum().backward()
    assert quantizer.step.grad.item() > 0


# Activations


@given(
    low=st.floats(-50, 0), high=st.floats(0.01, 50), bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_rounded_activations_are_integer_arithmetic(
    low: float, high: float, bits: int, seed: int
) -> None:
    x = randn(2, 50, seed=seed) * (high - low)
    quantizer = ActivationQuantizer(full_range_grid(low, high, bits))
    grid = quantizer.grid
    assert 0 <= grid.zero_point < 2**bits
    zero_point = torch.tensor(grid.zero_point)
    back = (integers(x, grid) - zero_point) * torch.tensor(grid.scale)
    found = quantizer(x).detach()
    # A quotient halfway between two integers may be rounded either way.
    ties = ((x.double() / torch.tensor(grid.scale).double()) % 1 - 0.5).abs() < 1e-2
    torch.testing.assert_close(found[~ties], back[~ties])
    assert (quantizer(torch.zeros(1, 3)) == 0).all()


@given(low=st.floats(-50, 50), width=st.floats(0.01, 50), bits=st.sampled_from([8, 16]))
@settings(max_examples=50, deadline=None)
def test_a_full_range_grid_spans_the_range_and_zero(low: float, width: float, bits: int) -> None:
    high = low + width
    grid = full_range_grid(low, high, bits)
    first = -grid.zero_point * grid.scale
    last = first + (2**bits - 1) * grid.scale
    assert first <= min(low, 0) + 0.51 * grid.scale
    assert last >= max(high, 0) - 0.51 * grid.scale
    assert grid.as_signed().as_unsigned() == grid
    assert -(2 ** (bits - 1)) <= grid.as_signed().zero_point < 2 ** (bits - 1)


def test_the_least_error_grid_cuts_outliers_off() -> None:
    values = torch.cat([randn(20_000).abs(), torch.tensor([12.0])])
    full, best = full_range_grid(0, 12, 8), least_error_grid(values, 0, 12, 8)

    def error(grid: ActivationGrid) -> float:
        return float(((integers(values, grid) * grid.scale) - values).square().mean())

    assert best.scale < full.scale and error(best) < error(full)
    assert least_error_grid(torch.rand(1000), 0, 1, 8).scale > 0.9 / 255


def test_activation_gradients_are_those_of_the_papers() -> None:
    """LSQ eq. 3 and 5; LSQ+ eq. 5 and 6 for the offset: written out with the offset held."""
    grid = ActivationGrid(0.1, 100, 8)
    quantizer = ActivationQuantizer(grid)
    x = torch.tensor([[-12.0, -9.96, -0.53], [0.0, 3.14, 20.0]], requires_grad=True)
    upstream = randn(2, 3)
    (quantizer(x) * upstream).sum().backward()
    inside = torch.tensor([[0.0, 1, 1], [1, 1, 0]])
    assert torch.equal(x.grad, upstream * inside)
    ratio = x.detach() / 0.1
    bound = torch.where(x.detach() > 0, 255.0, 0.0)
    slope = torch.where(inside > 0, ratio.round() - ratio, bound)
    scale = 1 / math.sqrt(3 * 255)
    torch.testing.assert_close(
        quantizer.step.grad, (upstream * slope).sum() * scale, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(quantizer.offset.grad, (upstream * (1 - inside)).sum() * scale)


def test_a_range_from_zero_keeps_its_zero_point() -> None:
    quantizer = ActivationQuantizer(full_range_grid(0, 6, 8))
    assert [name for name, _ in quantizer.named_parameters()] == ["step"]
    x = torch.tensor([[0.0, 1.0, 7.0]], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0]]


def test_bf16_activations_stay_bf16_and_near_their_grid() -> None:
    quantizer = ActivationQuantizer(full_range_grid(0, 4, 8))
    x = randn(4, 100).abs().bfloat16().requires_grad_()
    rounded = quantizer(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), quantizer(x.float()), rtol=2**-8, atol=0)
    rounded.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and quantizer.step.grad.dtype == torch.float32


def test_a_batch_quantizer_takes_the_batch_s_own_range() -> None:
    x = torch.linspace(-1, 4, 511).reshape(7, 73).requires_grad_()
    rounded = BatchQuantizer(8)(x)
    grid = full_range_grid(-1, 4, 8)
    codes = rounded.detach() / grid.scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert codes.round().min() == -51 and codes.round().max() == 204
    assert (rounded - x).abs().max() <= 0.501 * grid.scale
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# Gradients


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_stochastic_rounding_is_unbiased_and_on_the_grid(bits: int) -> None:
    gradient = randn(3, 40) * torch.tensor([[1.0], [1e-6], [100.0]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stochastic_round(gradient, bits, generator) for _ in range(4000)])
    peak = gradient.abs().amax(1, keepdim=True)
    levels = 2**bits - 1
    position = (draws / peak + 1) * levels / 2
    torch.testing.assert_close(position, position.round(), rtol=0, atol=2e-3)
    # The standard error of a mean of 4000 draws, each off by at most one step.
    error = (draws.mean(0) - gradient).abs() / (2 * peak / levels)
    assert error.max() < 5 * 0.5 / math.sqrt(4000)
    # Rounding to the nearest would fail that: its error is half a step somewhere.
    nearest = ((gradient / peak + 1) * levels / 2).round() * 2 / levels - 1
    assert ((nearest * peak - gradient).abs() / (2 * peak / levels)).max() > 0.4


def test_stochastic_rounding_follows_the_seed_alone() -> None:
    gradient = randn(5, 7)

    def draw(seed: int) -> Tensor:
        return stochastic_round(gradient, 4, torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert torch.equal(first, draw(3))
    assert not torch.equal(first, draw(4))
    assert torch.equal(stochastic_round(torch.zeros(2, 3), 4, torch.Generator()).abs() < 1e-30,
                       torch.ones(2, 3, dtype=torch.bool))  # fmt: skip


def test_a_rounded_gradient_leaves_the_forward_pass_alone() -> None:
    x = randn(6, 8).requires_grad_()
    upstream = randn(6, 8, seed=5)
    same = round_gradient(x, 4, torch.Generator().manual_seed(7))
    assert torch.equal(same, x)
    same.backward(upstream)
    expected = stochastic_round(upstream, 4, torch.Generator().manual_seed(7))
    assert torch.equal(x.grad, expected)
    assert not torch.equal(x.grad, upstream)
