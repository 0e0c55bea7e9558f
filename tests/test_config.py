from __future__ import annotations

import pytest

from autocompress.config import Experiment, SearchSettings, SearchSpace, validate
from autocompress.errors import ConfigError

BASE = {"version": 1, "name": "x", "workload": "a.py:f", "device": "cpu", "search_space": "cnn"}


def space(**keys):
    content = {"version": 1, "name": "mine", "techniques": {}} | keys
    return validate(SearchSpace, content, "mine.yaml", ConfigError)


def test_one_mapping_of_fields_stands_for_a_list_of_one():
    grid = {"weight_bits": [8], "activation_bits": [8, 32]}
    one, several = space(techniques={"precision": grid}), space(techniques={"precision": [grid]})
    assert one == several
    assert one.techniques["precision"] == ({"weight_bits": (8,), "activation_bits": (8, 32)},)


def test_a_search_space_survives_json():
    written = space(
        techniques={"filter_prune": {"pruning_ratio": [0.5]}},
        exclude=["stem"],
        exclude_techniques={"head*": ["low_rank"]},
        fix={"head": {"precision": {"weight_bits": 8, "activation_bits": 32}}},
        tie=[["a.*", "b.*"]],
    )
    assert SearchSpace.model_validate_json(written.model_dump_json()) == written


@pytest.mark.parametrize(
    "keys",
    [
        {"techniques": {"precision": []}},
        {"techniques": {"precision": [[8]]}},
        {"tie": [[]]},
        {"tie": ["a"]},
        {"fix": {"a": {"precision": 8}}},
        {"exclude_techniques": {"a": "low_rank"}},
        {"freeze": ["a"]},
    ],
)
def test_malformed_spaces_are_refused_and_the_key_named(keys):
    with pytest.raises(ConfigError) as caught:
        space(**keys)
    assert next(iter(keys)) in caught.value.what


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_to_four_objectives_are_taken(count):
    names = ["metric", "latency", "energy", "download_bytes", "file_bytes"]
    assert len(Experiment(**BASE, objectives=names[:count]).objectives) == count


@pytest.mark.parametrize("count", [0, 5])
def test_other_counts_of_objectives_are_refused(count):
    names = ["metric", "latency", "energy", "download_bytes", "file_bytes"]
    with pytest.raises(ConfigError, match="objectives"):
        validate(Experiment, BASE | {"objectives": names[:count]}, "x", ConfigError)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "gp", "random", "mutation"])
def test_every_sampler_may_be_named(sampler):
    assert SearchSettings(sampler=sampler).sampler == sampler


def test_other_samplers_are_refused_with_the_names_of_all():
    with pytest.raises(ConfigError, match="mutation"):
        validate(SearchSettings, {"sampler": "grid"}, "x", ConfigError)


def test_by_default_there_are_seeds_and_survivors_and_no_limits():
    settings = SearchSettings()
    assert settings.seeds and settings.survivors and settings.limits == ()
    assert SearchSettings(limits=["drop <= 1"]).limits == ("drop <= 1",)
