from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.report.chart import front_chart


def body(frame: pd.DataFrame, width: int = 100, height: int = 16) -> list[str]:
    """The rows of the plot without legend and axis."""
    return [
        line for line in front_chart(frame, width=width, height=height).plain.splitlines()
        if "│" in line or "┤" in line
    ]  # fmt: skip


def test_every_kind_of_point_and_the_axes(front: pd.DataFrame) -> None:
    text = front_chart(front).plain
    plot = "\n".join(body(front))
    assert plot.count("◆") == 1 and plot.count("▲") == 1
    assert "●" in plot and "▾" in plot
    assert "92.00 %" in plot
    axis = text.splitlines()[-1]
    assert axis.strip().startswith("ms, log") and axis.rstrip().endswith("0.800")
    assert "0.100" in axis
    assert len(text.splitlines()) <= 16


def test_latency_is_linear_in_a_small_range(front: pd.DataFrame) -> None:
    axis = front_chart(front[front["latency_ms"] > 0.25]).plain.splitlines()[-1]
    assert "log" not in axis and "0.550" in axis


def test_another_cost_has_its_own_axis(front: pd.DataFrame) -> None:
    sizes = np.linspace(2e5, 3e6, len(front))
    text = front_chart(front.assign(download_bytes=sizes), cost="download_bytes").plain
    axis = text.splitlines()[-1]
    assert axis.strip().startswith("log") and axis.rstrip().endswith("3.00 MB")
    assert "200 kB" in axis and "ms" not in axis


def test_useless_points_do_not_squash_the_front(front: pd.DataFrame) -> None:
    rows = [line for line in body(front) if "●" in line or "▾" in line]
    assert len(rows) >= 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1000)), min_size=2, max_size=10),
    st.integers(40, 100),
    st.integers(8, 16),
)
def test_references_are_always_inside(
    points: list[tuple[float, float]], width: int, height: int
) -> None:
    roles = ["original", "stock_int8"] + ["candidate"] * (len(points) - 2)
    rows: list[dict[str, Any]] = []
    for index, (role, (metric, latency)) in enumerate(zip(roles, points, strict=True)):
        rows.append(
            {
                "candidate": str(index), "role": role, "on_front": index % 2 == 0,
                "metric_search": metric, "metric_test": np.nan, "drop_test_pp": np.nan,
                "latency_ms": latency, "speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0,
                "file_bytes": 1, "download_bytes": 1, "peak_memory_bytes": 1, "trusted": True,
                "artifact": "", "plan_hash": "",
            }
        )  # fmt: skip
    plot = "\n".join(body(pd.DataFrame(rows), width, height))
    assert plot.count("◆") == 1 and plot.count("▲") == 1
    text = front_chart(pd.DataFrame(rows), width=width, height=height).plain.splitlines()
    assert len(text) <= height
    assert max(map(len, text[1:])) <= width


def test_nothing_measured(front: pd.DataFrame) -> None:
    front["latency_ms"] = np.nan
    assert "No point" in front_chart(front).plain
