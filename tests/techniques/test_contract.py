"""What every technique must keep; a new one is covered by its line in `TECHNIQUES`."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import (
    NAMES,
    bank_of,
    exporter_of,
    graph_of,
    make_case,
    make_device,
    new_bank,
    run,
)
from torch import Tensor, nn

from autocompress.bank import stitch
from autocompress.device import DeviceProfile
from autocompress.errors import ConfigError, PlanError
from autocompress.plan import Decision, Plan, Step, make_decision
from autocompress.techniques import (
    TECHNIQUES,
    GroupTechnique,
    Technique,
    read_plan,
    technique_named,
)

NETWORKS = [name for name in NAMES if name != "reshaped"]
every_technique = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
every_network = pytest.mark.parametrize("name", NETWORKS)


def schema_of(technique: Technique) -> dict[str, dict[str, Any]]:
    return technique.decision.model_json_schema()["properties"]


def some_values(schema: dict[str, Any]) -> list[Any]:
    """A few allowed values of a decision's field, from its schema."""
    if "const" in schema or "enum" in schema:
        return list(schema.get("enum", [schema.get("const")]))
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    assert low is not None and high is not None, f"a field without bounds: {schema}"
    values = [low + share * (high - low) for share in (0.2, 0.4, 0.6, 0.8)]
    return sorted({math.floor(v) for v in values}) if schema["type"] == "integer" else values


def wrong_values(schema: dict[str, Any]) -> list[Any]:
    if "const" in schema or "enum" in schema:
        return [7, "eight", None]
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    strict = [schema[key] for key in ("exclusiveMinimum", "exclusiveMaximum") if key in schema]
    return [low - 0.25, high + 0.25, math.nan, math.inf, "half", None, *strict]


def offered(technique: Technique) -> list[Decision]:
    schema = schema_of(technique)
    return [
        make_decision(technique.decision, dict(zip(schema, values, strict=True)))
        for values in product(*map(some_values, schema.values()))
    ]


def choices(
    technique: Technique, name: str, device: DeviceProfile | None = None
) -> dict[str, tuple[Decision, ...]]:
    """What a technique offers for every target of a network that it offers anything for."""
    graph = graph_of(name)
    targets = graph.groups if isinstance(technique, GroupTechnique) else graph.layers
    made = {
        t.name: technique.choices(t, offered(technique), device or make_device())  # type: ignore[arg-type]
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


def state(network: nn.Module) -> dict[str, Tensor]:
    """All tensors, also the buffers that are not saved."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@every_technique
def test_it_is_found_by_its_name(technique: Technique) -> None:
    assert technique.name == technique.decision.technique
    assert technique_named(technique.name) is technique
    assert [t.name for t in TECHNIQUES].count(technique.name) == 1


def test_an_unknown_technique_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        technique_named("magic")
    assert all(t.name in str(caught.value) for t in TECHNIQUES)


@every_technique
def test_it_offers_something_on_every_structure(technique: Technique) -> None:
    for name in NETWORKS:
        found = choices(technique, name)
        assert found, name
        for decisions in found.values():
            assert set(decisions) <= set(offered(technique))
            assert len(set(decisions)) == len(decisions)


@every_technique
@every_network
def test_the_original_is_untouched(technique: Technique, name: str) -> None:
    network = make_case(name).network
    before = {key: value.detach().clone() for key, value in state(network).items()}
    text = repr(network)
    stitch(bank_of(name), everywhere(technique, name, 99))
    after = state(network)
    assert repr(network) == text and not network.training
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@every_network
def test_the_empty_plan_keeps_the_outputs_exactly(name: str) -> None:
    case = make_case(name)
    stitched = stitch(bank_of(name), Plan())
    pairs = zip(run(stitched.network, case.inputs), run(case.network, case.inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert stitched.kept_channels == {}


@every_technique
@every_network
def test_every_choice_installs_and_keeps_the_outputs_shape(technique: Technique, name: str) -> None:
    case = make_case(name)
    wanted = run(case.network, case.inputs)
    for target, decisions in choices(technique, name).items():
        for decision in decisions:
            network = stitch(bank_of(name), Plan((Step(target, decision),))).network
            found = run(network, case.inputs)
            assert [f.shape for f in found] == [w.shape for w in wanted], (target, decision)
            assert all(bool(f.isfinite().all()) for f in found), (target, decision)
            assert any(not torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
            assert not network.training


@every_technique
@every_network
def test_it_exports_with_parity(technique: Technique, name: str) -> None:
    for strength in (0, 99):
        network = stitch(bank_of(name), everywhere(technique, name, strength)).network
        floating = exporter_of(name).export(network)
        assert floating.parity <= 1e-4
        assert not floating.fresh


@every_network
def test_all_techniques_together_export_with_parity(name: str) -> None:
    """A layer that is pruned on both sides, decomposed and rounded."""
    steps = tuple(step for t in TECHNIQUES for step in everywhere(t, name, 1).steps)
    network = stitch(bank_of(name), Plan(steps)).network
    assert exporter_of(name).export(network).parity <= 1e-4


@every_technique
@every_network
def test_plans_survive_their_json(technique: Technique, name: str) -> None:
    for strength in range(4):
        plan = everywhere(technique, name, strength)
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


@every_technique
def test_an_unknown_target_is_refused_with_the_allowed_ones(technique: Technique) -> None:
    plan = Plan((Step("nowhere", offered(technique)[0]),))
    with pytest.raises(PlanError, match="nowhere") as caught:
        stitch(bank_of("residual"), plan)
    assert "block1.conv1" in str(caught.value.allowed)


@every_technique
@every_network
def test_widths_without_a_kernel_are_not_offered(technique: Technique, name: str) -> None:
    device = make_device(kernels={"Conv": (32,), "Gemm": (32,), "MatMul": (32,)})
    for decisions in choices(technique, name, device).values():
        for decision in decisions:
            fields = decision.model_dump()
            assert fields.get("weight_bits", 32) == fields.get("activation_bits", 32) == 32


@every_technique
@every_network
def test_two_banks_give_the_same_tensors(technique: Technique, name: str, tmp_path: Path) -> None:
    plan = everywhere(technique, name, 1)
    first = state(stitch(bank_of(name), plan).network)
    second = state(stitch(new_bank(name, tmp_path), plan).network)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
