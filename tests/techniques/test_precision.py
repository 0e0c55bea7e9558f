from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import assemble, bank_of, graph_of, make_device, run
from problems import correlated_rows, problem_of, random_weight
from torch import Tensor, nn

from autocompress.errors import PlanError
from autocompress.plan import Plan, Step, make_decision
from autocompress.techniques.precision import GROUP_SIZE, PRECISION, Precision
from autocompress.techniques.technique import IntegerWeight

INT8 = Precision(weight_bits=8, activation_bits=8)
INT4 = Precision(weight_bits=4, activation_bits=32)


def installed(
    decision: Precision, layer: str = "block1.conv1", name: str = "residual"
) -> nn.Module:
    return assemble(bank_of(name), Plan((Step(layer, decision),))).network.get_submodule(layer)


def weight_of(module: nn.Module) -> Tensor:
    return module.weight.detach().flatten(1)


def codes_of(module: nn.Module) -> Tensor:
    scale = module.weight_scale
    wide = scale.repeat_interleave(GROUP_SIZE, 1) if scale.shape[1] > 1 else scale
    return weight_of(module) / wide[:, : module.weight[0].numel()]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_weights_lie_on_the_grid_of_their_scales(
    bits: int, granularity: str, rounding: str
) -> None:
    decision = Precision(
        weight_bits=bits, activation_bits=32, granularity=granularity, rounding=rounding
    )
    module = installed(decision)
    groups = -(-72 // GROUP_SIZE) if granularity == "group" else 1
    assert module.weight_scale.shape == (8, groups)
    codes = codes_of(module)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert float(codes.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-3
    assert len(codes.round().unique()) > 2
    assert (len(module.weight_scale.unique()) == 1) is (granularity == "tensor")


def test_eight_bits_are_off_by_half_a_step_at_most_unless_clipped() -> None:
    module = installed(INT8.model_copy(update={"rounding": "nearest"}))
    original = bank_of("residual").network.get_submodule("block1.conv1").weight.detach().flatten(1)
    error = (weight_of(module) - original).abs()
    inside = original.abs() <= 127.5 * module.weight_scale
    assert float(inside.float().mean()) > 0.9
    assert bool((error <= 0.501 * module.weight_scale)[inside].all())
    assert bool((codes_of(module).abs().amax(1) > 100).all())


@pytest.mark.parametrize(
    ("decision", "wanted"),
    [
        (INT8, IntegerWeight(8, None, False, 8, False, False, "mse")),
        (INT4, IntegerWeight(4, None, False, 32, False, False, "mse")),
        (
            Precision(
                weight_bits=8,
                activation_bits=8,
                granularity="tensor",
                activation_range="dynamic",
                calibration="entropy",
            ),
            IntegerWeight(8, None, True, 8, True, False, "entropy"),
        ),
        (
            Precision(
                weight_bits=4, activation_bits=16, granularity="group", activation_sign="signed"
            ),
            IntegerWeight(4, GROUP_SIZE, False, 16, False, True, "mse"),
        ),
    ],
)
def test_the_layer_says_how_it_is_stored_and_run(
    decision: Precision, wanted: IntegerWeight
) -> None:
    assert installed(decision).integer_weight == wanted


def test_inputs_alone_may_be_integers() -> None:
    decision = Precision(weight_bits=32, activation_bits=8)
    module = installed(decision)
    original = bank_of("residual").network.get_submodule("block1.conv1")
    assert torch.equal(module.weight, original.weight)
    assert module.integer_weight.bits == 32 and module.integer_weight.activation_bits == 8
    assert PRECISION.stored_bytes(graph_of("residual").layer("stem"), decision, 1) == 4 * 8 * 18


def test_floating_point_changes_nothing() -> None:
    module = installed(Precision(weight_bits=32, activation_bits=32))
    original = bank_of("residual").network.get_submodule("block1.conv1")
    assert torch.equal(module.weight, original.weight)
    assert not hasattr(module, "integer_weight")


def test_scales_are_not_saved_with_the_network() -> None:
    network = assemble(bank_of("residual"), Plan((Step("block1.conv1", INT8),))).network
    assert "block1.conv1.weight_scale" not in network.state_dict()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_loses_less_of_the_output_than_the_nearest_values(bits: int) -> None:
    rows, weight = correlated_rows(500, 48, bits), random_weight(12, 48, bits)
    problem = problem_of(weight, rows, free_bias=True)
    errors = {}
    for rounding in ("gptq", "nearest"):
        decision = Precision(weight_bits=bits, activation_bits=32, rounding=rounding)
        variant = PRECISION.solve(problem, decision)
        lost = rows @ (weight - variant["weight"]).T
        errors[rounding] = float((lost - lost.mean(0)).square().sum())
    assert errors["gptq"] < 0.6 * errors["nearest"]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_bias_takes_over_the_mean_of_the_error(rounding: str) -> None:
    rows, weight = correlated_rows(300, 10, 1), random_weight(4, 10, 1)
    problem = problem_of(weight, rows, free_bias=True)
    module = nn.Linear(10, 4)
    module.weight.data.copy_(weight)
    wanted = module(rows).detach()
    decision = Precision(weight_bits=2, activation_bits=32, rounding=rounding)
    changed = PRECISION.install(module, PRECISION.solve(problem, decision), decision, 1)
    difference = changed(rows).detach() - wanted
    torch.testing.assert_close(difference.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    assert float(difference.abs().max()) > 0.1


def test_without_the_correction_the_bias_stays_and_the_mean_counts() -> None:
    network = bank_of("flatten").network.get_submodule("hidden")
    decision = Precision(weight_bits=2, activation_bits=32, bias_correction=False)
    assert torch.equal(installed(decision, "hidden", "flatten").bias, network.bias)
    rows, weight = correlated_rows(300, 20, 2) + 3, random_weight(6, 20, 2)
    problem = problem_of(weight, rows, free_bias=True)
    with_bias = problem_of(weight, rows, free_bias=True)
    object.__setattr__(with_bias, "bias", torch.zeros(6))
    errors = []
    for known in (with_bias, problem):
        lost = rows @ (weight - PRECISION.solve(known, decision)["weight"]).T
        errors.append(float(lost.square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_one_scale_for_a_weight_takes_its_batch_norm_in() -> None:
    decision = INT4.model_copy(update={"granularity": "tensor"})
    assert PRECISION.folds_norm(decision) and not PRECISION.folds_norm(INT4)
    network = assemble(bank_of("residual"), Plan((Step("stem", decision),))).network
    assert isinstance(network.get_submodule("bn"), nn.Identity)


def test_grouped_convolutions_are_rounded_to_the_nearest() -> None:
    decisions = [INT4, INT4.model_copy(update={"rounding": "nearest"})]
    weights = [weight_of(installed(d, "depthwise", "depthwise")) for d in decisions]
    assert torch.equal(*weights)
    layer = graph_of("depthwise").layer("depthwise")
    assert PRECISION.choices(layer, decisions, make_device()) == (INT4,)


def test_pruned_weights_stay_zero() -> None:
    weight = random_weight(6, 40, 3)
    gone = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    weight[gone] = 0
    problem = problem_of(weight, correlated_rows(200, 40, 3), free_bias=True)
    problem = replace(problem, mask=~gone)
    for bits in (2, 4):
        decision = Precision(weight_bits=bits, activation_bits=32)
        assert bool((PRECISION.solve(problem, decision)["weight"][gone] == 0).all())


@pytest.mark.parametrize(
    ("decision", "wanted"),
    [
        (INT8, 12 * 72 + 4 * 12),
        (Precision(weight_bits=8, activation_bits=8, granularity="tensor"), 12 * 72 + 4),
        (INT4, 12 * 72 // 2 + 4 * 12),
        (Precision(weight_bits=3, activation_bits=32), 12 * 72 // 2 + 4 * 12),
        (Precision(weight_bits=2, activation_bits=16, granularity="group"), 12 * 18 + 4 * 12 * 3),
        (Precision(weight_bits=2, activation_bits=8), 12 * 72 + 4 * 12),
    ],
)
def test_stored_bytes_by_hand(decision: Precision, wanted: int) -> None:
    layer = graph_of("residual").layer("block2.conv1")
    assert (layer.out_channels, layer.in_features) == (12, 72)
    assert PRECISION.stored_bytes(layer, decision, 1) == wanted


@pytest.mark.parametrize(
    ("kernels", "conv", "linear"),
    [
        ({"Conv": (32, 8), "Gemm": (32,)}, True, False),
        ({"Conv": (32,), "Gemm": (32, 8)}, False, True),
        ({"Conv": (32,), "MatMul": (32, 8)}, False, True),
        ({}, False, False),
    ],
)
def test_integer_inputs_need_a_kernel_and_stored_weights_do_not(
    kernels: dict[str, tuple[int, ...]], conv: bool, linear: bool
) -> None:
    graph, device = graph_of("residual"), make_device(kernels)
    inputs = Precision(weight_bits=32, activation_bits=8)
    for layer, runs in (("stem", conv), ("head", linear)):
        found = PRECISION.choices(graph.layer(layer), [INT4, INT8, inputs], device)
        assert found == ((inputs, INT8, INT4) if runs else (INT4,))


def test_decisions_that_come_to_the_same_are_offered_once() -> None:
    layer = graph_of("residual").layer("block1.conv1")
    same = [INT4.model_copy(update={"calibration": c}) for c in ("mse", "entropy", "minmax")]
    assert PRECISION.choices(layer, same, make_device()) == (same[0],)
    small = graph_of("residual").layer("stem")
    assert small.in_features <= GROUP_SIZE
    by_group = INT4.model_copy(update={"granularity": "group"})
    assert PRECISION.choices(small, [INT4, by_group], make_device()) == (INT4,)
    assert PRECISION.choices(layer, [INT4, by_group], make_device()) == (by_group, INT4)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": 8, "activation_bits": 32, "activation_range": "dynamic"},
        {"weight_bits": 32, "activation_bits": 8, "activation_range": "dynamic"},
        {
            "weight_bits": 8,
            "activation_bits": 8,
            "activation_range": "dynamic",
            "activation_sign": "signed",
        },
        {"weight_bits": 4, "activation_bits": 8, "granularity": "group"},
    ],
)
def test_what_no_runtime_has_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="precision"):
        make_decision(Precision, fields)


def test_fewer_bits_change_the_outputs_more() -> None:
    network = bank_of("tokens").network
    x = torch.randn(16, 7, 6, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (8, 4, 2):
        steps = [
            Step(n, Precision(weight_bits=bits, activation_bits=32)) for n in ("up", "down", "head")
        ]
        changed = assemble(bank_of("tokens"), Plan(tuple(steps))).network
        errors.append(float((run(changed, (x,))[0] - run(network, (x,))[0]).square().mean()))
    assert errors[0] < 0.1 * errors[1] and errors[1] < 0.5 * errors[2]
