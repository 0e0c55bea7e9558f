"""What every technique must keep; a new one is covered by its line in `TECHNIQUES`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import (
    NAMES,
    assemble,
    bank_of,
    exporter_of,
    graph_of,
    make_case,
    make_device,
    new_bank,
    run,
)
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.errors import ConfigError, PlanError
from autocompress.export.observe import run_float
from autocompress.export.packed import stored_weight_bytes
from autocompress.export.quantize import quantize
from autocompress.plan import Decision, Plan, Step, make_decision
from autocompress.techniques import (
    NETWORK,
    TECHNIQUES,
    BlockTechnique,
    GroupTechnique,
    LayerTechnique,
    NetworkTechnique,
    Technique,
    read_plan,
    technique_named,
    technique_of,
)

NETWORKS = [name for name in NAMES if name != "reshaped"]
MOST_EXPORTS = 4
SOLVED = [t for t in TECHNIQUES if not isinstance(t, NetworkTechnique)]
LAYERWISE = [t for t in TECHNIQUES if isinstance(t, LayerTechnique)]
GROUPWISE = [t for t in TECHNIQUES if isinstance(t, GroupTechnique)]


def by_name(techniques: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("technique", techniques, ids=lambda t: t.name)


every_technique = by_name(list(TECHNIQUES))
every_solved_technique = by_name(SOLVED)
every_network = pytest.mark.parametrize("name", NETWORKS)


def schema_of(technique: Technique) -> dict[str, dict[str, Any]]:
    return technique.decision.model_json_schema()["properties"]


def some_values(schema: dict[str, Any]) -> list[Any]:
    """A few allowed values of a decision's field, from its schema."""
    if "const" in schema or "enum" in schema:
        return list(schema.get("enum", [schema.get("const")]))
    if schema["type"] == "boolean":
        return [True, False]
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    assert low is not None and high is not None, f"a field without bounds: {schema}"
    values = [low + share * (high - low) for share in (0.2, 0.4, 0.6, 0.8)]
    return sorted({math.floor(v) for v in values}) if schema["type"] == "integer" else values


def wrong_values(schema: dict[str, Any]) -> list[Any]:
    if "const" in schema or "enum" in schema:
        return [9, "eight", None]
    if schema["type"] == "boolean":
        return [7, "perhaps", None]
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    strict = [schema[key] for key in ("exclusiveMinimum", "exclusiveMaximum") if key in schema]
    return [low - 0.25, high + 0.25, math.nan, math.inf, "half", None, *strict]


@cache
def offered(technique: Technique) -> tuple[Decision, ...]:
    """Decisions that vary one field at a time; combinations that are refused are left out."""
    schema = schema_of(technique)
    fields = technique.decision.model_fields
    plain = {
        key: some_values(s)[0] if fields[key].is_required() else s["default"]
        for key, s in schema.items()
    }
    main = [key for key in schema if fields[key].is_required()]
    found: list[Decision] = []
    for field, values in ((key, some_values(s)) for key, s in schema.items()):
        for value in values:
            for start in some_values(schema[main[0]])[:2] if field not in main else [None]:
                varied = plain | ({} if start is None else {main[0]: start}) | {field: value}
                try:
                    found.append(make_decision(technique.decision, varied))
                except PlanError:
                    continue
    return tuple(dict.fromkeys(found))


def choices(
    technique: Technique, name: str, device: DeviceProfile | None = None
) -> dict[str, tuple[Decision, ...]]:
    """What a technique offers for every target of a network that it offers anything for."""
    graph, device = graph_of(name), device or make_device()
    if isinstance(technique, NetworkTechnique):
        return {NETWORK: technique.choices(graph, offered(technique), device)}
    targets = graph.groups if isinstance(technique, GroupTechnique) else graph.layers
    targets = graph.blocks if isinstance(technique, BlockTechnique) else targets
    if isinstance(technique, LayerTechnique):
        targets = tuple(layer for layer in graph.layers if layer.kind in technique.kinds)
    made = {
        t.name: technique.choices(t, offered(technique), device)  # type: ignore[arg-type]
        for t in targets
    }
    return {target: decisions for target, decisions in made.items() if decisions}


def everywhere(technique: Technique, name: str, strength: int) -> Plan:
    """Every target's choice of that strength, or its last."""
    return Plan(
        tuple(
            Step(target, decisions[min(strength, len(decisions) - 1)])
            for target, decisions in choices(technique, name).items()
        )
    )


def single_steps(technique: Technique, name: str) -> list[Step]:
    """Every decision that a network offers once, at one target after another."""
    found = choices(technique, name)
    takers: dict[Decision, list[str]] = {}
    for target, decisions in found.items():
        for decision in decisions:
            takers.setdefault(decision, []).append(target)
    return [Step(t[i % len(t)], decision) for i, (decision, t) in enumerate(takers.items())]


def exported_steps(technique: Technique, name: str) -> list[Step]:
    """A few of them, others for every network: an export costs up to a second."""
    steps = single_steps(technique, name)
    stride = max(1, len(steps) // MOST_EXPORTS)
    return steps[NETWORKS.index(name) % stride :: stride]


def state(network: nn.Module) -> dict[str, Tensor]:
    """All tensors, also the buffers that are not saved."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@every_technique
def test_it_is_found_by_its_name(technique: Technique) -> None:
    assert technique.name == technique.decision.technique
    assert technique_named(technique.name) is technique
    assert technique_of(technique.identity) is technique
    assert [t.name for t in TECHNIQUES].count(technique.name) == 1


def test_an_unknown_technique_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        technique_named("magic")
    assert all(t.name in str(caught.value) for t in TECHNIQUES)


@every_technique
def test_it_offers_only_what_it_was_given_and_never_the_identity(technique: Technique) -> None:
    some = False
    for name in NETWORKS:
        for decisions in choices(technique, name).values():
            some = True
            assert set(decisions) <= set(offered(technique))
            assert len(set(decisions)) == len(decisions)
            assert technique.identity not in decisions
    assert some


@every_solved_technique
@every_network
def test_the_original_is_untouched(technique: Technique, name: str) -> None:
    network = make_case(name).network
    before = {key: value.detach().clone() for key, value in state(network).items()}
    text = repr(network)
    assemble(bank_of(name), everywhere(technique, name, 99))
    after = state(network)
    assert repr(network) == text and not network.training
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@every_network
def test_the_empty_plan_keeps_the_outputs_exactly(name: str) -> None:
    case = make_case(name)
    stitched = assemble(bank_of(name), Plan())
    pairs = zip(run(stitched.network, case.inputs), run(case.network, case.inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert stitched.kept_channels == {}


@every_solved_technique
@every_network
def test_the_identity_decision_keeps_the_outputs(technique: Technique, name: str) -> None:
    case = make_case(name)
    targets = choices(technique, name)
    plan = Plan(tuple(Step(target, technique.identity) for target in targets))
    found = run(assemble(bank_of(name), plan).network, case.inputs)
    for a, b in zip(found, run(case.network, case.inputs), strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@every_solved_technique
@every_network
def test_every_choice_installs_and_keeps_the_outputs_shape(technique: Technique, name: str) -> None:
    case = make_case(name)
    wanted = run(case.network, case.inputs)
    for step in single_steps(technique, name):
        network = assemble(bank_of(name), Plan((step,))).network
        found = run(network, case.inputs)
        assert [f.shape for f in found] == [w.shape for w in wanted], step
        assert all(bool(f.isfinite().all()) for f in found), step
        assert not network.training


@every_solved_technique
@every_network
def test_it_changes_something(technique: Technique, name: str) -> None:
    case = make_case(name)
    plan = everywhere(technique, name, 99)
    if plan.steps:
        before, after = state(case.network), state(assemble(bank_of(name), plan).network)
        assert before.keys() != after.keys() or any(
            not torch.equal(value, after[key]) for key, value in before.items()
        )


@every_solved_technique
@every_network
def test_it_exports_with_parity(technique: Technique, name: str) -> None:
    for strength in (0, 99):
        network = assemble(bank_of(name), everywhere(technique, name, strength)).network
        assert exporter_of(name).export(network).parity <= 1e-4


@every_solved_technique
@every_network
def test_the_file_that_ships_computes_what_the_network_computes(
    technique: Technique, name: str
) -> None:
    """Weights stored in any way; integer activations add their own rounding."""
    case = make_case(name)
    inputs = [x.numpy() for x in case.inputs]
    for step in exported_steps(technique, name):
        network = assemble(bank_of(name), Plan((step,))).network
        floating = exporter_of(name).export(network)
        file = quantize(floating, inputs, make_device())
        fields = step.decision.model_dump()
        tolerance = 0.2 if fields.get("activation_bits", 32) < 32 else 1e-3
        for a, b in zip(run_float(file.model, inputs, ()), run(network, case.inputs), strict=True):
            error = float((torch.from_numpy(a) - b).abs().max())
            assert error <= tolerance * float(b.abs().max()), step


@by_name(LAYERWISE)
@every_network
def test_predicted_bytes_are_those_in_the_file(technique: LayerTechnique, name: str) -> None:
    inputs = [x.numpy() for x in make_case(name).inputs]
    for step in exported_steps(technique, name):
        floating = exporter_of(name).export(assemble(bank_of(name), Plan((step,))).network)
        file = quantize(floating, inputs, make_device())
        parts = {step.target, *(f"{step.target}.{i}" for i in range(9))}
        found = sum(
            stored_weight_bytes(file.model, site.initializer)
            for layer, site in floating.graph.sites.items()
            if layer in parts
        )
        layer = graph_of(name).layer(step.target)
        assert found == technique.stored_bytes(layer, step.decision, 1), step


@by_name(GROUPWISE)
@every_network
def test_a_pruned_file_has_the_bytes_of_its_channels(technique: GroupTechnique, name: str) -> None:
    for step in exported_steps(technique, name):
        stitched = assemble(bank_of(name), Plan((step,)))
        floating = exporter_of(name).export(stitched.network)
        for layer, site in floating.graph.sites.items():
            known = graph_of(name).layer(layer)
            gone = {side: len(stitched.removed.get((layer, side), ())) for side in ("in", "out")}
            thin = replace(
                known,
                in_channels=known.in_channels - (gone["in"] if known.groups == 1 else gone["out"]),
                out_channels=known.out_channels - gone["out"],
                groups=known.groups if known.groups == 1 else known.groups - gone["out"],
            )
            wanted = 4 * thin.out_channels * thin.in_features
            assert stored_weight_bytes(floating.graph.model, site.initializer) == wanted, layer


@every_network
def test_all_techniques_together_export_with_parity(name: str) -> None:
    """A layer that is pruned on both sides, decomposed, thinned and rounded."""
    chosen: dict[tuple[str, Any], Step] = {}
    for technique in SOLVED:
        for step in everywhere(technique, name, 1).steps:
            chosen.setdefault((step.target, technique.stage), step)
    network = assemble(bank_of(name), Plan(tuple(chosen.values()))).network
    assert exporter_of(name).export(network).parity <= 1e-4


@every_technique
@every_network
def test_plans_survive_their_json(technique: Technique, name: str) -> None:
    for step in single_steps(technique, name):
        plan = Plan((step,))
        again = read_plan(plan.to_rows())
        assert again == plan and again.hash == plan.hash
        assert all(type(step.decision) is technique.decision for step in again.steps)
        assert plan.hash != Plan().hash


@every_technique
def test_a_value_out_of_range_is_refused_with_what_is_allowed(technique: Technique) -> None:
    good = offered(technique)[0].model_dump()
    for field, schema in schema_of(technique).items():
        for value in wrong_values(schema):
            row = {"target": "layer", "technique": technique.name, **good, field: value}
            with pytest.raises(PlanError) as caught:
                read_plan([row])
            limits = [
                schema[key]
                for key in ("const", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
                if key in schema
            ] + schema.get("enum", [])
            assert field in str(caught.value.allowed)
            assert all(str(limit) in str(caught.value.allowed) for limit in limits)


@every_technique
def test_missing_and_unknown_fields_are_refused(technique: Technique) -> None:
    good = offered(technique)[0].model_dump()
    row = {"target": "layer", "technique": technique.name}
    for fields in ({}, {**good, "surprise": 1}):
        with pytest.raises(PlanError) as caught:
            read_plan([{**row, **fields}])
        assert all(field in str(caught.value.allowed) for field in schema_of(technique))


@every_solved_technique
def test_an_unknown_target_is_refused_with_the_allowed_ones(technique: Technique) -> None:
    plan = Plan((Step("nowhere", offered(technique)[0]),))
    with pytest.raises(PlanError, match="nowhere") as caught:
        assemble(bank_of("residual"), plan)
    known = "block1" if isinstance(technique, BlockTechnique) else "block1.conv1"
    assert known in str(caught.value.allowed).split(", ")


def test_two_decisions_of_one_stage_for_a_layer_are_refused() -> None:
    stages: dict[Any, list[LayerTechnique]] = {}
    for technique in LAYERWISE:
        stages.setdefault(technique.stage, []).append(technique)
    for rivals in stages.values():
        steps = tuple(Step("block1.conv1", t.identity) for t in rivals[:2])
        if len(steps) == 2:
            with pytest.raises(PlanError, match="same stage"):
                assemble(bank_of("residual"), Plan(steps))


@every_solved_technique
@every_network
def test_widths_without_a_kernel_are_not_offered(technique: Technique, name: str) -> None:
    device = make_device(kernels={"Conv": (32,), "Gemm": (32,), "MatMul": (32,)})
    for decisions in choices(technique, name, device).values():
        for decision in decisions:
            assert decision.model_dump().get("activation_bits", 32) == 32


@every_solved_technique
@every_network
def test_two_banks_give_the_same_tensors(technique: Technique, name: str, tmp_path: Path) -> None:
    plan = everywhere(technique, name, 1)
    first = state(assemble(bank_of(name), plan).network)
    second = state(assemble(new_bank(name, tmp_path), plan).network)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
