from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from autocompress.pareto import hypervolume, non_dominated
from autocompress.search.samplers import MutationSampler, SamplerContext, make_sampler
from autocompress.search.samplers.archive import Archive, Members
from autocompress.search.samplers.moves import (
    BUDGET_TOLERANCE,
    Budget,
    Ranges,
    change_few,
    cross,
    graded,
    repair,
    switch_levels,
    uniform,
)
from autocompress.search.samplers.offspring import Offspring
from autocompress.search.samplers.parents import Parents, crowding_distance

NAMES = [f"layer{i}|prune" for i in range(20)]
SPACE = {name: IntDistribution(0, 7) for name in NAMES}
MINIMISE = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@st.composite
def plans(draw):
    highest = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    levels = [draw(st.integers(0, h)) for h in highest]
    ordered = draw(st.lists(st.booleans(), min_size=len(highest), max_size=len(highest)))
    return np.array(levels), Ranges(np.array(highest), np.array(ordered))


def in_range(levels, ranges):
    return bool(((levels >= 0) & (levels <= ranges.highest)).all())


# --- moves ---


@given(plans(), seeds)
def test_a_small_change_changes_one_to_three_parameters(plan, seed):
    levels, ranges = plan
    before = levels.copy()
    changed = change_few(levels, ranges, np.random.default_rng(seed))
    assert 1 <= (changed != levels).sum() <= 3
    assert in_range(changed, ranges)
    assert (levels == before).all()


@given(plans(), seeds)
def test_graded_levels_lie_on_one_side_of_a_share(plan, seed):
    _, ranges = plan
    ranges = Ranges(ranges.highest, np.ones(len(ranges.highest), np.bool_))
    drawn = graded(ranges, np.random.default_rng(seed))
    assert in_range(drawn, ranges)
    rng = np.random.default_rng(seed)
    bound = np.rint(rng.random() * ranges.highest)
    assert (drawn >= bound).all() if rng.random() < 0.5 else (drawn <= bound).all()


def test_graded_levels_reach_both_ends_of_a_front():
    ranges = Ranges(np.full(40, 7), np.ones(40, np.bool_))
    rng = np.random.default_rng(0)
    means = np.array([graded(ranges, rng).mean() for _ in range(100)])
    assert means.min() < 0.7
    assert means.max() > 6.3


@given(plans(), seeds)
def test_a_switch_keeps_the_sum_and_leaves_unordered_parameters_alone(plan, seed):
    levels, ranges = plan
    changed = switch_levels(levels, ranges, np.random.default_rng(seed))
    assert changed.sum() == levels.sum()
    assert (changed != levels).sum() in (0, 2, 4, 6)
    assert (changed == levels)[~ranges.ordered].all()
    assert in_range(changed, ranges)


def test_a_switch_is_found_where_there_is_only_one():
    ranges = Ranges(np.array([1, 1, 1]), np.array([True, True, False]))
    changed = switch_levels(np.array([0, 1, 1]), ranges, np.random.default_rng(0))
    assert changed.tolist() == [1, 0, 1]


@given(plans(), seeds)
def test_a_cross_has_each_level_from_a_parent(plan, seed):
    levels, ranges = plan
    rng = np.random.default_rng(seed)
    other = uniform(ranges, rng)
    child = cross(levels, other, rng)
    assert ((child == levels) | (child == other)).all()


@given(plans(), seeds)
def test_a_repair_never_leads_away_and_keeps_what_is_not_free(plan, seed):
    levels, ranges = plan
    rng = np.random.default_rng(seed)
    weights = rng.random(len(levels)) + 0.1
    budget = Budget(lambda x: float(1 + weights @ x), 4.0, 5.0)
    free = rng.random(len(levels)) < 0.7
    repaired = repair(levels, free, budget, ranges, rng)
    assert budget.excess(repaired) <= budget.excess(levels)
    assert (repaired == levels)[~(free & ranges.ordered)].all()
    assert in_range(repaired, ranges)


def test_a_repair_meets_a_budget_that_can_be_met():
    ranges = Ranges(np.full(20, 7), np.ones(20, np.bool_))
    weights = np.linspace(0.5, 1.5, 20)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        budget = Budget(lambda x: float(200 - weights @ x), 130.0, 130.0)
        repaired = repair(uniform(ranges, rng), np.ones(20, np.bool_), budget, ranges, rng)
        assert budget.excess(repaired) <= BUDGET_TOLERANCE


# --- the archive ---


def finished(number, values, figures, state=TrialState.COMPLETE):
    trial = create_trial(
        params=dict(zip(NAMES, values, strict=False)),
        distributions={name: SPACE[name] for name in NAMES[: len(values)]},
        values=figures if state == TrialState.COMPLETE else None,
        state=state,
    )
    trial.number = number
    return trial


@st.composite
def histories(draw):
    """Trials with ties and repeated values, some failed or pruned."""
    states = [TrialState.COMPLETE] * 3 + [TrialState.FAIL, TrialState.PRUNED]
    small = st.tuples(st.integers(0, 3), st.integers(0, 3))
    rows = draw(st.lists(st.tuples(small, small, st.sampled_from(states)), max_size=25))
    return [finished(i, v, [float(f) for f in y], s) for i, (v, y, s) in enumerate(rows)]


def members(archive):
    front = archive.front
    return front.numbers.tolist(), front.levels.tolist(), front.costs.tolist()


@given(histories(), seeds)
@settings(max_examples=60)
def test_the_front_is_that_of_all_trials_whatever_the_order(trials, seed):
    space = {name: SPACE[name] for name in NAMES[:2]}
    directions = [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]
    at_once, step_by_step = (Archive(space, directions, None) for _ in range(2))
    at_once.take(trials, len(trials))
    # Trials end in another order than they began: the rest is still running.
    rng = np.random.default_rng(seed)
    running = set(rng.permutation(len(trials)).tolist())
    while running:
        running -= set(rng.choice(sorted(running), size=min(3, len(running))).tolist())
        shown = [
            finished(t.number, t.params.values(), None, TrialState.RUNNING)
            if t.number in running
            else t
            for t in trials
        ]
        step_by_step.take(shown, len(trials))
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    expected = []
    if complete:
        mask = non_dominated([t.values for t in complete], maximise=[False, True])
        expected = [t.number for t, on in zip(complete, mask, strict=True) if on]
    assert at_once.front.numbers.tolist() == expected
    assert members(step_by_step) == members(at_once)
    assert step_by_step.tried == at_once.tried == len({tuple(t.params.values()) for t in trials})


def test_known_are_failed_pruned_and_running_trials_but_not_the_current_one():
    space = {name: SPACE[name] for name in NAMES[:2]}
    archive = Archive(space, MINIMISE, None)
    ends = [TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING, TrialState.RUNNING]
    trials = [finished(i, (i, 0), None, state) for i, state in enumerate(ends)]
    archive.take([*trials, finished(4, (6,), None, TrialState.FAIL)], current=3)
    assert [archive.is_known(np.array([i, 0])) for i in range(5)] == [True] * 3 + [False] * 2
    assert archive.tried == 3
    assert not len(archive.front.numbers)


def test_beyond_a_limit_no_trial_drives_one_within_off_the_front():
    space = {NAMES[0]: SPACE[NAMES[0]]}
    archive = Archive(space, MINIMISE, lambda trial: (trial.params[NAMES[0]] - 3.0, -1.0))
    archive.take([finished(i, (i,), [9.0 - i, 9.0 - i]) for i in range(6)], 6)
    # Within, 3 is the best; 4 and 5 are better yet, and 2 and 1 too far.
    assert archive.front.numbers.tolist() == [3, 4, 5]
    assert archive.front.violations.tolist() == [0.0, 1.0, 2.0]


# --- parents ---


def front_of(costs, violations=None, levels=None):
    count = len(costs)
    return Members(
        np.arange(count),
        np.arange(count)[:, None] if levels is None else np.array(levels),
        np.array(costs, float),
        np.zeros(count) if violations is None else np.array(violations, float),
    )


def test_crowding_distances_of_four_points():
    costs = np.array([[0.0, 10.0], [2.0, 8.0], [10.0, 0.0], [3.0, 5.0]])
    assert crowding_distance(costs) == pytest.approx([np.inf, 0.8, np.inf, 1.6])


def test_crowding_bears_infinities_and_equal_figures():
    costs = np.array([[0.0, 1.0, 4.0], [1.0, 1.0, np.inf], [2.0, 1.0, 3.0]])
    assert crowding_distance(costs)[[0, 2]].tolist() == [np.inf, np.inf]
    assert not np.isnan(crowding_distance(costs)).any()


def test_sparse_regions_have_more_offspring_and_equal_figures_count_once():
    # Six equal members, a crowd, and one that stands alone.
    first = [0.0] * 6 + [1.0, 1.1, 1.2, 1.3, 6.0, 10.0]
    parents = Parents(front_of([[x, 10 - x] for x in first]))
    rng = np.random.default_rng(0)
    drawn = np.bincount([parents.draw(rng) for _ in range(3000)], minlength=12)
    assert drawn[10] > 2 * drawn[7]
    assert drawn[:6].sum() == pytest.approx(drawn[11], rel=0.2)
    assert drawn.min() > 0


def test_feasible_parents_are_preferred_but_the_others_are_not_forgotten():
    costs = [[i, 9 - i] for i in range(10)]
    parents = Parents(front_of(costs, [0.0] * 3 + [1.0] * 7))
    rng = np.random.default_rng(0)
    share = np.mean([parents.draw(rng) < 3 for _ in range(2000)])
    assert share == pytest.approx(0.9, abs=0.03)


def test_with_no_feasible_parent_the_nearer_ones_win():
    parents = Parents(front_of([[i, 9 - i] for i in range(10)], range(1, 11)))
    rng = np.random.default_rng(0)
    drawn = np.bincount([parents.draw(rng) for _ in range(2000)], minlength=10)
    assert drawn[0] > 5 * drawn[9]


def test_a_neighbour_is_near_and_another_point():
    parents = Parents(front_of([[i, 20 - i] for i in range(21)]))
    rng = np.random.default_rng(0)
    assert {parents.neighbour(10, rng) for _ in range(200)} == {8, 9, 11, 12}
    assert Parents(front_of([[1, 2], [1, 2]])).neighbour(0, rng) is None


# --- offspring and the sampler ---


def toy(values):
    """A separable problem: what each parameter saves, and what it loses."""
    rng = np.random.default_rng(7)
    weight, gain = rng.random(20) ** 2, rng.random(20) + 0.2
    levels = np.array([values[name] for name in NAMES]) / 7
    saved = float(gain @ levels / gain.sum())
    return [float(weight @ levels**2 / weight.sum()), 1 - saved]


def open_study(name="mutation", seed=0, context=None):
    sampler = make_sampler(name, seed, context or SamplerContext())
    return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def run(study, count, figures=toy):
    found = []
    for _ in range(count):
        trial = study.ask(SPACE)
        study.tell(trial, figures(trial.params))
        found.append(trial.params)
    return found


def test_with_a_cost_every_switch_keeps_the_budget():
    space = {name: IntDistribution(0, 7) for name in NAMES}
    offspring = Offspring(space, SamplerContext(cost=lambda values: toy(values)[1]))
    rng = np.random.default_rng(0)
    parent = rng.integers(0, 8, 20)
    parents = Parents(front_of([[0, 0]], levels=[parent]))
    cost = toy(offspring.values(parent))[1]
    drawn = [offspring.draw(parents, rng) for _ in range(400)]
    changes = np.array([(levels != parent).sum() for levels in drawn])
    apart = np.array([abs(toy(offspring.values(x))[1] / cost - 1) for x in drawn])
    kept = (apart <= BUDGET_TOLERANCE).mean()
    # Half the mutants keep it by design; many of the rest do by chance.
    assert kept > 0.45
    # Only repaired ones change more than three, and uniform ones nearly all.
    repaired = (changes > 3) & (changes < 12)
    assert repaired.any()
    assert (apart[repaired] <= BUDGET_TOLERANCE).all()


@pytest.mark.parametrize("figure", [math.nan, math.inf, 0.0])
def test_a_cost_that_is_no_number_or_zero_changes_nothing(figure):
    odd = open_study(context=SamplerContext(cost=lambda _: figure))
    assert run(odd, 30) == run(open_study(), 30)


def test_most_draws_are_few_changes_away_from_the_front():
    study = open_study()
    run(study, 60)
    near = []
    for _ in range(60):
        front = [list(t.params.values()) for t in study.best_trials]
        trial = study.ask(SPACE)
        drawn = [trial.params[name] for name in study.best_trials[0].params]
        near.append(min((np.array(front) != drawn).sum(axis=1)) <= 6)
        study.tell(trial, toy(trial.params))
    assert np.mean(near) > 0.65


def test_after_300_trials_the_hypervolume_beats_that_of_random_draws():
    def volume(name, seed):
        found = [toy(values) for values in run(open_study(name, seed), 300)]
        return hypervolume(found, [1.0, 1.0], maximise=[False, False])

    for seed in range(2):
        assert volume("mutation", seed) > 1.05 * volume("random", seed)


def test_nothing_is_drawn_twice_until_all_is_tried():
    space = {"a": IntDistribution(0, 3), "b": IntDistribution(0, 3)}
    study = open_study()
    # The uniform draws at the start may repeat themselves.
    while len(study.trials) < 8:
        trial = study.ask(space)
        study.tell(trial, [trial.params["a"], trial.params["b"]])
    before = {tuple(t.params.values()) for t in study.trials}
    for _ in range(14 - len(before)):
        trial = study.ask(space)
        key = tuple(trial.params[name] for name in space)
        assert key not in before
        before.add(key)
        study.tell(trial, [trial.params["a"], trial.params["b"]])
    for _ in range(5):
        trial = study.ask(space)
        study.tell(trial, state=TrialState.FAIL)


def test_trials_that_run_beside_each_other_differ():
    study = open_study()
    run(study, 10)
    drawn = [tuple(study.ask(SPACE).params.values()) for _ in range(10)]
    assert len(set(drawn)) == 10


def test_a_new_sampler_and_interrupted_trials_make_no_difference():
    whole = run(open_study(), 40)
    study = open_study()
    found = []
    for step in range(40):
        if step % 3 == 1:
            study.sampler = make_sampler("mutation", 0, SamplerContext())
        trial = study.ask(SPACE)
        if step % 7 == 5:
            # As a resumed search does with a trial that was interrupted.
            study.enqueue_trial(trial.params)
            study.tell(trial, state=TrialState.FAIL)
            trial = study.ask(SPACE)
        study.tell(trial, toy(trial.params))
        found.append(trial.params)
    assert found == whole


def test_reseeding_changes_the_draws():
    study = open_study()
    run(study, 10)
    sampler = study.sampler
    drawn = []
    for _ in range(3):
        trial = study._storage.get_trial(study._storage.create_new_trial(study._study_id))
        space = sampler.infer_relative_search_space(study, trial)
        drawn.append(sampler.sample_relative(study, trial, space))
        if len(drawn) == 2:
            sampler.reseed_rng()
    assert drawn[0] == drawn[1] != drawn[2]


def test_parameters_that_are_no_integers_are_drawn_uniformly():
    space = {**SPACE, "share": FloatDistribution(0.0, 1.0), "step": IntDistribution(2, 10, step=4)}
    study = open_study()
    found = []
    for _ in range(30):
        trial = study.ask(space)
        study.tell(trial, toy(trial.params))
        found.append((trial.params["share"], trial.params["step"]))
    assert len({share for share, _ in found}) == 30
    assert {step for _, step in found} == {2, 6, 10}


def test_a_value_that_was_enqueued_out_of_range_does_no_harm():
    study = open_study()
    with pytest.warns(UserWarning, match="out of range"):
        for level in range(9):
            study.enqueue_trial(dict.fromkeys(NAMES, level + 5))
            run(study, 1)
    assert all(0 <= v <= 7 for values in run(study, 20) for v in values.values())


def test_it_is_an_optuna_sampler_whose_seed_decides():
    assert isinstance(make_sampler("mutation", 3, SamplerContext()), MutationSampler)
    assert run(open_study(seed=1), 15)[0] != run(open_study(seed=2), 15)[0]
