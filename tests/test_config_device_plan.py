from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_workload import QUICK_PROFILE

from autocompress.config import find_named, load_experiment, load_search_space, parse_duration
from autocompress.device import (
    DeviceProfile,
    load_profile,
    local_facts,
    make_fingerprint,
    usable_cores,
)
from autocompress.device.facts import differences
from autocompress.errors import ConfigError, DeviceError, PlanError
from autocompress.files import write_whole
from autocompress.plan import Plan, Step
from autocompress.techniques import read_plan
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1.5m", 90),
        ("2h", 7200),
        ("1m5", 65),
    ],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0s", "10x", "m", "5m1h"])
def test_other_durations_are_refused_with_examples(text):
    with pytest.raises(ConfigError, match=r"10m|longer"):
        parse_duration(text)


def test_shipped_files_resolve_by_short_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_profile("cpu").name == "cpu"
    assert load_search_space("cnn").techniques


def test_a_path_is_looked_up_beside_the_experiment_first(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "x.yaml").write_text("a: 1")
    monkeypatch.chdir(here)
    assert find_named("x.yaml", "hw_profiles", there / "experiment.yaml") == there / "x.yaml"
    assert find_named("x.yaml", "hw_profiles") == here / "x.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nname: [", ("not valid YAML",)),
        ("- a\n- b", ("mapping",)),
        ("version: 2\nname: x\nworkload: a.py:f\ndevice: cpu\nsearch_space: cnn", ("version",)),
        ("version: 1\nname: x\nworkload: a.py\ndevice: cpu\nsearch_space: cnn", ("workload",)),
        ("version: 1\nname: x", ("workload", "device", "search_space")),
        (
            "version: 1\nname: x\nworkload: a.py:f\ndevice: cpu\nsearch_space: cnn\n"
            "search: {trails: 5}",
            ("search.trails", "unknown key"),
        ),
        (
            "version: 1\nname: x\nworkload: a.py:f\ndevice: cpu\nsearch_space: cnn\n"
            "objectives: [metric, metric]",
            ("objectives", "once"),
        ),
    ],
)
def test_malformed_experiments_are_refused(tmp_path, text, words):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert all(word in str(caught.value) for word in words), caught.value


def fingerprint(profile):
    return make_fingerprint(profile, local_facts(profile))


def profile_of(tmp_path: Path, **changes):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(QUICK_PROFILE | changes))
    return load_profile(str(path))


def test_cores_that_the_machine_lacks_are_refused(tmp_path):
    profile = profile_of(tmp_path, cores=[4096])
    with pytest.raises(DeviceError, match="4096"):
        profile.pinned_cores(usable_cores())


def test_more_threads_than_cores_are_refused(tmp_path):
    with pytest.raises(DeviceError, match="5000 threads"):
        profile_of(tmp_path, threads=5000).pinned_cores(usable_cores())


def test_auto_takes_the_last_cores(tmp_path):
    assert profile_of(tmp_path).pinned_cores(usable_cores()) == (max(os.sched_getaffinity(0)),)


def test_a_fingerprint_changes_with_what_changes_the_figures(tmp_path):
    base = fingerprint(profile_of(tmp_path))
    assert fingerprint(profile_of(tmp_path)).id == base.id
    assert fingerprint(profile_of(tmp_path, batch_size=2)).id != base.id
    other = fingerprint(profile_of(tmp_path, batch_size=2))
    assert differences(base, other) == ("batch_size: 1, 2",)
    assert base.runtime("onnxruntime").version


def test_runtimes_of_one_device_may_be_compared_and_have_ids_of_their_own(tmp_path):
    one = fingerprint(profile_of(tmp_path))
    levels = [{"name": "onnxruntime"}, {"name": "onnxruntime", "graph_optimization": "basic"}]
    two = fingerprint(profile_of(tmp_path, runtimes=levels))
    assert one.id == two.id and differences(one, two) == ()
    names = [runtime.name for runtime in two.runtimes]
    assert names == ["onnxruntime", "onnxruntime-basic"]
    assert len({two.runtime_id(name) for name in names}) == 2
    assert two.runtime_id("onnxruntime") == one.runtime_id("onnxruntime")


def test_runtimes_that_are_called_alike_are_refused(tmp_path):
    alike = [{"name": "onnxruntime"}, {"name": "onnxruntime"}]
    with pytest.raises(DeviceError, match="label"):
        profile_of(tmp_path, runtimes=alike)
    labelled = [{"name": "onnxruntime"}, {"name": "onnxruntime", "label": "again"}]
    profile = profile_of(tmp_path, runtimes=labelled)
    assert profile.runtime_names == ("onnxruntime", "again")
    with pytest.raises(DeviceError, match="onnxruntime, again"):
        profile.runtime("openvino-f32")


def test_profiles_survive_json(tmp_path):
    profile = profile_of(tmp_path)
    assert DeviceProfile.model_validate_json(profile.model_dump_json()) == profile


STEPS = st.lists(
    st.tuples(
        st.sampled_from("abcde"),
        st.one_of(
            st.builds(FilterPrune, pruning_ratio=st.floats(0, 0.99)),
            st.builds(LowRank, rank_ratio=st.floats(0.01, 1)),
            st.builds(Precision, weight_bits=st.just(8), activation_bits=st.just(8)),
        ),
    ),
    unique_by=lambda pair: (pair[0], pair[1].technique),
    max_size=6,
)


@given(pairs=STEPS, chance=st.randoms())
def test_plans_round_trip_and_their_hash_ignores_the_order(pairs, chance):
    plan = Plan(tuple(Step(target, decision) for target, decision in pairs))
    shuffled = list(plan.steps)
    chance.shuffle(shuffled)
    assert Plan(tuple(shuffled)) == plan
    again = read_plan(plan.to_rows())
    assert again == plan
    assert again.hash == plan.hash


@given(pairs=STEPS.filter(bool))
def test_plans_that_differ_have_different_hashes(pairs):
    plan = Plan(tuple(Step(target, decision) for target, decision in pairs))
    assert Plan(plan.steps[1:]).hash != plan.hash


def test_a_plans_hash_is_the_same_on_every_machine():
    plan = Plan((Step("conv1", FilterPrune(pruning_ratio=0.5)),))
    assert plan.hash == "8db40993f013"


def test_a_plan_that_decides_one_thing_twice_is_refused():
    step = Step("a", FilterPrune(pruning_ratio=0.5))
    with pytest.raises(PlanError, match="twice"):
        Plan((step, Step("a", FilterPrune(pruning_ratio=0.25))))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"target": "a", "technique": "magic"}, ("magic", "filter_prune")),
        ({"technique": "low_rank", "rank_ratio": 0.5}, ("target",)),
        ({"target": "a", "technique": "filter_prune", "pruning_ratio": 1.0}, ("< 1",)),
        ({"target": "a", "technique": "low_rank", "rank_ratio": 0}, ("> 0", "<= 1")),
    ],
)
def test_rows_that_are_no_plan_are_refused(row, words):
    with pytest.raises(PlanError) as caught:
        read_plan([row])
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file"
    write_whole(target, b"old")
    with pytest.raises(TypeError):
        write_whole(target, "not bytes")  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_importing_the_package_and_the_measuring_side_loads_no_pytorch():
    code = (
        "import sys, autocompress, autocompress.measure.client, autocompress.report.columns\n"
        "sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
