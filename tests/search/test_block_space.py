"""What a search space makes of blocks: choices, rules, starting plans and random ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from networks import graph_of, make_case, make_device
from rich.console import Console

from autocompress.config import SearchSpace, load_search_space
from autocompress.errors import ConfigError
from autocompress.graph.owners import find_owners
from autocompress.plan import Plan, Step
from autocompress.report.inspection import inspection_parts
from autocompress.search.inspection import Inspection, inspect_network
from autocompress.search.random_plans import random_plans
from autocompress.search.seeds import uniform_seeds
from autocompress.search.space import Space, build_space, unused_values
from autocompress.techniques.block_drop import BlockDrop
from autocompress.techniques.filter_prune import FilterPrune

DROP, HALF = BlockDrop(drop=True), FilterPrune(pruning_ratio=0.5)
BLOCKS = ("layers.0", "layers.1", "layers.2")
TECHNIQUES = {
    "block_drop": {"drop": [False, True]},
    "filter_prune": {"pruning_ratio": [0.5]},
    "precision": {"weight_bits": [8], "activation_bits": [8]},
}


def file_of(techniques=TECHNIQUES, **keys) -> SearchSpace:
    return SearchSpace(version=1, name="mine", techniques=techniques, **keys)


def space_of(techniques=TECHNIQUES, name: str = "stacked", **keys) -> Space:
    return build_space(graph_of(name), file_of(techniques, **keys), make_device())


def dropping(space: Space) -> list[str]:
    return [p.target for p in space.parameters if p.drops]


def test_every_block_has_a_choice_of_its_own() -> None:
    space = space_of()
    assert dropping(space) == list(BLOCKS)
    assert {p.decisions for p in space.parameters if p.drops} == {(DROP,)}
    assert {p.name for p in space.parameters} >= {"layers.0|prune", "layers.0.up|prune"}
    assert dropping(space_of(name="flatten")) == []


def test_a_plan_has_no_steps_for_what_is_gone() -> None:
    space = space_of()
    everything = {p.name: 1 for p in space.parameters if p.target not in BLOCKS[1:]}
    found = space.plan(everything)
    assert found.of("block_drop") == {"layers.0": DROP}
    for technique in ("filter_prune", "precision"):
        inside = [t for t in found.of(technique) if t.startswith("layers.0.")]
        assert not inside and any(t.startswith("layers.1.") for t in found.of(technique))


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({"exclude": ["layers.0"]}, ["layers.1", "layers.2"]),
        # A layer that stays untouched stays.
        ({"exclude": ["layers.2.up"]}, ["layers.0", "layers.1"]),
        ({"exclude_techniques": {"layers.[12]": ["block_drop"]}}, ["layers.0"]),
        ({"exclude_techniques": {"layers.1.*": ["block_drop"]}}, ["layers.0", "layers.2"]),
        ({"exclude_techniques": {"layers.1.*": ["precision"]}}, list(BLOCKS)),
        ({"fix": {"layers.1": {"block_drop": {"drop": False}}}}, ["layers.0", "layers.2"]),
        ({"fix": {"layers.1": {"block_drop": {"drop": True}}}}, ["layers.0", "layers.2"]),
    ],
)
def test_blocks_are_excluded_and_fixed(keys, left) -> None:
    space = space_of(**keys)
    assert dropping(space) == left
    fixed = (Step("layers.1", DROP),) if "True" in str(keys) else ()
    assert space.fixed == fixed and set(fixed) <= set(space.plan({}).steps)


def test_a_block_cannot_be_fixed_and_excluded() -> None:
    fix = {"layers.1": {"block_drop": {"drop": True}}}
    with pytest.raises(ConfigError, match="excluded"):
        space_of(fix=fix, exclude=["layers.1.down"])
    with pytest.raises(ConfigError, match="matches nothing"):
        space_of(fix={"plain": {"block_drop": {"drop": True}}})


def test_a_tie_has_one_choice_for_blocks_and_one_for_the_groups_in_them() -> None:
    space = space_of(tie=[["layers.*"]])
    tied = {(p.target, p.stage.name): p.targets for p in space.parameters if p.tied}
    assert tied["layers.0", "PRUNE"] == BLOCKS
    assert tied["layers.0.up", "PRUNE"] == ("layers.0.up", "layers.1.up", "layers.2.up")
    both = {"layers.0|prune": 1, "layers.0.up|prune": 1}
    assert space.plan(both) == Plan(tuple(Step(name, DROP) for name in BLOCKS))
    only = space.plan({"layers.0.up|prune": 1})
    assert only == Plan(tuple(Step(f"{name}.up", HALF) for name in BLOCKS))


def test_random_plans_leave_most_blocks_in() -> None:
    plans = random_plans(space_of(), 60, np.random.default_rng(0))
    shares = [len(plan.of("block_drop")) / len(BLOCKS) for plan in plans]
    assert 0.05 < np.mean(shares) < 0.25
    assert max(shares) > 0.5


def test_starting_plans_take_no_block_out() -> None:
    space = space_of()
    seeds = uniform_seeds(space)
    assert seeds and not any(space.plan(seed).of("block_drop") for seed in seeds)
    assert any(space.plan(seed).of("filter_prune") for seed in seeds)
    assert uniform_seeds(space_of({"block_drop": {"drop": [True]}})) == []


def test_the_transformer_space_offers_whole_layers() -> None:
    file = load_search_space("transformer")
    space = build_space(graph_of("stacked"), file, make_device())
    assert dropping(space) == list(BLOCKS)
    assert not [
        text for text in unused_values(file, space, make_device()) if text.startswith("block_drop")
    ]
    without = build_space(graph_of("attention"), file, make_device())
    assert "block_drop drop True" in unused_values(file, without, make_device())


def inspected(techniques=TECHNIQUES, **keys) -> Inspection:
    case, graph = make_case("stacked"), graph_of("stacked")
    owners = find_owners(case.network, case.example_inputs, graph)
    return inspect_network(graph, owners, file_of(techniques, **keys), make_device())


def test_blocks_are_shown_with_what_they_hold() -> None:
    found = inspected(exclude=["layers.2.up"])
    assert [row.name for row in found.blocks] == list(BLOCKS)
    network, graph = make_case("stacked").network, graph_of("stacked")
    total = sum(p.numel() for p in network.parameters())
    first = found.blocks[0]
    own = sum(p.numel() for p in network.layers[0].parameters())
    assert (first.layers, first.techniques, first.reason) == (2, ("block_drop",), "")
    assert first.weight_share == pytest.approx(own / total)
    macs = sum(graph.layer(name).macs for name in graph.blocks[0].layers)
    known = sum(row.macs_share or 0 for row in found.modules)
    assert known == pytest.approx(1) and 0.1 < first.macs_share < 0.3
    assert first.macs_share == pytest.approx(macs / graph.macs, rel=0.05)
    assert found.blocks[2].techniques == () and "excludes it" in found.blocks[2].reason
    nothing = inspected({"precision": TECHNIQUES["precision"]}).blocks
    assert {row.reason for row in nothing} == {"no technique of the search space takes blocks out"}


def test_the_table_of_blocks_is_printed() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    for part in inspection_parts(inspected()):
        console.print(part)
    lines = console.export_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "can do without" in line)
    rows = [line.split() for line in lines[start:] if line.startswith("layers.")]
    assert [row[0] for row in rows] == list(BLOCKS)
    assert all(row[1] == "2" and row[-1] == "block_drop" for row in rows)
