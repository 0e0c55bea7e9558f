from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autocompress.config import SearchSpace
from autocompress.device import load_profile
from autocompress.errors import ConfigError
from autocompress.graph import trace
from autocompress.plan import Step
from autocompress.search.space import build_space, unused_values
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.precision import Precision
from autocompress.techniques.technique import Stage

PRUNE = {"filter_prune": {"pruning_ratio": [0.25, 0.5, 0.75]}}
INT8 = {"precision": {"weight_bits": [8], "activation_bits": [8]}}
FIXED_INT8 = {"precision": {"weight_bits": 8, "activation_bits": 8}}
FLOAT = {"precision": {"weight_bits": 32, "activation_bits": 32}}
STOCK = {"stock_quantizer": {"mode": ["static"]}}
W8 = Precision(weight_bits=8, activation_bits=8)


def chain() -> nn.Module:
    """Three convolutions of 32, 16 and 8 filters, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def graph():
    return trace(chain(), (torch.randn(2, 3, 8, 8),))


def space_of(graph, techniques, **keys):
    space = SearchSpace(version=1, name="mine", techniques=techniques, **keys)
    return build_space(graph, space, load_profile("cpu"))


def refusal(graph, techniques, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        space_of(graph, techniques, **keys)
    return str(caught.value)


def names(space):
    return [p.name for p in space.parameters]


@given(data=st.data())
def test_every_plan_has_the_fixed_steps_and_no_choice_about_them(graph, data):
    fix = {"0": {"filter_prune": {"pruning_ratio": 0.5}}, "8": FIXED_INT8}
    space = space_of(graph, {**PRUNE, **INT8}, fix=fix)
    assert names(space) == ["2|prune", "0|quantize", "2|quantize", "4|quantize"]
    indices = {p.name: data.draw(st.integers(0, p.highest)) for p in space.parameters}
    steps = set(space.plan(indices).steps)
    fixed = {Step("0", FilterPrune(pruning_ratio=0.5)), Step("8", W8)}
    assert fixed <= steps
    assert len(steps - fixed) == sum(map(bool, indices.values()))


def test_a_pattern_fixes_all_that_it_matches(graph):
    space = space_of(graph, PRUNE, fix={"[024]": FIXED_INT8})
    assert space.plan({}).of("precision") == {"0": W8, "2": W8, "4": W8}
    assert space.size == 4 * 2


def test_what_is_fixed_to_nothing_is_left_as_it_is(graph):
    space = space_of(graph, INT8, fix={"0": FLOAT})
    assert space.plan({}).steps == space.fixed == ()
    assert names(space) == ["2|quantize", "4|quantize", "8|quantize"]


@pytest.mark.parametrize(
    ("fix", "words"),
    [
        ({"9": FIXED_INT8}, ("matches nothing", "given:   9", "0, 2, 4, 8")),
        ({"8": {"filter_prune": {"pruning_ratio": 0.5}}}, ("matches nothing", "0, 2, 4")),
        ({"0": {"magic": {"power": 1}}}, ("no such technique", "filter_prune")),
        ({"0": {"precision": {"weight_bits": 5, "activation_bits": 8}}}, ("fix of '0'", "8, 7, 4")),
        ({"0": {"precision": {"weight_bits": 8}}}, ("activation_bits", "32, 16, 8")),
        # The device has no 16-bit kernel, and eight channels leave nothing in steps of eight.
        ({"0": {"precision": {"weight_bits": 8, "activation_bits": 16}}}, ("does not suit",)),
        ({"4": {"filter_prune": {"pruning_ratio": 0.5}}}, ("does not suit", "it suits 0, 2")),
        ({"0": FIXED_INT8 | {"codebook": {"code_bits": 4}}}, ("Two decisions", "codebook")),
        ({"0": FIXED_INT8, "?": FLOAT}, ("Two decisions",)),
        ({"network": {"stock_quantizer": {"mode": "static"}}, "0": FIXED_INT8}, ("one of both",)),
    ],
)
def test_what_cannot_be_fixed_is_refused_with_what_is_allowed(graph, fix, words):
    text = refusal(graph, PRUNE, fix=fix)
    assert all(word in text for word in words), text


def test_a_target_cannot_be_fixed_and_excluded(graph):
    assert "excluded" in refusal(graph, PRUNE, fix={"0": FIXED_INT8}, exclude=["0"])
    spared = {"?": ["precision"]}
    assert "excluded" in refusal(graph, PRUNE, fix={"0": FIXED_INT8}, exclude_techniques=spared)


def test_quantizers_of_the_network_and_fixed_layers_do_not_undo_each_other(graph):
    single = space_of(graph, {**STOCK, **INT8}, fix={"0": FLOAT})
    assert "network|quantize" not in names(single)
    fix = {"network": {"stock_quantizer": {"mode": "static"}}}
    whole = space_of(graph, {**PRUNE, **INT8, "qat": {"epochs": [1]}}, fix=fix)
    assert names(whole) == ["0|prune", "2|prune"]
    assert [s.target for s in whole.plan({}).steps] == ["network"]


def test_a_space_without_any_choice_left_is_refused(graph):
    assert "nothing to choose" in refusal(graph, INT8, fix={"*": FIXED_INT8})


def test_single_techniques_are_excluded(graph):
    spared = {"0": ["precision"], "2": ["codebook", "filter_prune"]}
    techniques = {**PRUNE, **INT8, "codebook": {"code_bits": [4]}}
    space = space_of(graph, techniques, exclude_techniques=spared)
    offered = {p.name: {d.technique for d in p.decisions} for p in space.parameters}
    assert "2|prune" not in offered
    assert offered["0|prune"] == {"filter_prune"}
    assert offered["0|quantize"] == {"codebook"}
    assert offered["2|quantize"] == {"precision"}
    assert offered["4|quantize"] == {"precision", "codebook"}


def test_sparing_an_unknown_technique_is_refused(graph):
    assert "low_rank" in refusal(graph, INT8, exclude_techniques={"0": ["lowrank"]})


def test_tied_targets_take_the_same_decision_at_every_stage(graph):
    space = space_of(graph, {**PRUNE, **INT8}, tie=[["0", "2"]])
    assert names(space) == ["0|prune", "0|quantize", "4|quantize", "8|quantize"]
    assert space.parameters[0].targets == ("0", "2")
    plan = space.plan({"0|prune": 1, "0|quantize": 1})
    assert plan.of("precision") == {"0": W8, "2": W8}
    assert len(plan.of("filter_prune")) == 2
    assert len(set(plan.of("filter_prune").values())) == 1
    by_target = space.by_target()
    assert by_target[Stage.PRUNE, "2"] is by_target[Stage.PRUNE, "0"]
    assert by_target[Stage.QUANTIZE, "8"].targets == ("8",)


def test_tied_targets_are_offered_what_all_of_them_take(graph):
    alone = space_of(graph, PRUNE)
    ratios = {p.target: [d.pruning_ratio for d in p.decisions] for p in alone.parameters}
    assert ratios["0"] == [0.25, 0.5, 0.75] and len(ratios["2"]) == 1
    tied = space_of(graph, PRUNE, tie=[["*"]])
    assert [p.targets for p in tied.parameters] == [("0", "2")]
    # 16 channels come to 8 at each of the ratios that take any; 32 tell them apart.
    shared = [d.pruning_ratio for d in tied.parameters[0].decisions]
    assert ratios["2"][0] in shared and set(shared) <= set(ratios["0"]) and len(shared) > 1
    assert tied.size == len(shared) + 1


def test_a_technique_that_one_tied_target_is_spared_is_offered_to_none(graph):
    techniques = {**INT8, "codebook": {"code_bits": [4]}}
    spared = {"2": ["codebook"]}
    space = space_of(graph, techniques, tie=[["0", "2"]], exclude_techniques=spared)
    assert space.parameters[0].decisions == (W8,)


def test_targets_without_a_choice_or_fixed_have_no_part_in_a_tie(graph):
    space = space_of(graph, {**PRUNE, **INT8}, tie=[["*"]], fix={"8": FIXED_INT8})
    assert [p.targets for p in space.parameters] == [("0", "2"), ("0", "2", "4")]


@pytest.mark.parametrize(
    ("tie", "words"),
    [
        ([["0", "9*"]], ("matches nothing", "9*", "0, 2, 4")),
        ([["0", "2"], ["?"]], ("two ties", "0, 2")),
    ],
)
def test_bad_ties_are_refused(graph, tie, words):
    text = refusal(graph, {**PRUNE, **INT8}, tie=tie)
    assert all(word in text for word in words), text


def test_ties_without_a_common_decision_are_refused(graph):
    spared = {"0": ["precision"], "2": ["codebook"]}
    techniques = {**INT8, "codebook": {"code_bits": [4]}}
    text = refusal(graph, techniques, tie=[["0", "2"]], exclude_techniques=spared)
    assert "in common" in text and "0, 2 at stage quantize" in text


def test_the_steps_of_a_space_are_those_that_its_plans_have(graph):
    fix = {"8": FIXED_INT8}
    space = space_of(graph, {**PRUNE, **INT8}, tie=[["0", "2"]], fix=fix)
    every = {
        step
        for p in space.parameters
        for index in range(p.highest + 1)
        for step in space.plan({p.name: index}).steps
    }
    assert set(space.steps()) == every


def test_several_grids_of_a_technique_are_joined(graph):
    grids = [
        {"weight_bits": [8], "activation_bits": [8], "activation_range": ["dynamic", "static"]},
        {"weight_bits": [8, 4], "activation_bits": [32, 8], "granularity": ["channel"]},
    ]
    file = SearchSpace(version=1, name="mine", techniques={"precision": grids})
    space = build_space(graph, file, load_profile("cpu"))
    kinds = [
        (d.weight_bits, d.activation_bits, d.activation_range)
        for d in space.parameters[0].decisions
    ]
    assert kinds == [
        (8, 32, "static"), (8, 8, "dynamic"), (8, 8, "static"),
        (4, 32, "static"), (4, 8, "static"),
    ]  # fmt: skip
    assert unused_values(file, space, load_profile("cpu")) == []


def test_a_tie_has_the_levels_of_the_target_that_tells_the_most_apart():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ).eval()  # fmt: skip
    graph = trace(network, (torch.randn(2, 3, 8, 8),))
    # Sixteen channels come to eight by all three, 64 to 32, 24 and 16.
    ratios = {"filter_prune": {"pruning_ratio": [0.5, 0.625, 0.7]}}
    (parameter,) = space_of(graph, ratios, tie=[["0", "2"]]).parameters
    assert parameter.targets == ("0", "2")
    assert [d.pruning_ratio for d in parameter.decisions] == [0.5, 0.625, 0.7]
