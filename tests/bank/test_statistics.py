from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import assemble, bank_of, gathered, graph_of, make_case
from torch import Tensor, nn

from autocompress.bank import Bank
from autocompress.bank.statistics import (
    Gathering,
    collect_statistics,
    plan_passes,
    unfold_inputs,
)
from autocompress.config import CalibrationSettings
from autocompress.graph import trace
from autocompress.plan import Plan, Step
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.technique import LayerStatistics

LAYERS = {
    "linear": (nn.Linear(4, 5), (3, 4)),
    "linear on tokens": (nn.Linear(4, 5), (3, 6, 4)),
    "plain": (nn.Conv2d(3, 5, 3), (2, 3, 7, 6)),
    "stride and padding": (nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 2)), (2, 3, 7, 6)),
    "dilation": (nn.Conv2d(3, 5, 3, dilation=(1, 2), padding=1), (2, 3, 7, 6)),
    "reflect": (nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 7, 6)),
    "circular": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (2, 3, 7, 6)),
    "replicate": (nn.Conv2d(3, 5, 3, 2, padding=2, padding_mode="replicate"), (2, 3, 7, 6)),
    "same": (nn.Conv2d(3, 5, (3, 4), padding="same", dilation=(1, 2)), (2, 3, 7, 6)),
    "same, dilated, reflect": (
        nn.Conv2d(3, 5, (2, 3), padding="same", dilation=2, padding_mode="reflect"), (2, 3, 7, 6),
    ),
    "valid": (nn.Conv2d(3, 5, 3, padding="valid"), (2, 3, 7, 6)),
    "signal": (nn.Conv1d(3, 5, 4, stride=2, padding=3, dilation=2), (2, 3, 15)),
    "signal, same": (nn.Conv1d(3, 5, 4, padding="same", dilation=2), (2, 3, 15)),
    "signal, reflect": (nn.Conv1d(3, 5, 3, padding=2, padding_mode="reflect"), (2, 3, 15)),
}  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def expected_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's own output, bias taken off, as rows in the order of the unfolded inputs."""
    with torch.no_grad():
        output = layer(x)
    if not isinstance(layer, nn.Linear):
        output = output.flatten(2).transpose(1, 2)
    return output.reshape(-1, 5) - layer.bias.detach()


@pytest.mark.parametrize("name", LAYERS)
def test_unfolded_inputs_times_the_weight_are_the_output(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=generator())
    rows = unfold_inputs(layer, x, generator(), 10_000)
    assert rows.shape[1] == layer.weight[0].numel()
    found = rows @ layer.weight.detach().reshape(5, -1).T
    torch.testing.assert_close(found, expected_rows(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear on tokens", "plain", "signal"])
def test_fewer_rows_are_a_sample_of_all_of_them(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=generator())
    every = {tuple(row) for row in unfold_inputs(layer, x, generator(), 10_000).tolist()}
    some = [tuple(row) for row in unfold_inputs(layer, x, generator(), 6).tolist()]
    assert 0 < len(some) <= 6 < len(every)
    assert len(set(some)) == len(some) and set(some) <= every


@pytest.mark.parametrize("name", ["residual", "flatten", "signal", "tokens", "two_inputs"])
def test_statistics_are_the_exact_moments_when_all_rows_are_used(name: str) -> None:
    """Over batches of unequal size: 96 samples in batches of 64."""
    case = make_case(name)
    seen: dict[str, Tensor] = {}
    handles = [
        case.network.get_submodule(layer.name).register_forward_pre_hook(
            lambda m, args, key=layer.name: seen.update({key: args[0]})
        )
        for layer in graph_of(name).layers
    ]
    with torch.no_grad():
        case.network(*case.inputs)
    for handle in handles:
        handle.remove()
    found = gathered(case.network, graph_of(name).layers, case.inputs, 10**9)
    assert set(found) == set(seen)
    for key, inputs in seen.items():
        module = case.network.get_submodule(key)
        x = unfold_inputs(module, inputs, generator(), 10**9).double()
        torch.testing.assert_close(found[key].mean, x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[key].moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_sampled_statistics_are_near_the_exact_ones() -> None:
    case, layers = make_case("residual"), graph_of("residual").layers
    exact = gathered(case.network, layers, case.inputs, 10**9)
    some = gathered(case.network, layers, case.inputs, 1500)
    again = gathered(case.network, layers, case.inputs, 1500)
    for name in ("block1.conv1", "block2.conv2"):
        error = (some[name].moment - exact[name].moment).norm() / exact[name].moment.norm()
        assert 0 < error < 0.2
        assert torch.equal(some[name].moment, again[name].moment)


def test_every_sample_weighs_the_same_also_in_a_short_last_batch() -> None:
    """65 samples come in batches of 64 and 1; only the last one is not zero."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1)).eval()
    x = torch.zeros(65, 2, 20, 20)
    x[-1] = 1
    layers = trace(network, (x[:2],)).layers
    for rows in (650, 10**9):
        mean = gathered(network, layers, (x,), rows)["0"].mean
        torch.testing.assert_close(mean, torch.full((2,), 1 / 65, dtype=torch.float64))


def test_grouped_convolutions_have_no_statistics() -> None:
    bank = bank_of("depthwise")
    assert bank.statistics("depthwise") is None
    assert bank.statistics("project") is not None


def test_selected_columns() -> None:
    statistics = bank_of("flatten").statistics("head")
    assert statistics is not None
    some = statistics.select([1, 4])
    assert some.moment.tolist() == [
        [float(statistics.moment[i, j]) for j in (1, 4)] for i in (1, 4)
    ]
    assert some.mean.tolist() == [float(statistics.mean[i]) for i in (1, 4)]


def test_the_network_keeps_no_hooks_even_if_it_fails() -> None:
    case = make_case("residual")
    with pytest.raises(RuntimeError):
        gathered(case.network, graph_of("residual").layers, (torch.randn(4, 9, 8, 8),), 100)
    assert not any(m._forward_pre_hooks for m in case.network.modules())


def test_progress_is_told_once_per_batch() -> None:
    case, ticks = make_case("flatten"), []
    gathering = Gathering(case.network, graph_of("flatten").layers, case.inputs, 1000)
    for _ in collect_statistics(gathering, gathering.observed, lambda: ticks.append(1)):
        pass
    assert len(ticks) == gathering.batches == 2


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_small_variances_around_large_means_are_kept(offset: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = 0.1 * torch.randn(128, 16) + offset
    bank = Bank(network, trace(network, (x[:2],)), 1, tmp_path)
    bank.calibrate((x,), CalibrationSettings())
    statistics = bank.statistics("0")
    assert statistics is not None
    centred = x.double() - x.double().mean(0)
    found = statistics.moment - torch.outer(statistics.mean, statistics.mean)
    torch.testing.assert_close(found, centred.T @ centred / 128, rtol=1e-3, atol=1e-4)
    steps = (Step("0", LowRank(rank_ratio=0.5)), Step("0", FilterPrune(pruning_ratio=0.5)))
    outputs = assemble(bank, Plan(steps)).network(x)
    assert bool(outputs.isfinite().all())


def fields_of(statistics: LayerStatistics | None) -> dict[str, Tensor]:
    assert statistics is not None
    return dict(vars(statistics))


def assert_equal_statistics(one: LayerStatistics | None, other: LayerStatistics | None) -> None:
    for field, value in fields_of(one).items():
        assert torch.equal(value, fields_of(other)[field]), field


@pytest.mark.parametrize("rows", [500, 10**9])
@pytest.mark.parametrize("name", ["residual", "flatten", "signal", "tokens", "two_inputs"])
def test_statistics_do_not_depend_on_which_layers_go_together(name: str, rows: int) -> None:
    case = make_case(name)
    gathering = Gathering(case.network, graph_of(name).layers, case.inputs, rows)
    together = dict(collect_statistics(gathering, gathering.observed))
    assert set(together) == {layer.name for layer in gathering.observed}
    for layer in gathering.observed:
        ((key, alone),) = collect_statistics(gathering, [layer])
        assert key == layer.name
        assert_equal_statistics(alone, together[key])


def test_passes_hold_as_many_layers_as_the_bound_allows() -> None:
    layers = Gathering(make_case("residual").network, graph_of("residual").layers, (), 1).observed
    sizes = {x.name: 8 * x.in_features * (x.in_features + 3) for x in layers}
    for bound in (1, max(sizes.values()), sum(sizes.values()) // 2, sum(sizes.values())):
        passes = plan_passes(layers, bound)
        assert [x for part in passes for x in part] == list(layers)
        held = [sum(sizes[x.name] for x in part) for part in passes]
        assert all(h <= bound or len(part) == 1 for h, part in zip(held, passes, strict=True))
        # The next layer would not have gone along.
        for total, after in zip(held, passes[1:], strict=False):
            assert total + sizes[after[0].name] > bound
    assert len(plan_passes(layers, 1)) == len(layers)
    assert len(plan_passes(layers, sum(sizes.values()))) == 1
    assert plan_passes((), 1) == []
