from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.search.time_plan import PHASES, Demand, TimePlan

SECONDS = st.floats(0, 5000)
DEMANDS = st.builds(
    Demand,
    final_s=st.floats(0, 100),
    finalists=st.integers(0, 40),
    trains=st.booleans(),
)
# Seconds between the ends of phases; None for a phase that is not told of.
STEPS = st.lists(st.one_of(st.none(), st.floats(0, 1000)), max_size=len(PHASES) - 1)


def advanced(plan: TimePlan, steps) -> TimePlan:
    for phase, seconds in zip(PHASES[1:], steps, strict=False):
        if seconds is not None:
            plan = plan.after(phase, plan.spent_s + seconds)
    return plan


PLANS = st.builds(advanced, st.builds(TimePlan, st.floats(1, 5000), SECONDS, DEMANDS), STEPS)


@given(plan=PLANS)
def test_phases_never_take_more_than_there_is_and_none_is_negative(plan):
    seconds = [plan.seconds(phase) for phase in PHASES]
    assert all(s >= 0 for s in seconds)
    assert math.fsum(seconds) <= max(plan.total_s, plan.spent_s) * (1 + 1e-9)


@given(plan=PLANS)
def test_what_is_left_is_planned_to_the_end(plan):
    planned = math.fsum(plan.seconds(p) for p in PHASES if p not in plan.ended)
    if len(plan.ended) < len(PHASES):
        assert planned == pytest.approx(max(0.0, plan.total_s - plan.spent_s), abs=1e-6)


@given(plan=PLANS)
def test_deadlines_never_go_back_and_never_pass_the_limit(plan):
    deadlines = [plan.deadline(phase) for phase in PHASES]
    assert all(a <= b + 1e-6 for a, b in pairwise(deadlines))
    assert deadlines[-1] <= max(plan.total_s, plan.spent_s) + 1e-6
    ahead = [plan.deadline(p) for p in PHASES if p not in plan.ended]
    assert all(d >= plan.spent_s for d in ahead)


@given(plan=PLANS)
def test_judging_keeps_a_quarter_at_most_or_what_one_finalist_takes(plan):
    if plan.seconds("search") and "search" not in plan.ended:
        most = max(0.25 * plan.total_s, plan.demand.final_s)
        assert plan.seconds("judging") <= most + 1e-9


def plan_of(total_s=1200.0, set_up_s=20.0, **demand) -> TimePlan:
    known = {"final_s": 5.0, "finalists": 20, "trains": True}
    return TimePlan(total_s, set_up_s, Demand(**known | demand))


def test_time_is_split_by_the_rules():
    plan = plan_of()
    assert plan.seconds("set-up") == 20
    assert plan.seconds("judging") == 100
    assert plan.seconds("survivors") == pytest.approx(0.45 * 1180)
    assert plan.seconds("search") == pytest.approx(1180 - 100 - 0.45 * 1180)
    assert plan.deadline("set-up") == 20
    assert plan.deadline("judging") == pytest.approx(1200)


def test_without_training_data_or_time_to_train_the_search_gets_it_all():
    assert plan_of(trains=False).seconds("survivors") == 0
    assert plan_of(trains=False).seconds("search") == pytest.approx(1180 - 100)
    assert plan_of(total_s=179.0).seconds("survivors") == 0
    assert plan_of(total_s=180.0).seconds("survivors") == pytest.approx(0.45 * 160)


def test_judging_many_is_capped_and_one_finalist_is_always_judged():
    assert plan_of(finalists=1000).seconds("judging") == pytest.approx(300)
    late = plan_of(total_s=60.0, set_up_s=52.0)
    assert late.seconds("judging") == 5
    assert plan_of(total_s=60.0, set_up_s=57.0).seconds("judging") == 3


def test_time_that_the_search_leaves_goes_to_training_then_to_judging():
    plan = plan_of().after("search", 200.0)
    assert plan.seconds("survivors") == pytest.approx(1000 - 100)
    assert plan.deadline("survivors") == pytest.approx(1100)
    ended = plan.after("survivors", 900.0)
    assert ended.seconds("judging") == pytest.approx(300)
    untrained = plan_of(trains=False).after("search", 200.0)
    assert untrained.seconds("judging") == pytest.approx(1000)


def test_a_late_search_takes_from_training_and_not_from_judging():
    plan = plan_of().after("search", 900.0)
    assert plan.seconds("judging") == 100
    assert plan.seconds("survivors") == pytest.approx(200)


def test_phases_that_did_not_run_took_no_time():
    plan = plan_of().after("survivors", 500.0)
    assert plan.seconds("search") == 0 and plan.seconds("survivors") == 480
    with pytest.raises(ValueError, match="search"):
        plan.after("search", 600.0)


def test_without_a_limit_there_are_no_deadlines():
    plan = TimePlan(None, 20.0, Demand(trains=True)).after("search", 30.0)
    assert [plan.deadline(phase) for phase in PHASES] == [None] * 4
    assert plan.seconds("search") == 10 and plan.seconds("survivors") is None
    assert plan.text() == "plan without a time limit"


def test_the_plan_is_one_line():
    assert plan_of().text() == (
        "plan for 20m: set-up 0:20, search 9:09, training 8:51, judging 1:40"
    )
    assert "training" not in plan_of(trains=False).text()
    assert plan_of(total_s=5400.0).text().startswith("plan for 1h30m: ")
    assert plan_of(total_s=7200.0, trains=False).text().startswith("plan for 2h: ")
    assert "search 1:56:10" in plan_of(total_s=7200.0, trains=False, finalists=42).text()
    assert plan_of(total_s=90.0).text().startswith("plan for 90s: ")
