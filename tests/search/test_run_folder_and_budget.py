from __future__ import annotations

import json

import pytest

from autocompress.config import Experiment, load_search_space
from autocompress.device import load_profile, local_facts, make_fingerprint
from autocompress.errors import RunFolderError
from autocompress.search.budget import Budget
from autocompress.search.run_folder import Identity, RunFolder


def fingerprint(profile):
    return make_fingerprint(profile, local_facts(profile))


def identity(**changes):
    profile = load_profile("cpu")
    search = {"trials": 5, "seed": changes.pop("seed", 0)} | changes.pop("limits", {})
    experiment = Experiment(
        version=1, name="tiny", workload="tiny.py:workload", device="cpu", search_space="cnn",
        search=search,
    )  # fmt: skip
    fields = {
        "experiment": experiment,
        "space": load_search_space("cnn"),
        "profile": profile,
        "device": fingerprint(profile),
        "network": "abc",
        "data": "def",
    }
    return Identity(**(fields | changes))


def test_the_same_search_may_go_on_with_other_limits(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.claim(identity()):
        folder.save_seconds_spent(12.5)
    with folder.claim(identity(limits={"trials": 99, "time_s": 60.0, "finalists": 3})):
        assert folder.seconds_spent() == 12.5
    assert json.loads((folder.path / "device.json").read_text())["profile"] == "cpu"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seed": 1}, "seed"),
        ({"network": "xyz"}, "network"),
        ({"data": "xyz"}, "data"),
        ({"space": load_search_space("prune_only")}, "search_space"),
        ({"device": fingerprint(load_profile("cpu")).model_copy(update={"threads": 7})}, "threads"),
    ],
)
def test_another_search_is_refused_with_the_difference(tmp_path, changes, word):
    folder = RunFolder(tmp_path / "run")
    with folder.claim(identity()):
        pass
    before = (folder.path / "experiment.yaml").read_bytes()
    with pytest.raises(RunFolderError, match=word), folder.claim(identity(**changes)):
        pass
    assert (folder.path / "experiment.yaml").read_bytes() == before


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match="something else"), folder.claim(identity()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_whose_first_call_was_killed_early_can_be_used(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "artifacts").mkdir()
    (tmp_path / ".device.json.123.part").touch()
    with RunFolder(tmp_path).claim(identity()):
        assert not (tmp_path / ".device.json.123.part").exists()


def test_somebody_elses_experiment_file_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "experiment.yaml").write_text("version: 1")
    with pytest.raises(RunFolderError, match="not those of a search"):
        RunFolder(tmp_path).claim(identity()).__enter__()


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match="cannot be used"):
        RunFolder(tmp_path / "run").claim(identity()).__enter__()


def test_two_searches_cannot_share_a_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.claim(identity()):
        other = RunFolder(tmp_path / "run")
        with pytest.raises(RunFolderError, match="Another search"), other.claim(identity()):
            pass
    with folder.claim(identity()):
        pass


def test_a_budget_counts_what_earlier_calls_spent():
    now = [100.0]
    budget = Budget(None, 60.0, 20.0, clock=lambda: now[0])
    assert budget.remaining_s == 40.0
    assert budget.allows_trial(10**6, 39.0)
    assert not budget.allows_trial(0, 41.0)
    now[0] += 15.0
    assert (budget.spent_s, budget.remaining_s) == (35.0, 25.0)


def test_trials_limit_a_budget_without_time():
    budget = Budget(3, None, 0.0)
    assert budget.remaining_s is None
    assert [budget.allows_trial(n, 1e9) for n in (0, 2, 3)] == [True, True, False]
