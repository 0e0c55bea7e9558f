from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import bank_of, graph_of, make_case, new_bank
from torch import Tensor, nn

import autocompress.bank.bank as bank_module
import autocompress.bank.observations as observations_module
from autocompress.bank import Bank
from autocompress.bank.store import VariantStore, network_hash, tensors_hash
from autocompress.config import CalibrationSettings
from autocompress.plan import Decision
from autocompress.techniques import TECHNIQUES, GroupTechnique, LayerTechnique
from autocompress.techniques.codebook import CODEBOOK, Codebook
from autocompress.techniques.entropy_grid import ENTROPY_GRID, EntropyGrid
from autocompress.techniques.filter_prune import FILTER_PRUNE
from autocompress.techniques.hash_code import HASH_CODE, HashCode
from autocompress.techniques.low_rank import LOW_RANK, LowRank
from autocompress.techniques.precision import PRECISION, Precision
from autocompress.techniques.technique import LayerProblem, Variant
from autocompress.techniques.weight_prune import WEIGHT_PRUNE, WeightPrune

DECISIONS: dict[str, Decision] = {
    LOW_RANK.name: LowRank(rank_ratio=0.5),
    PRECISION.name: Precision(weight_bits=8, activation_bits=8),
    WEIGHT_PRUNE.name: WeightPrune(sparsity=0.5),
    CODEBOOK.name: Codebook(code_bits=3),
    HASH_CODE.name: HashCode(hash_bits=3),
    ENTROPY_GRID.name: EntropyGrid(step=1),
}
NAME = "residual"
LAYER = "block1.conv1"


class SolvedError(Exception):
    """A solver was asked although the answer should be on disk."""


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise SolvedError


def unsolvable(technique: LayerTechnique) -> LayerTechnique:
    return replace(technique, solve=refuse)


def counted(technique: LayerTechnique) -> tuple[LayerTechnique, list[str]]:
    calls: list[str] = []

    def solve(problem: LayerProblem, decision: Decision) -> Variant:
        calls.append(problem.layer.name)
        return technique.solve(problem, decision)

    return replace(technique, solve=solve), calls


def solve(bank: Bank, technique: LayerTechnique, name: str = LAYER) -> Variant:
    return bank.solve_unchanged(technique, DECISIONS[technique.name], name)


def assert_same(one: Variant, other: Variant) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key])


@pytest.mark.parametrize(
    "technique", [t for t in TECHNIQUES if isinstance(t, LayerTechnique)], ids=lambda t: t.name
)
def test_variants_come_back_bit_for_bit(technique: LayerTechnique, tmp_path: Path) -> None:
    first = solve(new_bank(NAME, tmp_path), technique)
    assert_same(first, solve(new_bank(NAME, tmp_path), unsolvable(technique)))


@pytest.mark.parametrize(
    "technique", [t for t in TECHNIQUES if isinstance(t, GroupTechnique)], ids=lambda t: t.name
)
def test_orders_come_back(technique: GroupTechnique, tmp_path: Path) -> None:
    group = graph_of(NAME).group("stem+1")
    order = new_bank(NAME, tmp_path).order(group, technique, technique.identity)
    again = new_bank(NAME, tmp_path).order(
        group, replace(technique, order=refuse), technique.identity
    )
    assert torch.equal(order, again) and order.dtype == torch.int64


def test_statistics_and_refits_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = new_bank(NAME, tmp_path)
    keep = tuple(range(9, 72))
    fitted = bank.refit(LAYER, keep, lasting=True)
    bank.refit(LAYER, keep[9:], lasting=False)
    monkeypatch.setattr(observations_module, "collect_statistics", refuse)
    monkeypatch.setattr(bank_module, "refit", refuse)
    again = new_bank(NAME, tmp_path)
    assert_same(fitted, again.refit(LAYER, keep, lasting=True))
    for layer in graph_of(NAME).layers:
        one, other = bank.statistics(layer.name), again.statistics(layer.name)
        assert one is not None and other is not None
        assert torch.equal(one.moment, other.moment) and torch.equal(one.mean, other.mean)
    with pytest.raises(SolvedError):
        again.refit(LAYER, keep[9:], lasting=False)


def test_the_same_is_solved_once(tmp_path: Path) -> None:
    bank = new_bank(NAME, tmp_path)
    technique, calls = counted(LOW_RANK)
    for ratio in (0.25, 0.5, 0.75):
        bank.solve_unchanged(technique, LowRank(rank_ratio=ratio), LAYER)
    assert calls == [LAYER]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\xff" * len(data)],
    ids=["empty", "half", "noise"],
)
def test_damaged_files_are_solved_again(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    group = graph_of(NAME).group("stem+1")
    bank = new_bank(NAME, tmp_path)
    variant, order = solve(bank, LOW_RANK), bank.order(group, FILTER_PRUNE, FILTER_PRUNE.identity)
    files = sorted(tmp_path.glob("*.safetensors"))
    # With the statistics of each layer.
    assert len(files) == 2 + sum(layer.dense for layer in graph_of(NAME).layers)
    for path in files:
        path.write_bytes(damage(path.read_bytes()))
    technique, calls = counted(LOW_RANK)
    again = new_bank(NAME, tmp_path)
    assert_same(variant, solve(again, technique))
    assert torch.equal(order, again.order(group, FILTER_PRUNE, FILTER_PRUNE.identity))
    assert calls == [LAYER]
    healed = new_bank(NAME, tmp_path)
    assert_same(variant, solve(healed, unsolvable(LOW_RANK)))


def _calibrated(
    network: nn.Module, inputs: tuple[Tensor, ...], folder: Path, **kwargs: int
) -> Bank:
    multiple = kwargs.pop("multiple", 1)
    bank = Bank(network, graph_of(NAME), multiple, folder)
    bank.calibrate(inputs, CalibrationSettings(**kwargs))
    return bank


def test_another_network_or_calibration_is_solved_anew(tmp_path: Path) -> None:
    case = make_case(NAME)
    network, inputs = case.network, case.inputs
    solve(_calibrated(network, inputs, tmp_path), LOW_RANK)
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.get_submodule("head").bias[0] += 1e-6
    shifted = copy.deepcopy(network)
    shifted.get_submodule("bn").running_mean[0] += 1e-3
    others = {
        "weight": _calibrated(changed, inputs, tmp_path),
        "statistics": _calibrated(shifted, inputs, tmp_path),
        "inputs": _calibrated(network, (inputs[0] + 1e-3,), tmp_path),
        "samples": _calibrated(network, inputs, tmp_path, statistics_samples=50),
        "rows": _calibrated(network, inputs, tmp_path, rows_per_layer=500),
        "multiple": _calibrated(network, inputs, tmp_path, multiple=8),
    }
    for name, bank in others.items():
        with pytest.raises(SolvedError):
            solve(bank, unsolvable(LOW_RANK))
            pytest.fail(f"another {name} read the old variant")


def test_only_the_first_samples_are_read(tmp_path: Path) -> None:
    case = make_case(NAME)
    whole = _calibrated(case.network, case.inputs, tmp_path, statistics_samples=40)
    some = _calibrated(case.network, (case.inputs[0][:40],), tmp_path)
    one, other = whole.statistics(LAYER), some.statistics(LAYER)
    assert one is not None and other is not None and torch.equal(one.moment, other.moment)


def test_free_biases() -> None:
    bank = bank_of("depthwise")
    assert bank.has_free_bias("project")  # batch norm
    assert bank.has_free_bias("head")  # its own
    tokens = copy.deepcopy(make_case("tokens").network)
    tokens.down.bias = None
    assert not Bank(tokens, graph_of("tokens"), 1, Path(bank._store._folder)).has_free_bias("down")


def test_the_memory_limit_drops_the_oldest_but_not_the_disk(tmp_path: Path) -> None:
    store = VariantStore(tmp_path, memory_bytes=1000)
    variants = {str(i): {"x": torch.full((100,), float(i))} for i in range(4)}
    for key, variant in variants.items():
        store.put(key, variant, lasting=key != "0")
    assert store.get("0") is None
    for key in ("1", "2", "3"):
        found = store.get(key)
        assert found is not None and torch.equal(found["x"], variants[key]["x"])


def test_putting_a_key_again_does_not_fill_the_memory(tmp_path: Path) -> None:
    store = VariantStore(tmp_path, memory_bytes=1000)
    store.put("kept", {"x": torch.ones(100)}, lasting=False)
    for _ in range(5):
        store.put("again", {"x": torch.zeros(100)}, lasting=False)
    assert store.get("kept") is not None


def test_hashes_tell_networks_and_tensors_apart() -> None:
    network = make_case(NAME).network
    assert network_hash(network) == network_hash(copy.deepcopy(network))
    strided = nn.Conv2d(1, 1, 1, stride=2)
    plain = nn.Conv2d(1, 1, 1)
    plain.load_state_dict(strided.state_dict())
    assert network_hash(plain) != network_hash(strided)
    x = torch.arange(6.0)
    assert tensors_hash((x,)) == tensors_hash((x.clone(),))
    assert len({tensors_hash(t) for t in ((x,), (x.reshape(2, 3),), (x.int(),), (x, x))}) == 4
    assert tensors_hash((x[::2],)) == tensors_hash((x[::2].contiguous(),))
