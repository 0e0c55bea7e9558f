from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.config import SearchSpace, load_search_space
from autocompress.device import load_profile
from autocompress.errors import ConfigError
from autocompress.graph import trace
from autocompress.search.seeds import uniform_seeds
from autocompress.search.space import build_space, unused_values


@pytest.fixture(scope="module")
def graph():
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()  # fmt: skip
    return trace(network, (torch.randn(2, 3, 8, 8),))


def space_of(graph, techniques, exclude=()):
    space = SearchSpace(version=1, name="mine", techniques=techniques, exclude=exclude)
    return build_space(graph, space, load_profile("cpu"))


def test_shipped_spaces_all_build(graph):
    for name in ("cnn", "cnn_trained", "download", "low_bits", "prune_only", "quantize_only"):
        assert build_space(graph, load_search_space(name), load_profile("cpu")).parameters


def test_parameters_are_ordered_from_nothing_to_strongest(graph):
    space = space_of(graph, {"filter_prune": {"pruning_ratio": [0.25, 0.5, 0.75]}})
    assert [p.target for p in space.parameters] == ["0", "3"]
    assert space.size == 16
    assert space.plan({}).steps == ()
    plan = space.plan({"0|prune": 1, "3|prune": 3})
    assert [(s.target, s.decision.pruning_ratio) for s in plan.steps] == [("0", 0.25), ("3", 0.75)]


def test_ratios_that_give_the_same_channel_count_are_offered_once(graph):
    space = space_of(graph, {"filter_prune": {"pruning_ratio": [0.01, 0.24, 0.25, 0.26, 0.5]}})
    ratios = [d.pruning_ratio for d in space.parameters[0].decisions]
    assert ratios == [0.24, 0.5]


def test_values_that_nothing_takes_are_named(graph):
    techniques = {
        "precision": {"weight_bits": [8], "activation_bits": [16, 8]},
        "filter_prune": {"pruning_ratio": [0.5]},
    }
    file = SearchSpace(version=1, name="mine", techniques=techniques)
    built = build_space(graph, file, load_profile("cpu"))
    assert unused_values(file, built, load_profile("cpu")) == ["precision activation_bits 16"]


def test_combinations_that_are_refused_are_left_out_if_their_values_are_in_others(graph):
    mixed = {"weight_bits": [8, 4], "activation_bits": [8, 32], "granularity": ["channel", "group"]}
    decisions = {d for p in space_of(graph, {"precision": mixed}).parameters for d in p.decisions}
    kinds = {(d.weight_bits, d.activation_bits, d.granularity) for d in decisions}
    assert (8, 8, "channel") in kinds and (4, 32, "group") in kinds
    assert (8, 8, "group") not in kinds


def test_excluded_targets_are_left_out(graph):
    space = space_of(graph, {"precision": {"weight_bits": [8], "activation_bits": [8]}}, ["0", "7"])
    assert [p.target for p in space.parameters] == ["3"]


@pytest.mark.parametrize(
    ("techniques", "words"),
    [
        ({"magic": {"power": [1]}}, ("no such technique", "magic", "filter_prune")),
        ({"filter_prune": {"pruning_ratio": [1.5]}}, ("pruning_ratio", "< 1")),
        ({"filter_prune": {"ratio": [0.5]}}, ("ratio", "pruning_ratio")),
        ({"precision": {"weight_bits": [5], "activation_bits": [8]}}, ("weight_bits", "8")),
        ({"filter_prune": {"pruning_ratio": [0.0]}}, ("nothing to choose",)),
    ],
)
def test_bad_spaces_are_refused_with_what_is_allowed(graph, techniques, words):
    with pytest.raises(ConfigError) as caught:
        space_of(graph, techniques)
    assert all(word in str(caught.value) for word in words)


def test_seeds_are_distinct_plans_that_change_something(graph):
    space = build_space(graph, load_search_space("cnn"), load_profile("cpu"))
    seeds = uniform_seeds(space)
    hashes = [space.plan(seed).hash for seed in seeds]
    assert len(set(hashes)) == len(hashes)
    assert all(space.plan(seed).steps for seed in seeds)


def test_seeds_reach_every_level_of_every_parameter(graph):
    space = build_space(graph, load_search_space("cnn"), load_profile("cpu"))
    seeds = uniform_seeds(space)
    for parameter in space.parameters:
        levels = {seed.get(parameter.name, 0) for seed in seeds}
        assert levels == set(range(parameter.highest + 1)), parameter.name


def test_the_first_seed_is_everything_in_int8(graph):
    space = build_space(graph, load_search_space("cnn"), load_profile("cpu"))
    plan = space.plan(uniform_seeds(space)[0])
    assert {s.decision.technique for s in plan.steps} == {"precision"}
    assert {s.target for s in plan.steps} == {"0", "3", "7"}
