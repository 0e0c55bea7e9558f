from __future__ import annotations

import json
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.device import load_profile
from autocompress.errors import RunFolderError
from autocompress.search.front import front_mask
from autocompress.search.space import Parameter, Space
from autocompress.search.study import Sampling, Study
from autocompress.techniques import Stage
from autocompress.techniques.filter_prune import FilterPrune

OBJECTIVES = ("metric", "latency")


def space_of(targets: int, levels: int) -> Space:
    decisions = tuple(FilterPrune(pruning_ratio=(i + 1) / (levels + 2)) for i in range(levels))
    return Space(tuple(Parameter(Stage.PRUNE, f"layer{t}", decisions) for t in range(targets)))


SPACE = space_of(4, 3)
CPU = load_profile("cpu")
BOTH = load_profile("cpu_openvino")


def open_study(path, space=SPACE, seed=0, sampler="tpe", device=CPU):
    return Study(path, space, device, OBJECTIVES, Sampling(sampler, seed))


def figures(plan, make_evaluation):
    """A deterministic stand-in for measuring: less metric and more speed with every ratio."""
    total = sum(step.decision.pruning_ratio for step in plan.steps)
    return make_evaluation(plan.hash, 1 - total**2 / 20, 1 + total, plan=plan)


def run(study, count, make_evaluation):
    hashes = []
    while len(hashes) < count:
        proposal = study.propose()
        if proposal is None:
            break
        hashes.append(proposal.plan.hash)
        study.succeed(proposal, figures(proposal.plan, make_evaluation))
    return hashes


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "mutation"])
def test_the_same_seed_proposes_the_same_plans(tmp_path, make_evaluation, sampler):
    lists = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        study = open_study(tmp_path / name, seed=seed, sampler=sampler)
        lists.append(run(study, 14, make_evaluation))
    assert lists[0] == lists[1]
    assert lists[0] != lists[2]
    assert len(set(lists[0])) == 14


@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True))
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(
    tmp_path_factory, make_evaluation, cuts
):
    whole = run(open_study(tmp_path_factory.mktemp("whole")), 12, make_evaluation)
    folder = tmp_path_factory.mktemp("cut")
    study = open_study(folder)
    for index in range(12):
        if index in cuts:
            # Killed in the middle of a trial: proposed, never told.
            study.propose()
            study = open_study(folder)
        run(study, 1, make_evaluation)
    found = [e.candidate for e in open_study(folder).evaluations]
    assert found == whole


def test_figures_that_were_kept_before_the_kill_are_not_lost(tmp_path, make_evaluation):
    study = open_study(tmp_path)
    proposal = study.propose()
    evaluation = figures(proposal.plan, make_evaluation)
    study.start(proposal)
    storage, trial = study._record._storage, study._ids[proposal.candidate]
    # What `succeed` writes first; the kill comes before the rest.
    storage.set_trial_user_attr(trial, "evaluation", json.dumps(evaluation.to_dict()))
    again = open_study(tmp_path)
    assert [e.candidate for e in again.evaluations] == [proposal.plan.hash]
    assert again.evaluations[0] == evaluation
    assert again.propose().plan.hash != proposal.plan.hash


def begin_to_measure(study):
    proposal = study.propose()
    study.start(proposal)
    return proposal.plan.hash


def begin_to_judge(study):
    proposal = study.propose()
    study.begin_judging(proposal)
    return proposal.plan.hash


@pytest.mark.parametrize("begin", [begin_to_measure, begin_to_judge])
def test_a_plan_that_ends_the_process_each_time_is_given_up(tmp_path, begin):
    first = begin(open_study(tmp_path))
    for _ in range(5):
        assert begin(open_study(tmp_path)) == first
    study = open_study(tmp_path)
    assert "interrupted" in study.failures[first]
    assert first in open_study(tmp_path).failures
    assert study.finished == 1
    assert study.propose().plan.hash != first


def test_judged_plans_are_known_after_a_kill_and_not_proposed_again(tmp_path, make_evaluation):
    study = open_study(tmp_path)
    judged = []
    for _ in range(3):
        proposal = study.propose()
        study.begin_judging(proposal)
        study.keep_judgement(proposal, {"loss": 0.5}, 1.0)
        study.set_aside(proposal)
        judged.append(proposal.candidate)
    # The kill cuts the last line off.
    with (tmp_path / "judged.jsonl").open("ab") as file:
        file.write(b'{"candidate": "abc", "sta')
    again = open_study(tmp_path)
    assert list(again.judged) == judged
    assert again.finished == 0
    assert not set(run(again, 10, make_evaluation)) & set(judged)


def test_trained_candidates_are_kept_and_teach_no_sampler(tmp_path, make_evaluation):
    study = open_study(tmp_path)
    run(study, 2, make_evaluation)
    trained = make_evaluation("trained00000", 0.99, 5.0)
    study.keep_trained(trained, 12.0)
    again = open_study(tmp_path)
    assert list(again.trained) == ["trained00000"]
    assert again.evaluations[-1] == trained
    assert len(again._study.trials) == 2


def test_the_front_is_kept_as_points_come_in(tmp_path, make_evaluation):
    study = open_study(tmp_path)
    run(study, 12, make_evaluation)
    mask = front_mask(study.evaluations, OBJECTIVES)
    expected = {e.candidate for e, on in zip(study.evaluations, mask, strict=True) if on}
    assert {e.candidate for e in study.evaluations_on_front} == expected


def test_failures_count_and_are_not_tried_again(tmp_path, make_evaluation):
    study = open_study(tmp_path)
    proposal = study.propose()
    study.fail(proposal, "it does not export")
    again = open_study(tmp_path)
    assert again.failures == {proposal.plan.hash: "it does not export"}
    assert again.finished == 1
    assert proposal.plan.hash not in run(again, 10, make_evaluation)


def test_seeds_come_first_and_once(tmp_path, make_evaluation):
    seeds = [{"layer0|prune": 1}, {"layer1|prune": 2}]
    study = open_study(tmp_path)
    study.enqueue(seeds)
    study.enqueue(seeds)
    expected = [SPACE.plan(seed).hash for seed in seeds]
    assert run(study, 4, make_evaluation)[:2] == expected


def test_with_two_runtimes_a_seed_is_tried_in_each(tmp_path, make_evaluation):
    study = open_study(tmp_path, device=BOTH)
    study.enqueue([{"layer0|prune": 1}])
    names = []
    for runtime in BOTH.runtime_names:
        proposal = study.propose()
        assert proposal.runtime == runtime
        names.append(proposal.candidate)
        study.succeed(proposal, make_evaluation(proposal.candidate, 0.9, 2.0, plan=proposal.plan))
    plan = SPACE.plan({"layer0|prune": 1}).hash
    assert names == [plan, *(f"{plan}@{r}" for r in BOTH.runtime_names[1:])]
    again = open_study(tmp_path, device=BOTH)
    assert [e.candidate for e in again.evaluations] == names


def test_a_small_space_is_tried_out_and_then_ends(tmp_path, make_evaluation):
    study = open_study(tmp_path, space_of(2, 1))
    hashes = run(study, 100, make_evaluation)
    assert len(hashes) == 3  # the untouched network is no candidate
    assert study.propose() is None


def test_a_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "study.sqlite3").write_bytes(b"not a database at all" * 100)
    with pytest.raises(RunFolderError, match="cannot be opened"):
        open_study(tmp_path)


def test_every_finished_trial_is_in_the_database_once(tmp_path, make_evaluation):
    run(open_study(tmp_path), 6, make_evaluation)
    with sqlite3.connect(tmp_path / "study.sqlite3") as database:
        rows = database.execute(
            "select value_json from trial_user_attributes where key = 'candidate'"
        ).fetchall()
    assert len(rows) == len(set(rows)) == 6
