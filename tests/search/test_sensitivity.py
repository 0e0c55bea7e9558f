from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import bank_of, graph_of, make_case, run
from torch import Tensor, nn

from autocompress.bank import Bank
from autocompress.bank.changes import changed_layers
from autocompress.graph import NetworkGraph
from autocompress.graph.layers import observe_layers
from autocompress.plan import Decision
from autocompress.search import sensitivity
from autocompress.search.beside import run_beside
from autocompress.search.sensitivity import (
    Change,
    Sensitivities,
    SensitivityRun,
    filled_levels,
    thinned,
)
from autocompress.search.space import Parameter, Space
from autocompress.techniques import NETWORK, Stage
from autocompress.techniques.block_drop import BlockDrop
from autocompress.techniques.entropy_grid import EntropyGrid
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision
from autocompress.techniques.stock import StockQuantizer
from autocompress.workload.output_loss import constant_loss, output_loss

DROP = BlockDrop(drop=True)
INT8 = Precision(weight_bits=8, activation_bits=8)
WHOLE_TENSOR = Precision(weight_bits=8, activation_bits=8, granularity="tensor")
PRUNING = tuple(FilterPrune(pruning_ratio=r) for r in (0.25, 0.5, 0.75))
RANKS = (LowRank(rank_ratio=0.6), LowRank(rank_ratio=0.3))
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
Moments = dict[str, tuple[Tensor, Tensor]]


def space_of(graph: NetworkGraph, *, layers: int | None = None) -> Space:
    """Pruning of every group, and low rank or integers for the first so many layers."""
    chosen = [layer.name for layer in graph.layers if layer.groups == 1][:layers]
    return Space(
        (
            *(Parameter(Stage.PRUNE, g.name, PRUNING) for g in graph.groups if g.prunable),
            *(Parameter(Stage.DECOMPOSE, name, RANKS) for name in chosen),
            *(Parameter(Stage.QUANTIZE, name, (INT8,)) for name in chosen),
        )
    )


def first(inputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    return tuple(x[:count] for x in inputs)


@pytest.mark.parametrize("name", ["residual", "signal", "attention", "two_inputs", "two_outputs"])
def test_without_a_change_every_part_gives_the_originals_outputs(name: str) -> None:
    case = make_case(name)
    inputs = first(case.inputs, 12)
    original = run(case.network, inputs)
    found = run_beside(case.network, [{}, {}, {}], inputs)
    assert len(found) == 4
    for part in found:
        for one, other in zip(part, original, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert output_loss(found[0], part, class_scores=True) < 1e-10
        assert output_loss(found[0], part, class_scores=False) < 1e-10
    assert not any(m._forward_hooks for m in case.network.modules())


def test_hooks_go_away_though_a_change_fails() -> None:
    case = make_case("residual")
    with pytest.raises(RuntimeError):
        run_beside(case.network, [{"stem": nn.Conv2d(2, 3, 1)}], first(case.inputs, 4))
    assert not any(m._forward_hooks for m in case.network.modules())


class Counted(nn.Linear):
    """Knows how many rows it last computed."""

    rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows = len(x)
        return super().forward(x)


class Crossed(nn.Module):
    """Its second layer treats features as rows; its third sees samples again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.across, self.last = Counted(3, 3), Counted(12, 12), Counted(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.across(self.first(x).T).T)


def test_what_comes_before_the_first_change_is_computed_once() -> None:
    network = Crossed().eval()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = run(network, (torch.cat([x, x, x]),))[0]
    found = run_beside(network, [{"last": nn.Linear(3, 2)}, {}], (x,))
    torch.testing.assert_close(found[0][0], expected[:4])
    # `across` has as many rows as there are parts, which are no copies of each other.
    assert [layer.rows for layer in network.children()] == [4, 3, 12]
    assert not any("forward" in vars(layer) for layer in network.children())


def moments_of(network: nn.Module, inputs: tuple[Tensor, ...], visit: Any) -> None:
    """Run a network and call `visit` with each batch norm's name, itself and its input."""
    handles = [
        module.register_forward_pre_hook(
            lambda norm, args, name=name: visit(name, norm, args[0].transpose(0, 1).flatten(1))
        )
        for name, module in network.named_modules()
        if isinstance(module, NORMS)
    ]
    run(network, inputs)
    for handle in handles:
        handle.remove()


def alone(network: nn.Module, modules: Mapping[str, nn.Module], inputs: Any) -> tuple[Tensor, ...]:
    """A changed network by itself, its norms' statistics moved as the change moves the samples'."""
    before: Moments = {}
    moments_of(
        network,
        inputs,
        lambda name, _, rows: before.update({name: (rows.mean(1), rows.var(1, correction=0))}),
    )
    changed = copy.deepcopy(network)
    for name, module in modules.items():
        changed.set_submodule(name, module)

    def repair(name: str, norm: Any, rows: Tensor) -> None:
        mean, variance = before[name]
        ratio = rows.var(1, correction=0) / variance
        norm.running_mean.copy_(rows.mean(1) + (norm.running_mean - mean) * ratio.sqrt())
        norm.running_var *= ratio

    state = copy.deepcopy(changed)
    moments_of(state, inputs, repair)
    return run(state, inputs)


def quantized_alone(module: nn.Module) -> nn.Module:
    """A layer that rounds its input to 8 bits of its range."""

    def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        step = (high - low) / 255
        return (((x - low) / step).round() * step + low,)

    wrapped = nn.Sequential(copy.deepcopy(module))
    wrapped.register_forward_pre_hook(rounded)
    return wrapped


@pytest.mark.parametrize("name", ["residual", "signal", "attention", "stacked"])
def test_parts_equal_the_changed_networks_run_alone(name: str) -> None:
    case, bank = make_case(name), bank_of(name)
    graph = graph_of(name)
    inputs = first(case.inputs, 16)
    group = next(g.name for g in graph.groups if g.prunable)
    layers = [layer.name for layer in graph.layers if layer.groups == 1]
    steps: list[tuple[str, Decision]] = [
        (group, PRUNING[1]), (layers[1], RANKS[1]), (layers[1], INT8),
        (layers[-2], EntropyGrid(step=1.0)), (layers[0], INT8), (layers[1], WHOLE_TENSOR),
    ]  # fmt: skip
    steps += [(block.name, DROP) for block in graph.blocks]
    changes = [changed_layers(bank, target, decision) for target, decision in steps]
    found = run_beside(case.network, changes, inputs)
    for (_, decision), change, part in zip(steps, changes, found[1:], strict=True):
        modules = change
        if decision in (INT8, WHOLE_TENSOR):
            modules = {layer: quantized_alone(m) for layer, m in change.items()}
        expected = alone(case.network, modules, inputs)
        original = run(case.network, inputs)
        distance = float((expected[0] - original[0]).norm())
        assert float((part[0] - expected[0]).norm()) < 0.02 * distance


def test_inputs_are_rounded_wherever_the_weight_is_quantized() -> None:
    """Of the two decisions only the first rounds inputs, whether it folds the norm or not."""
    case, bank = make_case("residual"), bank_of("residual")
    inputs = first(case.inputs, 16)
    for granularity in ("channel", "tensor"):
        losses = []
        for bits in (8, 32):
            decision = Precision(weight_bits=8, activation_bits=bits, granularity=granularity)
            changed = changed_layers(bank, "block1.conv2", decision)
            original, part = run_beside(case.network, [changed], inputs)
            losses.append(output_loss(original, part, class_scores=False))
        assert losses[0] != pytest.approx(losses[1], rel=1e-3), granularity


class Scaled(nn.Module):
    """Linear, batch norm, linear: everything can be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.down = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


def test_repair_undoes_any_scale_and_shift_of_a_channel() -> None:
    network = Scaled().eval()
    inputs = (torch.randn(32, 2, generator=torch.Generator().manual_seed(0)),)
    with torch.no_grad():
        network.norm.running_mean[:] = network.up(inputs[0]).mean(0)
        network.norm.running_var[:] = torch.tensor([2.0, 0.5])
    changed = copy.deepcopy(network.up)
    with torch.no_grad():
        changed.weight.mul_(torch.tensor([[3.0], [0.2]]))
        changed.bias.add_(5.0)
    original, part = run_beside(network, [{"up": changed}], inputs)
    # But for the norm's epsilon nothing is left of it.
    assert output_loss(original, part, class_scores=False) < 1e-6


def test_a_change_after_all_norms_in_closed_form() -> None:
    """Twice the last weights: (2y - y)² is y², so the relative squared error is one."""
    network = Scaled().eval()
    inputs = (torch.randn(32, 2, generator=torch.Generator().manual_seed(0)),)
    changed = copy.deepcopy(network.down)
    with torch.no_grad():
        changed.weight.mul_(2.0)
    original, part = run_beside(network, [{"down": changed}], inputs)
    torch.testing.assert_close(part[0], 2 * original[0])
    assert output_loss(original, part, class_scores=False) == pytest.approx(1.0, abs=1e-5)
    p, q = (x[0].double().softmax(1) for x in (original, part))
    divergence = float((p * (p / q).log()).sum(1).mean())
    assert output_loss(original, part, class_scores=True) == pytest.approx(divergence, rel=1e-9)


def test_outputs_that_overflow_are_as_far_off_as_can_be() -> None:
    good, bad = [torch.ones(2, 3)], [torch.full((2, 3), math.inf)]
    for class_scores in (True, False):
        assert output_loss(good, bad, class_scores=class_scores) == 1e6


def new_run(folder: Path, *, class_scores: bool = True) -> SensitivityRun:
    bank = bank_of("residual")
    space = space_of(bank.graph)
    inputs = make_case("residual").inputs
    return SensitivityRun(bank, space, inputs, folder, class_scores=class_scores)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many changes each pass had that was measured, with few changes a pass."""
    counted: list[int] = []

    def count(network: Any, changes: Any, inputs: Any) -> Any:
        counted.append(len(changes))
        return run_beside(network, changes, inputs)

    monkeypatch.setattr(sensitivity, "_PASS", 512)
    monkeypatch.setattr(sensitivity, "run_beside", count)
    return counted


def test_an_interrupted_run_goes_on_and_a_finished_one_is_read(
    tmp_path: Path, passes: list[int]
) -> None:
    whole = new_run(tmp_path / "whole")
    for _ in whole.steps():
        pass
    assert len(passes) == whole.passes >= 3
    changes = sum(len(p.decisions) for p in space_of(bank_of("residual").graph).parameters)
    assert sum(passes) == changes == len(whole.result().losses)
    passes.clear()
    steps = new_run(tmp_path / "cut").steps()
    next(steps)
    next(steps)
    assert len(passes) == 2
    part = new_run(tmp_path / "cut").result()
    assert part.losses.items() < whole.result().losses.items()
    again = new_run(tmp_path / "cut")
    for _ in again.steps():
        pass
    assert len(passes) == whole.passes
    assert again.result() == whole.result()
    passes.clear()
    for _ in new_run(tmp_path / "cut").steps():
        pass
    assert not passes


def test_a_broken_file_is_measured_again(tmp_path: Path, passes: list[int]) -> None:
    run_ = new_run(tmp_path)
    for _ in run_.steps():
        pass
    expected, count = run_.result(), len(passes)
    sorted(tmp_path.iterdir())[0].write_text('{"cut')
    for _ in run_.steps():
        pass
    assert len(passes) == count + 1
    assert run_.result() == expected


def test_what_was_measured_of_another_loss_is_not_read(tmp_path: Path, passes: list[int]) -> None:
    for class_scores in (True, False):
        run_ = new_run(tmp_path, class_scores=class_scores)
        next(run_.steps())
    assert len(passes) == 2


def test_decisions_for_the_whole_network_are_not_measured(tmp_path: Path) -> None:
    bank = bank_of("residual")
    space = Space((Parameter(Stage.QUANTIZE, NETWORK, (StockQuantizer(mode="static"),)),))
    inputs = make_case("residual").inputs
    run_ = SensitivityRun(bank, space, inputs, tmp_path, class_scores=True)
    assert run_.passes == 0
    assert run_.result().losses == {}


def test_a_dropped_block_costs_the_divergence_of_the_network_without_it(tmp_path: Path) -> None:
    case, bank = make_case("stacked"), bank_of("stacked")
    names = [block.name for block in bank.graph.blocks]
    space = Space(tuple(Parameter(Stage.PRUNE, name, (DROP,)) for name in names))
    run_ = SensitivityRun(bank, space, case.inputs, tmp_path, class_scores=True)
    for _ in run_.steps():
        pass
    inputs = first(case.inputs, run_.samples)
    log_p = run(case.network, inputs)[0].double().log_softmax(1)
    losses = []
    for index, name in enumerate(names):
        network = copy.deepcopy(case.network)
        del network.layers[index]
        log_q = run(network, inputs)[0].double().log_softmax(1)
        losses.append(float((log_p.exp() * (log_p - log_q)).sum(1).mean()))
        assert run_.result().losses[Change(name, DROP).key] == pytest.approx(losses[-1], rel=1e-4)
    assert len(set(losses)) == 3 and min(losses) > 1e-4
    # Losses of single blocks are added up.
    chosen = {f"{name}|prune": 1 for name in names[:2]}
    assert run_.result().of(space).value(chosen) == pytest.approx(sum(losses[:2]), rel=1e-4)


def test_stronger_levels_never_cost_less_and_ties_add_up() -> None:
    losses = {
        Change("a", PRUNING[0]).key: 0.3, Change("a", PRUNING[1]).key: 0.1,
        Change("b", PRUNING[0]).key: 0.2, Change("b", PRUNING[2]).key: 0.9,
        Change("a", RANKS[0]).key: 0.05,
    }  # fmt: skip
    found = Sensitivities(losses, 16).of(
        Space(
            (
                Parameter(Stage.PRUNE, "a", (*PRUNING, *RANKS), tied=("b",)),
                Parameter(Stage.DECOMPOSE, "c", RANKS),
            )
        )
    )
    # Each technique of a parameter has its own order; a gap is filled along a power law.
    between = 0.2 * (0.9 / 0.2) ** (math.log(2) / math.log(3))
    expected = [0, 0.5, 0.3 + between, 0.3 + 0.9, 0.05, 0.05]
    assert found.factors[0].values.tolist() == pytest.approx(expected)
    assert found.factors[1].values.tolist() == [0, 0, 0]
    assert found.constant == 0


EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def deep(blocks: int) -> Bank:
    residual = importlib.import_module("residual")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = residual.ResidualNetwork(residual.Architecture(3, 10, (8, 16, 32), blocks)).eval()
    layers = observe_layers(network, (torch.zeros(1, 3, 16, 16),))
    return Bank(network, NetworkGraph(layers, (), {}), 1, Path("unused"))


def test_samples_fall_with_the_depth_so_that_the_work_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    inputs = (torch.zeros(256, 3, 16, 16),)
    decisions = tuple(LowRank(rank_ratio=r / 10) for r in range(1, 8))
    found = {}
    for blocks in (3, 18):
        bank = deep(blocks)
        layers = bank.graph.layers
        space = Space(tuple(Parameter(Stage.DECOMPOSE, x.name, decisions) for x in layers))
        run_ = SensitivityRun(bank, space, inputs, tmp_path, class_scores=True)
        # In every pass the original runs as well.
        rows = [run_.samples * (len(part) + 1) for _, part in run_._passes]
        assert max(rows) <= 512
        found[len(layers)] = (run_.samples, sum(rows) * bank.graph.macs)
    (many, small), (few, large) = found[22], found[112]
    assert many == 64
    assert 16 < few < 32
    assert small < large < 1.2 * 3e11
    # At the same samples it would be twice of that.
    assert large * many / few > 2 * 3e11


@given(
    losses=st.lists(st.one_of(st.none(), st.floats(1e-5, 10)), min_size=1, max_size=8),
)
def test_gaps_between_levels_are_filled_in_order_and_measured_ones_kept(losses) -> None:
    filled = filled_levels(losses)
    assert (np.diff(filled) >= 0).all()
    highest = 0.0
    for value, loss in zip(filled, losses, strict=True):
        if loss is not None:
            highest = max(highest, loss)
            assert value == pytest.approx(highest)


def test_a_single_level_tells_the_milder_ones_by_its_square() -> None:
    assert filled_levels([None, None, 0.9]).tolist() == pytest.approx([0.1, 0.4, 0.9])
    assert filled_levels([None, None]).tolist() == [0, 0]


@pytest.mark.parametrize(("share", "kept"), [(1.0, [0, 1, 2, 3, 4, 5]), (0.3, [2, 5]), (0.01, [5])])
def test_the_strongest_level_is_always_measured(share: float, kept: list[int]) -> None:
    levels = [Change("a", FilterPrune(pruning_ratio=(i + 1) / 8)) for i in range(6)]
    assert thinned(levels, share) == [levels[i] for i in kept]


def test_a_constant_output_loses_the_information_about_the_inputs() -> None:
    scores = torch.tensor([[30.0, 0.0], [0.0, 30.0], [30.0, 0.0], [0.0, 30.0]])
    assert constant_loss([scores], class_scores=True) == pytest.approx(math.log(2))
    assert constant_loss([torch.zeros(4, 3)], class_scores=True) == pytest.approx(0)
    # Mean 2, mean square 5: of that the variance, 1, is lost.
    values = torch.tensor([[1.0], [3.0]])
    assert constant_loss([values], class_scores=False) == pytest.approx(1 / 5)
    assert constant_loss([values, torch.tensor([1, 2])], class_scores=False) == pytest.approx(1 / 5)
