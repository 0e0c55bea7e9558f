from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from autocompress.errors import ConfigError, NoFitError
from autocompress.report.pick import Limits, pick


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(max_drop=1.0), "bent"),
        (Limits(max_drop=1.0, max_bytes=400_000), "bent"),
        (Limits(max_drop=5.0), "hard"),
        (Limits(max_latency_ms=0.35), "mild"),
        (Limits(min_speedup=5.0), "bent"),
        (Limits(max_bytes=160_000), "hard"),
        (Limits(max_drop=1.0, min_speedup=2.0), "mild"),
        (Limits(max_drop=1.0, max_latency_ms=0.2), "bent"),
    ],
)
def test_what_the_limits_pick(front: pd.DataFrame, limits: Limits, name: str) -> None:
    choice = pick(front, limits)
    assert choice.row["candidate"] == name
    assert choice.reason.startswith(f"{name}: ")


def test_drops_of_a_users_metric_are_in_its_own_unit(own_front: pd.DataFrame) -> None:
    assert pick(own_front, Limits(max_drop=0.01)).row["candidate"] == "bent"
    with pytest.raises(NoFitError) as caught:
        pick(own_front, Limits(max_drop=0.006, max_latency_ms=0.2))
    text = str(caught.value)
    assert "bent: drop 0.008, 0.002 over" in text and "points" not in text.split("given:")[1]


def test_knee(front: pd.DataFrame) -> None:
    assert pick(front, Limits(), knee=True).row["candidate"] == "hard"
    assert pick(front, Limits(max_drop=5.0), knee=True).row["candidate"] == "bent"
    within = pick(front, Limits(max_drop=0.5), knee=True)
    assert within.row["candidate"] == "mild" and "knee" in within.reason


def test_only_finalists_judged_on_the_test_split_count(front: pd.DataFrame) -> None:
    front.loc[3, ["metric_test", "drop_test_pp"]] = np.nan
    assert pick(front, Limits(min_speedup=5.0)).row["candidate"] == "hard"
    front.loc[front["role"] == "finalist", "metric_test"] = np.nan
    with pytest.raises(NoFitError, match="no finalist"):
        pick(front, Limits(max_drop=1.0))


def test_a_reference_is_picked_only_where_nothing_of_ours_is_better(
    front: pd.DataFrame, make_judged: Any
) -> None:
    original = pick(front, Limits(max_drop=0.0))
    assert original.row["role"] == "original"
    assert "the original network: no finalist is within the limits" in original.reason
    front.loc[1] = pd.Series(make_judged("stock_int8", 0.9195, 0.12, "stock_int8"))
    stock = pick(front, Limits(max_drop=1.0))
    assert stock.row["role"] == "stock_int8"
    assert "no finalist within the limits beats it" in stock.reason
    front.loc[1] = pd.Series(make_judged("stock_int8", 0.9195, 0.31, "stock_int8"))
    assert pick(front, Limits(max_latency_ms=0.35)).row["candidate"] == "mild"


def test_nearest_points_are_named_with_what_they_miss(front: pd.DataFrame) -> None:
    with pytest.raises(NoFitError) as caught:
        pick(front, Limits(max_latency_ms=0.13, max_drop=0.6))
    text = str(caught.value)
    nearest = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert nearest[0] == (
        "bent: latency 0.140 ms, 0.0100 ms over; drop 0.8 points, 0.2 points over"
    )
    assert nearest[1] == "mild: latency 0.300 ms, 0.170 ms over"
    assert len(nearest) == 3
    assert "given:   latency 0.130 ms, drop 0.6 points" in text


def test_misses_of_speed_and_bytes_have_units(front: pd.DataFrame) -> None:
    front.loc[front["candidate"] == "hard", "file_bytes"] = np.nan
    with pytest.raises(NoFitError) as caught:
        pick(front, Limits(min_speedup=9.0, max_bytes=100_000))
    text = str(caught.value)
    assert "extreme: speed-up 8x, 1x short; file 125 kB, 25.0 kB over" in text
    assert "inf" not in text and "nan" not in text


def test_doubts_are_said(front: pd.DataFrame) -> None:
    front.loc[front["candidate"] == "bent", "trusted"] = False
    reason = pick(front, Limits(min_speedup=5.7)).reason
    assert "reaches down to 5.66x" in reason
    assert "untrusted" in reason
    plain = pick(front, Limits(min_speedup=2.0)).reason
    assert "reaches" not in plain and "untrusted" not in plain


def test_ties_go_to_the_faster_then_to_the_smaller(front: pd.DataFrame, make_judged: Any) -> None:
    twins = [make_judged("slow", 0.95, 0.3), make_judged("big", 0.95, 0.2)]
    small = {**make_judged("small", 0.95, 0.2), "file_bytes": 10}
    frame = pd.concat([front, pd.DataFrame([*twins, small])], ignore_index=True)
    assert pick(frame, Limits(min_speedup=2.0)).row["candidate"] == "small"


def test_a_wish_is_needed(front: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="--knee"):
        pick(front, Limits())


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_impossible_limits_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="--min-speedup"):
        Limits(min_speedup=value)
    if not math.isfinite(value):
        with pytest.raises(ConfigError, match="--max-drop"):
            Limits(max_drop=value)
