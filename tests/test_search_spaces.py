from __future__ import annotations

import pytest
from networks import graph_of

from autocompress.config import load_search_space, shipped
from autocompress.device import load_profile
from autocompress.search.space import build_space, unused_values

NAMES = sorted(path.stem for path in shipped("search_spaces").glob("*.yaml"))


def built(name: str, network: str, device: str):
    space = load_search_space(name)
    return space, build_space(graph_of(network), space, load_profile(device))


def test_the_named_spaces_are_shipped():
    assert {"cnn", "transformer", "quantize_only", "prune_only", "size_first"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_called_by_its_name_and_says_what_it_is_for(name):
    text = (shipped("search_spaces") / f"{name}.yaml").read_text()
    assert load_search_space(name).name == name
    assert text.startswith("# ")


@pytest.mark.parametrize("device", ["cpu", "cpu_openvino"])
@pytest.mark.parametrize("network", ["depthwise", "flatten", "attention"])
@pytest.mark.parametrize("name", NAMES)
def test_shipped_spaces_leave_a_choice_for_small_networks(name, network, device):
    space, found = built(name, network, device)
    offered = {d.technique for p in found.parameters for d in p.decisions}
    assert found.size > 1 and offered <= set(space.techniques)


@pytest.mark.parametrize("device", ["cpu", "cpu_openvino"])
def test_a_transformer_is_offered_heads_neurons_int8_and_groups(device):
    space, found = built("transformer", "attention", device)
    by_name = {p.name: p for p in found.parameters}
    heads = [g for g in graph_of("attention").groups if g.heads]
    assert heads and all(f"{g.name}|prune" in by_name for g in heads)
    assert "up|prune" in by_name
    kinds = {
        (d.weight_bits, d.activation_bits, d.activation_range, d.granularity)
        for d in by_name["up|quantize"].decisions
    }
    assert kinds == {
        (8, 8, "dynamic", "channel"), (8, 8, "static", "channel"), (4, 32, "static", "group"),
    }  # fmt: skip
    unused = unused_values(space, found, load_profile(device))
    assert not [text for text in unused if text.startswith("precision")]


def test_no_two_files_offer_the_same():
    contents = [load_search_space(name).techniques for name in NAMES]
    assert all(one not in contents[:i] for i, one in enumerate(contents))


@pytest.mark.parametrize(
    ("name", "techniques"),
    [
        ("prune_only", {"filter_prune"}),
        ("quantize_only", {"precision"}),
        ("size_first", {"filter_prune", "entropy_grid", "codebook", "precision"}),
    ],
)
def test_files_hold_the_techniques_that_they_are_named_for(name, techniques):
    assert set(load_search_space(name).techniques) == techniques
