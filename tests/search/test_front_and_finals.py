from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from autocompress.report.columns import typed_front
from autocompress.search.columns import COLUMNS
from autocompress.search.finals import choose_finalists
from autocompress.search.front import build_front, metric_scale, objective_ends, objective_values

OBJECTIVES = ("metric", "latency")


def test_before_judging_the_search_figures_decide(tmp_path, make_evaluation):
    points = [
        make_evaluation("original", 0.95, 1.0),
        make_evaluation("stock_int8", 0.94, 2.0),
        make_evaluation("a", 0.94, 3.0),
        make_evaluation("b", 0.90, 2.5),
    ]
    table = build_front(tmp_path, OBJECTIVES, points, []).table().set_index("candidate")
    assert table["on_front"].to_dict() == {
        "a": True, "b": False, "original": True, "stock_int8": False,
    }  # fmt: skip
    assert table["role"].to_dict() == {
        "a": "candidate", "b": "candidate", "original": "original", "stock_int8": "stock_int8",
    }  # fmt: skip
    assert table["metric_test"].isna().all()


def test_finalists_carry_both_figures_and_the_drop_in_points(tmp_path, make_evaluation):
    searched = [make_evaluation("original", 0.95, 1.0), make_evaluation("a", 0.94, 3.0)]
    judged = [
        make_evaluation("original", 0.93, 1.0, split="test"),
        make_evaluation("a", 0.92, 2.9, split="test"),
    ]
    row = (
        build_front(tmp_path, OBJECTIVES, searched, judged, complete=True)
        .table()
        .set_index("candidate")
        .loc["a"]
    )
    assert row["role"] == "finalist"
    assert (row["metric_search"], row["metric_test"]) == (0.94, 0.92)
    assert np.isclose(row["drop_test_pp"], 1.0)
    assert row["speedup"] == 2.9


def test_a_users_metric_keeps_its_unit_and_so_does_its_drop(tmp_path, make_evaluation):
    def own(candidate, value, split="search"):
        found = make_evaluation(candidate, value, 1.0, split=split)
        return replace(found, metric=replace(found.metric, unit="metric"))

    searched = [own("original", 0.95), own("a", 0.94)]
    judged = [own("original", 0.93, "test"), own("a", 0.92, "test")]
    table = build_front(tmp_path, OBJECTIVES, searched, judged).table().set_index("candidate")
    assert table["metric_unit"].tolist() == ["metric", "metric"]
    assert np.isclose(table.loc["a", "drop_test_pp"], 0.01)


def test_the_test_split_does_not_choose_the_front(tmp_path, make_evaluation):
    searched = [
        make_evaluation("original", 0.95, 1.0),
        make_evaluation("a", 0.94, 3.0),
        make_evaluation("b", 0.945, 2.0),
    ]
    judged = [
        make_evaluation("original", 0.95, 1.0, split="test"),
        make_evaluation("a", 0.94, 3.0, split="test"),
        make_evaluation("b", 0.80, 2.0, split="test"),
    ]
    table = (
        build_front(tmp_path, OBJECTIVES, searched, judged, complete=True)
        .table()
        .set_index("candidate")
    )
    assert table.loc["b", "on_front"]


def test_front_csv_has_the_stable_columns_and_reads_back(tmp_path, make_evaluation):
    front = build_front(tmp_path, OBJECTIVES, [make_evaluation("original", 0.9, 1.0)], [])
    front.save()
    frame = pd.read_csv(tmp_path / "front.csv")
    assert tuple(frame.columns) == COLUMNS
    assert typed_front(frame)["candidate"].tolist() == ["original"]
    assert not list(tmp_path.glob(".front.csv*"))


def test_latency_counts_relative_to_the_baseline(make_evaluation):
    fast = make_evaluation("a", 0.9, 4.0)
    assert objective_values(fast, ("latency", "file_bytes", "metric")) == [0.25, 1000.0, 0.9]


def test_finalists_leave_ruined_points_out(make_evaluation):
    original = make_evaluation("original", 0.90, 1.0)
    points = [
        make_evaluation("good", 0.89, 2.0),
        make_evaluation("fast", 0.86, 4.0),
        make_evaluation("ruined", 0.30, 9.0),
        make_evaluation("dominated", 0.85, 1.5),
    ]
    names = [e.candidate for e in choose_finalists(points, original, OBJECTIVES, 10)]
    assert sorted(names) == ["fast", "good"]


def test_when_all_are_ruined_one_finalist_is_still_judged(make_evaluation):
    original = make_evaluation("original", 0.90, 1.0)
    points = [make_evaluation("a", 0.2, 5.0), make_evaluation("b", 0.3, 4.0)]
    assert len(choose_finalists(points, original, OBJECTIVES, 10)) == 1


def test_points_off_the_front_that_beat_the_rival_are_judged_too(make_evaluation):
    original = make_evaluation("original", 0.90, 1.0)
    rival = make_evaluation("stock_int8", 0.89, 2.0)
    points = [
        make_evaluation("lucky", 0.895, 3.0),
        make_evaluation("close", 0.894, 2.5),
        make_evaluation("slower than the rival", 0.893, 1.9),
        make_evaluation("worse than the rival", 0.88, 2.9),
    ]
    names = [e.candidate for e in choose_finalists(points, original, OBJECTIVES, 8, rival)]
    assert names[:2] == ["lucky", "close"]
    assert "worse than the rival" not in names
    alone = [e.candidate for e in choose_finalists(points, original, OBJECTIVES, 1)]
    assert alone == ["lucky"]


def test_places_that_are_left_go_to_points_that_may_be_better_than_they_seem(make_evaluation):
    """A standard error is half a per cent."""
    original = make_evaluation("original", 0.90, 1.0)
    points = [
        make_evaluation("lucky", 0.895, 3.0),
        make_evaluation("near", 0.891, 2.9),
        make_evaluation("nearest", 0.893, 2.8),
        make_evaluation("far", 0.888, 2.9),
        make_evaluation("unknown", math.nan, 3.5),
    ]
    unknown = replace(points[-1].metric, value=0.89, ci_low=math.nan, ci_high=math.nan)
    points[-1] = replace(points[-1], speedup=points[1].speedup, metric=unknown)

    def names(count):
        return [e.candidate for e in choose_finalists(points, original, OBJECTIVES, count)]

    assert set(names(8)) == {"lucky", "near", "nearest"}
    assert names(8)[0] == "lucky"
    assert len(names(2)) == 2


def test_the_count_is_kept_and_the_widest_cover_comes_first(make_evaluation):
    original = make_evaluation("original", 0.90, 1.0)
    points = [make_evaluation(f"p{i}", 0.90 - i * 0.004, 1.5 + i) for i in range(8)]
    chosen = choose_finalists(points, original, OBJECTIVES, 3)
    assert len(chosen) == 3
    alone = [choose_finalists([p], original, OBJECTIVES, 1)[0].candidate for p in points]
    assert chosen[0].candidate in alone


def test_a_judged_point_leaves_the_front_only_if_dominated_beyond_doubt(tmp_path, make_evaluation):
    # Speed-ups are known to 1 %.
    points = [
        make_evaluation("original", 0.95, 1.0),
        make_evaluation("a", 0.94, 3.0),
        make_evaluation("as fast", 0.93, 2.98),
        make_evaluation("slower", 0.93, 2.90),
    ]
    judged = [replace(e, split="test") for e in points]
    early = build_front(tmp_path, OBJECTIVES, points, judged).table().set_index("candidate")
    last = build_front(tmp_path, OBJECTIVES, points, judged, complete=True)
    table = last.table().set_index("candidate")
    assert early["on_front"].to_dict() == {
        "original": True, "a": True, "as fast": False, "slower": False,
    }  # fmt: skip
    assert table["on_front"].to_dict() == {
        "original": True, "a": True, "as fast": True, "slower": False,
    }  # fmt: skip


def test_a_speedup_that_may_be_zero_has_no_latency_above_which_it_cannot_be(make_evaluation):
    wide = make_evaluation("a", 0.9, 2.0)
    wide = replace(wide, speedup=replace(wide.speedup, ci_low=-0.1, ci_high=4.0))
    assert objective_ends(wide, ("latency", "metric")) == ([0.25, 0.9], [np.inf, 0.9])


def test_shares_of_a_metric_of_zero_are_of_the_spread(make_evaluation):
    def scale(original, *others):
        return metric_scale(
            make_evaluation("o", original, 1.0), [make_evaluation("c", m, 1.0) for m in others]
        )

    assert scale(-4.0, -9.0) == 4.0
    assert scale(0.0, -9.0, -1.0) == 9.0
    assert scale(0.0, 0.0) == scale(0.0) == 1.0


def test_an_original_that_scores_zero_has_finalists(make_evaluation):
    """As one whose metric is the distance to its own outputs; all others are below it."""
    original = make_evaluation("original", 0.0, 1.0)
    points = [
        make_evaluation(f"{lost}", -lost, speed)
        for lost, speed in ((0.01, 2.0), (0.3, 3.0), (1.9, 4.0), (4.0, 9.0), (10.0, 20.0))
    ]
    found = choose_finalists(points, original, OBJECTIVES, 4)
    # Half a unit is 5 % of what the worst one loses, two are 20 %.
    assert {e.candidate for e in found[:2]} == {"0.01", "0.3"}
    assert [e.candidate for e in found[2:]] == ["1.9"]
