from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import (
    SAMPLES,
    assemble,
    bank_of,
    enliven,
    graph_of,
    make_case,
    run,
    set_statistics,
)
from torch import Tensor, nn

from autocompress.bank import Bank
from autocompress.config import CalibrationSettings
from autocompress.graph import trace
from autocompress.plan import Plan, Step
from autocompress.recover import BatchNormRepair
from autocompress.recover.normalization import moments
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMED = ["residual", "depthwise", "signal"]
Statistics = dict[str, tuple[Tensor, Tensor]]


def norms_of(network: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return {name: m for name, m in network.named_modules() if isinstance(m, kinds)}


def statistics_of(network: nn.Module) -> Statistics:
    return {
        name: (norm.running_mean.clone(), norm.running_var.clone())
        for name, norm in norms_of(network).items()
    }


def plain_estimate(network: nn.Module, inputs: tuple[Tensor, ...]) -> Statistics:
    """PyTorch's own training-mode statistics of one batch, but with the biased variance."""
    network = copy.deepcopy(network)
    set_statistics(network, inputs)
    return statistics_of(network)


def assert_close(one: Statistics, other: Statistics, tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name, pair in one.items():
        for a, b in zip(pair, other[name], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def pruned(name: str, ratio: float = 0.5, bank: Bank | None = None):
    graph = graph_of(name) if bank is None else bank.graph
    groups = [g for g in graph.groups if g.prunable]
    steps = tuple(Step(g.name, FilterPrune(pruning_ratio=ratio)) for g in groups)
    return assemble(bank or bank_of(name), Plan(steps))


def trained_elsewhere(network: nn.Module) -> nn.Module:
    """A copy whose norms have the statistics of other data."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(2)
    for norm in norms_of(network).values():
        norm.running_mean += torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_var *= 0.5 + torch.rand(norm.running_var.shape, generator=generator)
    return network


@pytest.mark.parametrize("samples", [8, 33, SAMPLES])
@pytest.mark.parametrize("name", NORMED)
def test_an_unchanged_network_keeps_the_statistics_that_it_was_trained_with(
    name: str, samples: int
) -> None:
    case = make_case(name)
    original = trained_elsewhere(case.network)
    network = copy.deepcopy(original)
    for norm in norms_of(network).values():
        norm.running_mean += 1  # they are set, not averaged with what is there
    BatchNormRepair(original, case.inputs, samples)(network, {})
    assert_close(statistics_of(network), statistics_of(original))


@pytest.mark.parametrize("name", NORMED)
def test_norms_give_the_moments_that_they_gave_in_the_original(name: str) -> None:
    """Whatever statistics those were trained with, channel by channel."""
    case = make_case(name)
    original = trained_elsewhere(case.network)
    network = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in (m.weight for m in network.modules() if isinstance(m, CONVOLUTIONS)):
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
            weight *= 3
    BatchNormRepair(original, case.inputs, SAMPLES)(network, {})
    found, expected = (
        outputs_of_norms(network, case.inputs),
        outputs_of_norms(original, case.inputs),
    )
    for key, output in found.items():
        for mine, its in zip(spread(output), spread(expected[key]), strict=True):
            torch.testing.assert_close(mine, its, rtol=2e-3, atol=2e-3, msg=key)


def outputs_of_norms(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        norm.register_forward_hook(lambda m, args, output, key=name: found.update({key: output}))
        for name, norm in norms_of(network).items()
    ]
    run(network, inputs)
    for handle in handles:
        handle.remove()
    return found


def spread(output: Tensor) -> tuple[Tensor, Tensor]:
    channels = output.transpose(0, 1).flatten(1)
    return channels.mean(1), channels.std(1)


@pytest.mark.parametrize("name", NORMED)
def test_with_all_the_samples_it_is_a_plain_estimate_of_the_changed_network(name: str) -> None:
    """Layer after layer: each norm sees what the repaired ones before it give."""
    case = make_case(name)
    stitched = pruned(name)
    expected = plain_estimate(stitched.network, case.inputs)
    BatchNormRepair(case.network, case.inputs, SAMPLES)(stitched.network, stitched.kept_channels)
    assert_close(statistics_of(stitched.network), expected)


def test_a_decomposed_network_is_repaired_too() -> None:
    case = make_case("residual")
    plan = Plan((Step("block1.conv1", LowRank(rank_ratio=0.3)),))
    stitched = assemble(bank_of("residual"), plan)
    expected = plain_estimate(stitched.network, case.inputs)
    BatchNormRepair(case.network, case.inputs, SAMPLES)(stitched.network, stitched.kept_channels)
    assert_close(statistics_of(stitched.network), expected)


def test_few_samples_estimate_far_better_than_their_own_mean(tmp_path: Path) -> None:
    """Against all 1024 samples, from 64 of them, over ten fixed draws of the data."""
    case = make_case("residual")
    errors: dict[str, list[float]] = {"controlled": [], "plain": []}
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1024, 2, 8, 8, generator=generator)
        level = torch.randn(1024, 1, 1, 1, generator=generator)
        inputs = (noise * (1 + level.abs()) + level,)
        network = copy.deepcopy(case.network)
        enliven(network, inputs)
        bank = Bank(network, trace(network, (inputs[0][:2],)), 1, tmp_path)
        bank.calibrate((inputs[0][:256],), CalibrationSettings(rows_per_layer=4096))
        stitched = pruned("residual", 0.25, bank)
        exact = plain_estimate(stitched.network, inputs)
        few = plain_estimate(stitched.network, tuple(x[:64] for x in inputs))
        BatchNormRepair(network, inputs, 64)(stitched.network, stitched.kept_channels)
        for kind, found in (("controlled", statistics_of(stitched.network)), ("plain", few)):
            errors[kind].append(distance(found, exact))
    wins = sum(a < b for a, b in zip(errors["controlled"], errors["plain"], strict=True))
    assert wins >= 9
    assert sum(errors["controlled"]) < 0.6 * sum(errors["plain"])


def distance(found: Statistics, exact: Statistics) -> float:
    """Mean squared error of means in deviations, and of log deviations."""
    total = []
    for name, (mean, variance) in exact.items():
        deviation = variance.sqrt()
        total.append(((found[name][0] - mean) / deviation).square().mean())
        total.append((found[name][1].sqrt() / deviation).log().square().mean())
    return float(torch.stack(total).mean())


@pytest.mark.parametrize("name", ["concat", "tokens", "two_inputs", "two_outputs"])
def test_networks_without_batch_norm_are_left_alone(name: str) -> None:
    case = make_case(name)
    stitched = pruned(name)
    before = {k: v.clone() for k, v in stitched.network.state_dict().items()}
    BatchNormRepair(case.network, case.inputs, 16)(stitched.network, stitched.kept_channels)
    after = stitched.network.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_only_statistics_change_and_no_hook_stays() -> None:
    case = make_case("residual")
    stitched = pruned("residual")
    before = {k: v.clone() for k, v in stitched.network.state_dict().items()}
    original = {k: v.clone() for k, v in case.network.state_dict().items()}
    BatchNormRepair(case.network, case.inputs, 16)(stitched.network, stitched.kept_channels)
    changed = {k for k, v in stitched.network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(key.endswith(("running_mean", "running_var")) for key in changed)
    for network in (case.network, stitched.network):
        assert not any(m._forward_pre_hooks for m in network.modules())
        assert not network.training
    assert all(torch.equal(v, original[k]) for k, v in case.network.state_dict().items())


class _Dead(nn.Module):
    """A batch norm with a channel that is always zero and one that is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        with torch.no_grad():
            self.conv.weight[:2] = 0
            self.conv.bias[:] = torch.tensor([0.0, 2.0, 0.5])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


def test_channels_that_never_vary_are_survived() -> None:
    network = _Dead().eval()
    inputs = (torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0)),)
    set_statistics(network, inputs)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.conv.weight[1] = 1  # varies where it used not to
        changed.conv.weight[2] = 0  # no longer varies
        changed.conv.bias[1:] += 1
    BatchNormRepair(network, inputs, 64)(changed, {})
    expected = plain_estimate(changed, inputs)["norm"]
    found = statistics_of(changed)["norm"]
    torch.testing.assert_close(found[0], expected[0])
    # A norm does not blow up what no longer varies: it keeps the deviation that it divides by.
    torch.testing.assert_close(found[1][:2], expected[1][:2])
    assert float(found[1][2]) == pytest.approx(float(network.norm.running_var[2]))


def test_a_channel_of_large_mean_and_small_deviation_keeps_its_variance() -> None:
    network = _Dead().eval()
    with torch.no_grad():
        network.conv.weight[2] = 0.01
        network.conv.bias[2] = 100
    inputs = (torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0)),)
    set_statistics(network, inputs)
    repair = BatchNormRepair(network, inputs, 8)
    repair(network, {})
    variance = float(torch.var(0.01 * inputs[0].sum(1), correction=0))
    assert float(network.norm.running_var[2]) == pytest.approx(variance, rel=0.02)


def test_norms_without_running_statistics_are_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    inputs = (torch.randn(16, 2, 4, 4),)
    BatchNormRepair(network, inputs, 8)(network, {})
    assert network[1].running_mean is None


def test_norms_on_vectors() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    inputs = (torch.randn(64, 4, generator=torch.Generator().manual_seed(0)),)
    set_statistics(network, inputs)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed[0].weight *= 1 + torch.arange(4) / 8
    BatchNormRepair(network, inputs, 64)(changed, {})
    assert_close(statistics_of(changed), plain_estimate(changed, inputs))


@pytest.mark.parametrize("name", NORMED)
def test_samples_beside_pass_the_repaired_norms_and_have_no_say(name: str) -> None:
    case = make_case(name)
    repair = BatchNormRepair(case.network, case.inputs, 24)
    assert all(torch.equal(a, b[:24]) for a, b in zip(repair.inputs, case.inputs, strict=True))
    generator = torch.Generator().manual_seed(1)
    # Of another kind than what the statistics are from.
    beside = tuple(5 + 3 * torch.randn(10, *x.shape[1:], generator=generator) for x in case.inputs)
    without, along = pruned(name), pruned(name)
    alone = repair(without.network, without.kept_channels)
    found = repair(along.network, along.kept_channels, beside)
    assert_close(statistics_of(along.network), statistics_of(without.network))
    for output, single in zip(found, alone, strict=True):
        assert len(output) == 24 + 10
        torch.testing.assert_close(output[:24], single, rtol=1e-4, atol=1e-4)
    both = tuple(torch.cat(pair) for pair in zip(repair.inputs, beside, strict=True))
    for output, again in zip(found, run(along.network, both), strict=True):
        torch.testing.assert_close(output, again, rtol=1e-4, atol=1e-4)


def test_several_inputs_and_outputs_have_samples_beside() -> None:
    for name in ("two_inputs", "two_outputs"):
        case = make_case(name)
        repair = BatchNormRepair(case.network, case.inputs, 8)
        beside = tuple(x[-5:] for x in case.inputs)
        found = repair(copy.deepcopy(case.network), {}, beside)
        both = tuple(torch.cat([x[:8], x[-5:]]) for x in case.inputs)
        for output, expected in zip(found, run(case.network, both), strict=True):
            torch.testing.assert_close(output, expected)


class _Flattened(nn.Module):
    """A batch norm that sees every token as a sample of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.down = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x).flatten(0, 1)).unflatten(0, x.shape[:2])).mean(1)


@pytest.mark.parametrize("samples", [16, 64])
def test_norms_that_see_several_rows_of_a_sample(samples: int) -> None:
    network = _Flattened().eval()
    inputs = (torch.randn(64, 5, 4, generator=torch.Generator().manual_seed(0)),)
    set_statistics(network, inputs)
    expected = statistics_of(network)
    repair = BatchNormRepair(network, inputs, samples)
    repair(network, {}, (100 + inputs[0][:3],))
    assert_close(statistics_of(network), expected)


@pytest.mark.parametrize("name", ["residual", "depthwise"])  # those with norms behind a change
def test_bf16_changes_statistics_by_little(name: str) -> None:
    case = make_case(name)
    found = {}
    for bf16 in (False, True):
        stitched = pruned(name, 0.25)
        repair = BatchNormRepair(case.network, case.inputs, 32, bf16=bf16)
        outputs = repair(stitched.network, stitched.kept_channels)
        assert all(torch.isfinite(o).all() for o in outputs)
        found[bf16] = statistics_of(stitched.network)
    differences = []
    for key, (mean, variance) in found[True].items():
        exact_mean, exact_variance = found[False][key]
        assert mean.dtype == variance.dtype == torch.float32
        differences.append((mean - exact_mean).abs() / exact_variance.sqrt())
        differences.append((variance / exact_variance).log().abs() / 2)
    error = torch.cat(differences)
    assert bool((error > 0).any())
    assert float(error.max()) < 0.02
    assert float(error.mean()) < 3e-3


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 11), (7, 3, 4, 5), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_closed_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) - 1).to(dtype)
    mean, variance = moments(x)
    assert mean.dtype == variance.dtype == torch.float64
    flat = x.double().reshape(shape[0], shape[1], -1)
    torch.testing.assert_close(mean, flat.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, flat.var(2, correction=0), rtol=1e-4, atol=1e-5)


def test_moments_of_a_small_deviation_around_a_large_mean() -> None:
    noise = torch.randn(4, 3, 1000, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([0.0, 1000.0, -50.0])[:, None] + 0.01 * noise
    _, variance = moments(x)
    expected = x.double().var(2, correction=0)
    torch.testing.assert_close(variance, expected, rtol=1e-3, atol=0)
