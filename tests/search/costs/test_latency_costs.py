from __future__ import annotations

import json

import numpy as np
import pytest
from networks import exporter_of, graph_of, make_case, make_device
from tiny_costs import ClosedFormWorker, tiny

from autocompress.config import SearchSpace
from autocompress.errors import ExportError, MeasurementError
from autocompress.measure.client import Worker
from autocompress.measure.explain.graph import graph_of as file_graph
from autocompress.search.costs.latency import fitted_costs, latency_costs, macs_costs
from autocompress.search.costs.layer_shapes import droppable, shaped_layers
from autocompress.search.costs.probes import (
    Link,
    Probe,
    Probes,
    Probing,
    links_of,
    probe_values,
    quick_profile,
)
from autocompress.search.random_plans import random_plans
from autocompress.search.space import build_space
from autocompress.techniques.technique import Stage

RUNTIME = "onnxruntime"


def probing(folder, probes: int = 7) -> Probing:
    return Probing(RUNTIME, tiny().inputs, 8, folder, probes)


def costs_by(worker, folder, builder=None):
    made = tiny()
    return latency_costs(made.graph, made.space, builder or made.builder, worker, probing(folder))


def test_costs_are_those_of_files_that_were_never_profiled(tmp_path) -> None:
    made, worker = tiny(), ClosedFormWorker()
    costs = costs_by(worker, tmp_path)
    assert [f.name for f in costs.factors[:3]] == [layer.name for layer in made.graph.layers]
    errors = []
    for plan in random_plans(made.space, 8, np.random.default_rng(5)):
        real = worker.latency_ms(made.builder.build("other", plan).path)
        values = {
            p.name: i for p in made.space.parameters for i, d in enumerate(p.decisions, 1)
            if any((s.target, s.decision) == (p.target, d) for s in plan.steps)
        }  # fmt: skip
        errors.append(abs(costs.value(values) / real - 1))
    assert np.mean(errors) < 0.08
    assert not list(made.builder.path("probe-0").parent.glob("probe-*"))


class NoBuilder:
    def path(self, name: str):
        raise AssertionError("nothing is to be built")


def test_probes_on_disk_are_read_unless_something_changed(tmp_path) -> None:
    worker = ClosedFormWorker()
    first = costs_by(worker, tmp_path)
    compared = worker.compared
    again = costs_by(worker, tmp_path, NoBuilder())
    assert worker.compared == compared and again.constant == first.constant
    assert all(
        (a.values == b.values).all() for a, b in zip(first.factors, again.factors, strict=True)
    )
    data = json.loads((tmp_path / "costs.json").read_text())
    assert len(data[RUNTIME]["probes"]) == 7
    worker.fingerprint.id = "another device"
    with pytest.raises(AssertionError, match="nothing is to be built"):
        costs_by(worker, tmp_path, NoBuilder())


def test_a_runtime_that_does_not_tell_is_refused(tmp_path) -> None:
    with pytest.raises(MeasurementError, match="There is no profile"):
        costs_by(ClosedFormWorker(has_profile=False), tmp_path)
    with pytest.raises(MeasurementError, match="does not tell which nodes"):
        costs_by(ClosedFormWorker(tells=False), tmp_path)
    assert not (tmp_path / "costs.json").exists()


class Fragile:
    """A builder and a device that fail for some of the probes."""

    def __init__(self, unbuilt: str, worker: ClosedFormWorker, unrun: str) -> None:
        self.unbuilt, self.worker, self.unrun = unbuilt, worker, unrun
        self.fingerprint, self.path, self.profile = (
            worker.fingerprint, tiny().builder.path, worker.profile,
        )  # fmt: skip

    def build(self, name, plan):
        if name == self.unbuilt:
            raise ExportError("This one cannot be exported.")
        return tiny().builder.build(name, plan)

    def compare(self, baseline, candidate, inputs, **settings):
        if self.unrun in (baseline.model.stem, candidate.model.stem):
            raise MeasurementError("This one crashes.")
        return self.worker.compare(baseline, candidate, inputs, **settings)


def test_files_that_fail_are_left_out(tmp_path) -> None:
    fragile = Fragile("probe-3", ClosedFormWorker(), "probe-1")
    costs_by(fragile, tmp_path, fragile)
    probes = json.loads((tmp_path / "costs.json").read_text())[RUNTIME]["probes"]
    assert len(probes) == 5 and probes[0]["values"] == {}
    for bad in (
        Fragile("probe-0", ClosedFormWorker(), ""),
        Fragile("", ClosedFormWorker(), "probe-0"),
    ):
        with pytest.raises((ExportError, MeasurementError)):
            costs_by(bad, tmp_path / "other", bad)


def test_probes_are_the_original_whole_precisions_and_random_plans() -> None:
    space = tiny().space
    values = probe_values(space, 6, 0)
    rounded = {p.name for p in space.parameters if p.stage is Stage.QUANTIZE}
    assert values[0] == {} and values[1] == dict.fromkeys(rounded, 1)
    assert len({space.plan(v).hash for v in values}) == len(values) == 6
    assert values == probe_values(space, 6, 0) != probe_values(space, 6, 1)
    assert probe_values(space, 1, 0) == ({},)


def links(name: str) -> set[tuple[str, str, bool]]:
    model = exporter_of(name).export(make_case(name).network).graph.model
    found = links_of(file_graph(model), [layer.name for layer in graph_of(name).layers])
    return {(link.first, link.second, link.summed) for link in found}


def test_links_of_a_residual_network() -> None:
    assert links("residual") == {
        ("stem", "block1.conv1", False),
        ("block1.conv1", "block1.conv2", False),
        ("block1.conv2", "stem", True),
        ("block1.conv2", "block2.conv1", False),
        ("block1.conv2", "block2.shortcut", False),
        ("block2.conv1", "block2.conv2", False),
        ("block2.conv2", "block2.shortcut", True),
        ("block2.conv2", "head", False),
    }


def test_links_pass_what_is_no_layer() -> None:
    assert links("flatten") == {("conv", "hidden", False), ("hidden", "head", False)}


def test_a_link_costs_where_precisions_meet() -> None:
    made = tiny()
    shaped = shaped_layers(made.graph, made.space, 8)
    first, second = (x.layer.name for x in shaped[:2])
    rounded = [f"{name}|quantize" for name in (first, second)]
    plain = dict.fromkeys((first, second), 0.01)

    def probe(values: dict[str, int], extra: float) -> Probe:
        return Probe(values, 0.02 + extra, 1, tuple((n, 0, ms) for n, ms in plain.items()))

    mixed = [probe({name: 1}, 0.01) for name in rounded]
    same = [probe({}, 0.0), probe(dict.fromkeys(rounded, 1), 0.0)]
    costs = fitted_costs(shaped, Probes((*same, *mixed), (Link(first, second, False),)))
    link = costs.factors[-1]
    assert link.name == f"{first} -> {second}" and set(rounded) <= set(link.parameters)
    assert link.at({}) == link.at(dict.fromkeys(rounded, 1)) == 0
    assert link.at({rounded[0]: 1}) + link.at({rounded[1]: 1}) == pytest.approx(0.02, rel=0.25)


def test_what_a_block_holds_beside_its_layers_goes_with_it() -> None:
    """Layers take 0.01 ms each, a block another 0.05 ms that no layer's nodes tell of."""
    graph = graph_of("stacked")
    techniques = {
        "block_drop": {"drop": (True,)},
        "precision": {"weight_bits": (8,), "activation_bits": (8,)},
    }
    file = SearchSpace(version=1, name="drop", techniques=techniques)
    space = build_space(graph, file, make_device())
    shaped, blocks = shaped_layers(graph, space, 1), droppable(graph, space)

    def probe(*gone: str) -> Probe:
        left = [x.name for x in graph.layers if x.name.rpartition(".")[0] not in gone]
        parts = tuple((name, 0, 0.01) for name in left)
        milliseconds = 0.01 * len(left) + 0.05 * (3 - len(gone)) + 0.002
        return Probe({f"{name}|prune": 1 for name in gone}, milliseconds, 1, parts)

    names = [block.name for block in graph.blocks]
    seen = [probe(), probe(names[0]), probe(*names[:2]), probe(*names)]
    link = Link("layers.1.down", "layers.2.up", False)
    costs = fitted_costs(shaped, Probes(tuple(seen), (link,)), blocks)
    for unseen in (probe(names[1]), probe(names[2]), probe(*names[1:])):
        assert costs.value(unseen.values) == pytest.approx(unseen.milliseconds, rel=0.05)
    own = [f for f in costs.factors if f.name in names]
    assert [f.at({f.parameters[0]: 1}) for f in own] == [0, 0, 0]
    # What the layers do counts in no plan without the block.
    inner = {f"layers.1.{x}|quantize": 1 for x in ("up", "down")}
    drop = {"layers.1|prune": 1}
    assert costs.value({**drop, **inner}) == costs.value(drop)


def test_a_link_to_a_block_that_is_gone_costs_nothing() -> None:
    graph = graph_of("residual")
    techniques = {
        "block_drop": {"drop": (True,)},
        "precision": {"weight_bits": (8,), "activation_bits": (8,)},
    }
    file = SearchSpace(version=1, name="drop", techniques=techniques)
    space = build_space(graph, file, make_device())
    first, second = "stem", "block1.conv1"
    shaped = shaped_layers(graph, space, 1)
    parts = tuple((x.name, 0, 0.01) for x in graph.layers)
    rounded = [{f"{name}|quantize": 1} for name in (first, second)]
    probes = [Probe(v, 0.1 + 0.02 * (len(v) == 1), 1, parts) for v in ({}, *rounded)]
    probes.append(Probe({**rounded[0], **rounded[1]}, 0.1, 1, parts))
    costs = fitted_costs(shaped, Probes(tuple(probes), (Link(first, second, False),)))
    found = next(f for f in costs.factors if "->" in f.name)
    assert set(found.parameters) == {"stem|quantize", "block1.conv1|quantize", "block1|prune"}
    assert found.at(rounded[0]) > 0.01 and found.at({**rounded[0], "block1|prune": 1}) == 0


def test_macs_costs_scale_to_the_original() -> None:
    made = tiny()
    costs = macs_costs(made.graph, made.space, 8, 2.0)
    assert costs.value({}) == pytest.approx(2.0)
    rounded = {p.name: 1 for p in made.space.parameters if p.stage is Stage.QUANTIZE}
    assert costs.value(rounded) == pytest.approx(0.9)
    pruned = next(p for p in made.space.parameters if p.stage is Stage.PRUNE)
    half = costs.value({pruned.name: pruned.highest})
    assert half < costs.value({pruned.name: 1}) < 2.0


def test_probes_need_less_than_a_measurement() -> None:
    profile = tiny().profile
    quick = quick_profile(profile)
    assert quick.measuring.time_limit_s < profile.measuring.time_limit_s
    assert quick.model_copy(update={"measuring": profile.measuring}) == profile


@pytest.mark.slow
def test_a_real_device_is_probed(tmp_path) -> None:
    made = tiny()
    with Worker(quick_profile(made.profile), tmp_path) as worker:
        costs = latency_costs(made.graph, made.space, made.builder, worker, probing(tmp_path, 4))
    probes = json.loads((tmp_path / "costs.json").read_text())[RUNTIME]["probes"]
    # Far apart only if something is wrong: this is no benchmark.
    for row in probes:
        assert 0.4 < costs.value(row["values"]) / row["milliseconds"] < 2.5
