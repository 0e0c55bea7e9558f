from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_workload import QUICK_PROFILE, workload

from autocompress.config import SearchSpace
from autocompress.device import DeviceProfile, load_profile
from autocompress.export.exporter import Exporter
from autocompress.graph import trace
from autocompress.graph.groups import remove_channels
from autocompress.measure.table import timing
from autocompress.measure.table.block import Block
from autocompress.measure.table.channels import channels_of
from autocompress.measure.table.cut import cut_model
from autocompress.measure.table.joint import begin_of
from autocompress.measure.table.store import Entry
from autocompress.measure.table.table import Table
from autocompress.plan import Decision
from autocompress.search.levels import (
    group_rows,
    group_times,
    kept_sizes,
    layer_rows,
    level_blocks,
    pruned_blocks,
)
from autocompress.search.network_report import agreement
from autocompress.search.network_table import profile_network
from autocompress.search.random_plans import random_plans
from autocompress.search.space import Parameter, Space, build_space
from autocompress.search.thin import latency_alone, thin_space
from autocompress.search.variants import find_variants
from autocompress.techniques import technique_of
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.precision import Precision
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover
from autocompress.techniques.technique import NETWORK, Stage

RATIOS = (0.25, 0.5, 0.75)
INT8 = Precision(weight_bits=8, activation_bits=8)
SPACE = SearchSpace(
    version=1,
    name="tiny",
    techniques={
        "filter_prune": {"pruning_ratio": RATIOS},
        "precision": {"weight_bits": (8,), "activation_bits": (8,)},
    },
)


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    """A network of two convolutions of 32 channels, its space and its variants."""
    profile = DeviceProfile.model_validate(QUICK_PROFILE)
    made = workload()
    graph = trace(made.network, made.example_inputs)
    parity = tuple(x[:2] for x in made.calibration.inputs)
    exporter = Exporter(made.network, graph, made.example_inputs, parity)
    space = build_space(graph, SPACE, profile)
    variants = find_variants(made, graph, exporter, space, profile)
    return SimpleNamespace(
        profile=profile, workload=made, graph=graph, exporter=exporter, space=space,
        variants=variants, judged=(space, graph, variants),
    )  # fmt: skip


def table(tiny: SimpleNamespace, time: Callable[[Block], float], noise: float = 1e-4) -> Table:
    blocks = level_blocks(*tiny.judged, tiny.profile)
    return Table([Entry(b.key, time(b), noise, b) for b in blocks])


def by_channels(block: Block) -> float:
    """Faster with every channel less; integers take half."""
    channels = channels_of(block)
    assert channels is not None
    return (0.5 if is_integer(block) else 1.0) * (1 + channels.inputs * channels.outputs)


def is_integer(block: Block) -> bool:
    return begin_of(block).startswith("integer")


# random plans


def choices(*ratios: float) -> tuple[Decision, ...]:
    return tuple(FilterPrune(pruning_ratio=r) for r in ratios)


def large_space() -> Space:
    pruned = [Parameter(Stage.PRUNE, f"group{i}", choices(0.2, 0.4, 0.6, 0.8)) for i in range(6)]
    rounded = [Parameter(Stage.QUANTIZE, f"layer{i}", (INT8,)) for i in range(6)]
    trained = [
        Parameter(Stage.RECOVER, NETWORK, (Recover(epochs=1),)),
        Parameter(Stage.RETRAIN, NETWORK, (Qat(epochs=1),)),
    ]
    return Space((*pruned, *rounded, *trained))


def test_random_plans_are_distinct_reproducible_and_train_nothing() -> None:
    plans = random_plans(large_space(), 40, np.random.default_rng(0))
    again = random_plans(large_space(), 40, np.random.default_rng(0))
    assert plans == again and len({plan.hash for plan in plans}) == 40
    stages = {technique_of(step.decision).stage for plan in plans for step in plan.steps}
    assert stages == {Stage.PRUNE, Stage.QUANTIZE}


def test_random_plans_go_from_mild_to_strong_and_from_float_to_integers() -> None:
    plans = random_plans(large_space(), 60, np.random.default_rng(1))
    strengths = [
        sum(d.pruning_ratio for d in plan.of("filter_prune").values()) / 6 for plan in plans
    ]
    assert min(strengths) < 0.2 and max(strengths) > 0.6
    assert {len(plan.of("precision")) for plan in plans} >= {0, 3, 6}


def test_a_small_space_gives_what_it_has() -> None:
    space = Space((Parameter(Stage.PRUNE, "group", choices(0.25, 0.5)),))
    assert len(random_plans(space, 10, np.random.default_rng(0))) == 2


# variants and levels


def test_variants_are_the_network_in_every_precision(tiny) -> None:
    assert [v.name for v in tiny.variants] == ["fp32", "w8 a8"]
    names = [layer.name for layer in tiny.graph.layers]
    for variant in tiny.variants:
        assert [name for name in variant.layers if name] == names
    integer = tiny.variants[1]
    assert integer.precision == INT8 and integer.quantized == set(names)


def test_thinned_blocks_are_those_of_the_thinned_network(tiny) -> None:
    """Channels are really removed, and the network is exported and cut anew."""
    float_variant = tiny.variants[0]
    for group in tiny.graph.groups:
        if not group.prunable:
            continue
        for kept in kept_sizes(tiny.space, group, tiny.profile):
            network = copy.deepcopy(tiny.workload.network)
            remove_channels(network, [(group, list(range(kept, group.size)))])
            model = tiny.exporter.export(network).graph.model
            wanted = cut_model(model, 1).blocks
            changed = pruned_blocks(float_variant, group, kept)
            assert changed
            found = [changed.get(i, b) for i, b in enumerate(float_variant.cut.blocks)]
            assert found == list(wanted)


def test_times_of_a_group_are_of_the_same_blocks_at_every_level(tiny) -> None:
    group = tiny.graph.groups[0]
    sizes = kept_sizes(tiny.space, group, tiny.profile)
    assert sizes == (24, 16, 8)
    found = group_times(tiny.variants[0], group, sizes, table(tiny, by_channels, noise=3e-4))
    # The first layer reads 3 channels, and the second has 32 others.
    assert {k: s.latency_ms for k, s in found.items()} == {
        k: pytest.approx(1 + 3 * k + 1 + 32 * k) for k in (32, *sizes)
    }
    assert found[8].noise_ms == pytest.approx(3e-4 * math.sqrt(2))
    assert group_times(tiny.variants[0], group, sizes, Table(())) == {}


def test_rows_tell_every_layer_and_level(tiny) -> None:
    full = table(tiny, by_channels)
    layers = layer_rows(tiny.graph, tiny.variants, full)
    # The linear layer multiplies most: 128 x 10.
    assert [row.channels for row in layers] == ["128 -> 10", "32 -> 32, 3x3", "3 -> 32, 3x3"]
    assert layers[1].latency_ms == {"fp32": 1025.0, "w8 a8": 512.5}
    rows = group_rows(*tiny.judged, full, tiny.profile)
    kept = [row.kept for row in rows if row.group == tiny.graph.groups[0].name]
    assert kept == [32, 24, 16, 8]
    empty = layer_rows(tiny.graph, tiny.variants, Table(()))
    assert all(row.latency_ms == {"fp32": None, "w8 a8": None} for row in empty)


# levels that do not pay


def thinned(tiny: SimpleNamespace, found: Table):
    return thin_space(*tiny.judged, found, tiny.profile)


def ratios(space: Space, target: str) -> Sequence[float]:
    decisions = [
        d for p in space.parameters if (p.stage, p.target) == (Stage.PRUNE, target)
        for d in p.decisions
    ]  # fmt: skip
    return [d.pruning_ratio for d in decisions if isinstance(d, FilterPrune)]


def test_levels_that_pay_stay(tiny) -> None:
    found = thinned(tiny, table(tiny, by_channels))
    assert found.space == tiny.space and found.reasons == ()


def test_without_measurements_nothing_is_dropped(tiny) -> None:
    assert thinned(tiny, Table(())).space == tiny.space
    few = [variant.cut.blocks[0] for variant in tiny.variants]
    partly = [Entry(block.key, 1.0, 0.1, block) for block in few]
    kept = thinned(tiny, Table(partly)).space
    assert {p.target for p in kept.parameters if p.stage is Stage.PRUNE} == {
        p.target for p in tiny.space.parameters if p.stage is Stage.PRUNE
    }


def test_a_kernel_that_works_in_sixteens_makes_levels_between_them_useless(tiny) -> None:
    """24 of 32 channels take as long as 32, and 8 as long as 16: in floats and integers."""

    def tiled(block: Block) -> float:
        channels = channels_of(block)
        assert channels is not None
        if block.lead.operator != "Conv":
            return 1.0
        sixteens = -(-channels.inputs // 16) * -(-channels.outputs // 16)
        return (0.5 if is_integer(block) else 1.0) * sixteens

    found = thinned(tiny, table(tiny, tiled))
    groups = [group.name for group in tiny.graph.groups if group.prunable]
    assert groups and all(ratios(found.space, name) == [0.5] for name in groups)
    text = next(reason for reason in found.reasons if "32 -> 24" in reason)
    assert "fp32" in text and "w8 a8" in text and text.endswith("no faster")
    # The next milder level is the last one that stays.
    assert any("16 -> 8" in reason for reason in found.reasons)


def test_a_level_that_pays_in_one_precision_stays(tiny) -> None:
    def floats_never_pay(block: Block) -> float:
        return by_channels(block) if is_integer(block) else 5000.0

    found = thinned(tiny, table(tiny, floats_never_pay))
    for group in tiny.graph.groups:
        if group.prunable:
            assert ratios(found.space, group.name) == list(RATIOS)


def test_a_precision_that_is_no_faster_is_dropped_for_its_layer(tiny) -> None:
    def slow_integers(block: Block) -> float:
        first = channels_of(block).inputs == 3  # type: ignore[union-attr]
        return by_channels(block) * (4 if first and is_integer(block) else 1)

    found = thinned(tiny, table(tiny, slow_integers))
    name = tiny.graph.layers[0].name
    kept = {p.target for p in found.space.parameters if p.stage is Stage.QUANTIZE}
    assert kept == {layer.name for layer in tiny.graph.layers} - {name}
    assert any(reason.startswith(f"{name} at w8 a8") for reason in found.reasons)


def test_gains_within_the_noise_are_none(tiny) -> None:
    found = thinned(tiny, table(tiny, by_channels, noise=1e6))
    assert found.space.parameters == ()


def test_only_searches_for_latency_drop_levels() -> None:
    assert latency_alone(("metric", "latency"))
    assert not latency_alone(("metric",))
    for other in ("file_bytes", "download_bytes", "peak_memory", "energy"):
        assert not latency_alone(("metric", "latency", other))


# the whole


def test_agreement_in_closed_form() -> None:
    found = agreement([(1.1, 1.0), (1.8, 2.0), (4.0, 4.0)])
    assert found.plans == 3
    assert found.mean_absolute_error == pytest.approx(0.2 / 3)
    assert found.largest_error == pytest.approx(0.1)
    assert found.rank_correlation == pytest.approx(1.0)
    assert math.isnan(agreement([]).mean_absolute_error)
    assert math.isnan(agreement([(1.0, 1.0)]).rank_correlation)
    assert agreement([]).to_dict()["rank_correlation"] is None


def test_a_network_is_profiled_and_checked(tiny_experiment, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "_TIME_LIMIT_S", 0.03)
    monkeypatch.setattr(timing, "_FEWEST_ROUNDS", 1)
    experiment = tiny_experiment(search_space="quantize_only")
    profile = load_profile(str(tmp_path / "quick.yaml"))
    report = profile_network(profile, experiment, plans=1)
    assert report.failures == () and len(report.plans) == 1
    assert report.blocks.measured > 0 and report.cache.is_file()
    for row in (report.original, *report.plans):
        assert row.predicted.interpolated == 0
        # Far apart only if something is wrong: this is no benchmark.
        assert 0.2 < row.predicted.latency_ms / row.measured.value < 5
    assert all(t is not None for row in report.layers for t in row.latency_ms.values())
    assert json.loads(json.dumps(report.to_dict()))["agreement"]["plans"] == 1
    assert replace(report, plans=()).agreement.plans == 0
