from __future__ import annotations

import gc
import importlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import graph_of, make_case
from torch import Tensor

import autocompress.bank.observations as observations_module
from autocompress.bank import Bank, Counter
from autocompress.config import CalibrationSettings
from autocompress.plan import Decision
from autocompress.techniques import LayerTechnique
from autocompress.techniques.filter_prune import FILTER_PRUNE, FilterPrune
from autocompress.techniques.low_rank import LOW_RANK, LowRank
from autocompress.techniques.precision import PRECISION, Precision

NAME = "residual"
# Less than the statistics of any layer take.
TINY = 256
SOLVED: tuple[tuple[LayerTechnique, Decision], ...] = (
    (LOW_RANK, LowRank(rank_ratio=0.5)),
    (PRECISION, Precision(weight_bits=4, activation_bits=8)),
)


def refuse(*args: Any) -> None:
    raise AssertionError("all of it was on disk")


class Counted:
    def __init__(self) -> None:
        self.total, self.done = -1, 0

    @property
    def counter(self) -> Counter:
        return Counter(self.begin, self.advance)

    def begin(self, batches: int) -> None:
        self.total = batches

    def advance(self) -> None:
        self.done += 1


def calibrated(
    folder: Path, counted: Counted | None = None, name: str = NAME, **limit: int
) -> Bank:
    case = make_case(name)
    bank = Bank(case.network, graph_of(name), 1, folder, **limit)
    # Few rows, so that they are drawn.
    settings = CalibrationSettings(rows_per_layer=1500)
    bank.calibrate(case.inputs, settings, (counted or Counted()).counter)
    return bank


def observed(bank: Bank) -> list[str]:
    return [layer.name for layer in bank.graph.layers if bank.statistics(layer.name) is not None]


def assert_same(one: Any, other: Any) -> None:
    assert one is not None and other is not None
    assert vars(one).keys() == vars(other).keys()
    for key, value in vars(one).items():
        assert torch.equal(value, vars(other)[key]), key


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_no_figure_depends_on_the_memory(name: str, tmp_path: Path) -> None:
    counts = Counted(), Counted()
    large = calibrated(tmp_path / "large", counts[0], name)
    small = calibrated(tmp_path / "small", counts[1], name, memory_bytes=TINY)
    names = observed(large)
    assert observed(small) == names
    # One pass, and one for each layer.
    assert counts[0].total == counts[0].done == 2
    assert counts[1].total == counts[1].done == 2 * len(names)
    for layer in names:
        assert_same(large.statistics(layer), small.statistics(layer))
        assert_same(large.gradients(layer), small.gradients(layer))
        for technique, decision in SOLVED:
            wanted = large.solve_unchanged(technique, decision, layer)
            found = small.solve_unchanged(technique, decision, layer)
            assert wanted.keys() == found.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    group = next(group for group in large.graph.groups if group.prunable)
    orders = [b.order(group, FILTER_PRUNE, FilterPrune(pruning_ratio=0.5)) for b in (large, small)]
    assert torch.equal(*orders)


class Watched:
    """Counts the bytes of all sums that are alive, and the most there were at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: dict[int, int] = {}
        self.most = 0
        # `autocompress.bank.statistics` by name: the package has no such attribute to patch.
        module = importlib.import_module("autocompress.bank.statistics")
        original, watched = module._Sums.__init__, self

        def begin(sums: Any, guess: Tensor) -> None:
            original(sums, guess)
            number, size = id(sums), 8 * len(guess) * (len(guess) + 3)
            watched.alive[number] = size
            watched.most = max(watched.most, sum(watched.alive.values()))
            weakref.finalize(sums, watched.alive.pop, number, None)

        monkeypatch.setattr(module._Sums, "__init__", begin)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_no_more_than_the_bound_is_held(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [x for x in graph_of(NAME).layers if x.dense and x.compressible]
    sizes = [8 * x.in_features * (x.in_features + 3) for x in layers]
    bound = max(max(sizes), int(share * sum(sizes)))
    watched, counted = Watched(monkeypatch), Counted()
    bank = calibrated(tmp_path, counted, memory_bytes=bound)
    assert 2 < counted.total < 2 * len(layers)
    assert max(sizes) <= watched.most <= bound
    gc.collect()
    assert not watched.alive
    for layer in layers:
        for technique, decision in SOLVED:
            bank.solve_unchanged(technique, decision, layer.name)
            # The last one stays, however large it is.
            assert bank.held_bytes <= max(bound // 3, max(sizes) + 8 * layer.in_features)


def test_only_what_is_missing_is_gathered(tmp_path: Path) -> None:
    bank = calibrated(tmp_path)
    wanted = {layer: bank.statistics(layer) for layer in observed(bank)}
    again = Counted()
    calibrated(tmp_path, again)
    assert again.total == again.done == 0
    path = max(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    path.unlink()
    healed = Counted()
    bank = calibrated(tmp_path, healed, memory_bytes=TINY)
    assert healed.total == healed.done == 2 and path.exists()
    for layer, statistics in wanted.items():
        assert_same(statistics, bank.statistics(layer))


def test_what_is_damaged_while_it_is_used_is_gathered_again(tmp_path: Path) -> None:
    bank = calibrated(tmp_path, memory_bytes=TINY)
    layer, *_, last = observed(bank)
    wanted = calibrated(tmp_path / "other").statistics(layer)
    assert bank.statistics(last) is not None
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert_same(wanted, bank.statistics(layer))


def test_gradients_are_counted_and_read_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, counted = calibrated(tmp_path), calibrated(tmp_path), Counted()
    first.gather_gradients(counted.counter)
    assert counted.total == counted.done == 3

    monkeypatch.setattr(observations_module, "collect_gradients", refuse)
    again.gather_gradients(counted.counter)
    assert counted.total == 0 and counted.done == 3
    for layer in observed(first):
        assert_same(first.gradients(layer), again.gradients(layer))


@pytest.mark.parametrize("gradients", [False, True])
def test_another_process_goes_on_with_all_of_it(
    gradients: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = calibrated(tmp_path / "one", name="tokens")
    if gradients:
        bank.gather_gradients()
        monkeypatch.setattr(observations_module, "collect_gradients", refuse)
    monkeypatch.setattr(observations_module, "collect_statistics", refuse)
    other = Bank(bank.network, bank.graph, 1, tmp_path / "other", memory_bytes=TINY)
    other.take(bank.state())
    assert observed(other) == observed(bank) and observed(bank)
    for layer in observed(bank):
        assert_same(bank.statistics(layer), other.statistics(layer))
        assert_same(bank.gradients(layer), other.gradients(layer))
