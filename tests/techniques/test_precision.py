from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import bank_of, graph_of, make_device

from autocompress.bank import stitch
from autocompress.plan import Plan, Step
from autocompress.techniques.precision import (
    PRECISION,
    Precision,
    round_to_grid,
    symmetric_scale,
)

INT8 = Precision(weight_bits=8, activation_bits=8)
seeds = st.integers(0, 10_000)


def heavy_tailed(seed: int, power: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(5, 40, generator=generator)
    return value.sign() * value.abs() ** power


@given(seeds, st.floats(0.3, 5), st.sampled_from([4, 8]))
@settings(max_examples=40, deadline=None)
def test_the_error_is_half_a_step_at_most_when_nothing_is_clipped(
    seed: int, power: float, bits: int
) -> None:
    weight = heavy_tailed(seed, power)
    scale = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    error = (round_to_grid(weight, scale, bits) - weight).abs()
    assert bool((error <= scale[:, None] * 0.5001).all())


@given(seeds, st.floats(0.3, 5), st.sampled_from([4, 8]))
@settings(max_examples=40, deadline=None)
def test_the_chosen_scale_is_never_worse_than_the_largest_weights(
    seed: int, power: float, bits: int
) -> None:
    weight = heavy_tailed(seed, power)
    plain = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    chosen = symmetric_scale(weight, bits)
    errors = [(round_to_grid(weight, s, bits) - weight).square().sum(1) for s in (chosen, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    assert bool((chosen <= plain * (1 + 1e-6)).all())


def test_clipping_pays_at_few_bits() -> None:
    weight = torch.linspace(-1, 1, 2001)[None].clone()
    weight[0, 0] = -1.2
    plain = weight.abs().amax(1) / 7
    assert float(symmetric_scale(weight, 4)) < 0.95 * float(plain)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1.0])
def test_constant_rows_survive(value: float) -> None:
    weight = torch.full((2, 6), value)
    scale = symmetric_scale(weight, 8)
    assert bool((scale > 0).all())
    torch.testing.assert_close(round_to_grid(weight, scale, 8), weight, rtol=1e-6, atol=1e-15)


def test_each_output_channel_has_its_own_grid() -> None:
    network = stitch(bank_of("residual"), Plan((Step("block1.conv1", INT8),))).network
    layer = network.get_submodule("block1.conv1")
    steps = layer.weight.detach().flatten(1) / layer.weight_scale[:, None]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert float(steps.abs().max()) <= 127.001
    assert bool((steps.abs().amax(1) > 100).all())
    original = bank_of("residual").network.get_submodule("block1.conv1").weight.detach().flatten(1)
    assert bool(((layer.weight.detach().flatten(1) - original).abs()
                 <= 0.21 * original.abs().amax(1, keepdim=True)).all())  # fmt: skip
    assert "block1.conv1.weight_scale" not in network.state_dict()


@pytest.mark.parametrize(
    ("kernels", "conv", "linear"),
    [
        ({"Conv": (32, 8), "Gemm": (32,)}, True, False),
        ({"Conv": (32,), "Gemm": (32, 8)}, False, True),
        ({"Conv": (32,), "MatMul": (32, 8)}, False, True),
        ({}, False, False),
    ],
)
def test_only_widths_with_a_kernel_are_offered(
    kernels: dict[str, tuple[int, ...]], conv: bool, linear: bool
) -> None:
    graph, device = graph_of("residual"), make_device(kernels)
    assert bool(PRECISION.choices(graph.layer("stem"), [INT8], device)) is conv
    assert bool(PRECISION.choices(graph.layer("head"), [INT8], device)) is linear
