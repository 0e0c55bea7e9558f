from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autocompress.report import figures
from autocompress.report.chart import front_chart
from autocompress.report.columns import COLUMNS, read_cost
from autocompress.report.tables import compact_table, front_table


def lines(renderable: Table | Text, width: int = 100) -> list[str]:
    """What is printed, on a console so wide that it cuts nothing."""
    console = Console(width=max(width, 300), color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_default_shows_the_front_and_the_references(front: pd.DataFrame) -> None:
    text = "\n".join(lines(front_table(front, device="cpu, Test CPU")))
    assert "cpu, Test CPU" in text and "Front of 5 out of 6" in text
    assert "◆ original" in text and "▲ stock_int8" in text
    assert "plain" in text and "worse" not in text
    assert "worse" in "\n".join(lines(front_table(front, everything=True)))
    bent = next(line for line in lines(front_table(front)) if "bent" in line)
    for cell in ("91.20 %", "0.80", "0.140 ms", "5.71x [5.66, 5.77]", "175 kB", "31.0 MB"):
        assert cell in bent


def test_a_users_metric_is_never_per_cent(front: pd.DataFrame, own_front: pd.DataFrame) -> None:
    shown = lines(front_table(own_front))
    bent = next(line for line in shown if "bent" in line)
    assert " 0.912 " in bent and " 0.0080 " in bent
    for text in ("\n".join(shown), front_chart(own_front).plain):
        assert "%" not in text and "points" not in text
    heads = lines(front_table(own_front))[:4], lines(front_table(front))[:4]
    assert [sum("points" in line for line in head) for head in heads] == [0, 1]


def test_rows_rise_in_latency_and_unknown_is_last(front: pd.DataFrame) -> None:
    front.loc[6, "latency_ms"] = float("nan")
    names = [line.split()[1] for line in lines(front_table(front)) if line[:1] in "◆▲●○" and line]
    order = ["extreme", "hard", "bent", "mild", "stock_int8", "original", "plain"]
    assert names[: len(order)] == order


def test_untrusted_rows_carry_a_footnote(front: pd.DataFrame) -> None:
    shown = lines(front_table(front))
    assert [line.split()[1] for line in shown if "]*" in line] == ["extreme"]
    assert any(line.startswith("* untrusted") for line in shown)
    front["trusted"] = True
    assert "untrusted" not in "\n".join(lines(front_table(front)))


def test_names_are_not_markup(front: pd.DataFrame) -> None:
    front.loc[3, "candidate"] = "[bold]x[/b]"
    assert "[bold]x[/b]" in "\n".join(lines(front_table(front)))


def test_compact_front_is_short_and_keeps_the_ends(front: pd.DataFrame, make_row: Any) -> None:
    many = [make_row(f"c{i}", latency_ms=0.1 + i / 100) for i in range(50)]
    frame = pd.concat([front.head(2), pd.DataFrame(many)])
    shown = [line for line in lines(compact_table(frame)) if line[:1] in ("◆", "▲", "○")]
    assert len(shown) == 8
    names = [line.split()[1] for line in shown]
    assert {"c0", "c49", "original", "stock_int8"} <= set(names)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 100)
CELLS = {
    "candidate": st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=40
    ),
    "role": st.sampled_from(["original", "stock_int8", "candidate", "finalist"]),
    "on_front": st.booleans(),
    "trusted": st.booleans(),
    "metric_unit": st.sampled_from(["share", "metric"]),
    "artifact": st.just("a.onnx"),
    "plan_hash": st.just(""),
}
ROWS = st.fixed_dictionaries({name: CELLS.get(name, NUMBERS) for name in COLUMNS})


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=6), st.booleans())
def test_nothing_is_wider_than_100_columns(rows: list[dict[str, Any]], everything: bool) -> None:
    frame = pd.DataFrame(rows)
    for renderable in (
        front_table(frame, everything=everything, device="d" * 150),
        compact_table(frame),
        front_chart(frame),
    ):
        printed = lines(renderable)
        assert max(Text(line).cell_len for line in printed) <= 100
    assert len(lines(front_chart(frame))) <= 16


def test_a_narrow_table_keeps_to_its_width(front: pd.DataFrame) -> None:
    for width in (60, 80):
        shown = lines(front_table(front, width=width))
        assert max(Text(line).cell_len for line in shown) <= width
        bent = next(line for line in shown if "bent" in line)
        assert "0.80" in bent and "0.140 ms" in bent and "5.71x [5.66, 5.77]" in bent


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS)
def test_figures_are_short(value: float, low: float, high: float) -> None:
    assert len(figures.number(value)) <= 7
    assert len(figures.milliseconds(value)) <= 10
    assert len(figures.points(value, signed=True)) <= 7
    assert len(figures.metric(value, share=False)) <= 8
    assert len(figures.speedup(abs(value), abs(low), abs(high))) <= 18


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8321, "0.832"), (12.345, "12.3"), (999.6, "1000"), (9.999, "10.0"), (0.01234, "0.0123"),
     (0.00012, "1e-04"), (123456, "1e+05"), (0, "0"), (float("nan"), "-")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert figures.number(value) == text


def test_units() -> None:
    assert figures.byte_size(412) == "412 B"
    assert figures.byte_size(98_200) == "98.2 kB"
    assert figures.byte_size(1_207_000) == "1.21 MB"
    assert figures.byte_size(float("nan")) == "-"
    assert figures.speedup(2.714, 2.68, 2.744) == "2.71x [2.68, 2.74]"
    assert figures.speedup(2.714, float("nan"), 2.744) == "2.71x"
    assert figures.points(-0.001) == "-0.00"
    assert figures.metric(0.9241, share=True) == "92.41 %"
    assert figures.metric(37.251, share=False) == "37.25"


def test_rows_go_by_the_cost_that_was_searched_and_show_it(front: pd.DataFrame) -> None:
    sizes = np.random.default_rng(0).permutation(len(front)) * 1e4 + 1e4
    frame = front.assign(download_bytes=sizes)
    shown = lines(front_table(frame, cost="download_bytes", everything=True, width=80))
    assert any("coded" in line for line in shown)
    names = [line.split()[1] for line in shown if line[:1] in "◆▲●○◌·" and line]
    order = frame.sort_values("download_bytes")["candidate"].tolist()
    found = [name for name in names if name in order]
    assert found == [name for name in order if name in found] and len(found) > 3
    assert any("coded" in line for line in lines(compact_table(frame, cost="download_bytes")))


def test_the_cost_is_that_of_the_experiment(tmp_path: Path) -> None:
    assert read_cost(tmp_path) == "latency_ms"
    for objectives, column in (
        (["metric", "download_bytes"], "download_bytes"),
        (["metric", "latency", "file_bytes"], "latency_ms"),
        (["peak_memory", "metric"], "peak_memory_bytes"),
        (["metric"], "latency_ms"),
    ):
        text = json.dumps({"experiment": {"objectives": objectives}})
        (tmp_path / "experiment.yaml").write_text(text)
        assert read_cost(tmp_path) == column
