from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from report_device import DEVICE
from rich.console import Console

from autocompress.measure.measurement import Measurement
from autocompress.measure.table.survey import Fill
from autocompress.measure.table.table import Prediction
from autocompress.report.latency_table import network_parts
from autocompress.search.levels import GroupRow, LayerRow
from autocompress.search.network_report import Miss, NetworkReport, PlanLatency


def plan(name: str, predicted: float, measured: float, *, trusted: bool = True) -> PlanLatency:
    found = Measurement(
        measured, 0.99 * measured, 1.01 * measured, "ms", "measured", DEVICE.id, trusted=trusted
    )
    forecast = Prediction(predicted, 0.01, 0.006, 0.02, measured=18, interpolated=2)
    return PlanLatency(name, forecast, found, 2.0, 1.2 * measured)


@pytest.fixture
def report() -> NetworkReport:
    times = {"fp32": 0.5, "w8 a8": 0.25}
    return NetworkReport(
        experiment="fashion",
        device=DEVICE,
        runtime="onnxruntime",
        cache=Path("/cache/latency/0123456789ab.jsonl"),
        entries=120,
        blocks=Fill(100, 7, ()),
        meetings=Fill(12, 1, ()),
        misses=(Miss("Conv -> uint8 -> integer Conv", "uint8[1,8,28,28]", 0.01, 0.015),),
        failures=("Conv: it crashed",),
        original=plan("original", 1.42, 1.40),
        plans=tuple(plan(f"hash{i:08d}", 1 + i / 50, 1.0, trusted=i != 3) for i in range(20)),
        layers=tuple(LayerRow(f"layer{i}", "32 -> 64, 3x3", times) for i in range(20)),
        groups=(
            GroupRow("stem+2", 32, 32, times),
            GroupRow("stem+2", 32, 24, {"fp32": 0.6, "w8 a8": 0.2}),
            GroupRow("[b]inner", 64, 64, {"fp32": 0.7, "w8 a8": None}),
        ),
        slow_levels=("stem 32 -> 24 channels: fp32 0.5000 -> 0.6000 ms, no faster",),
    )


def shown(report: NetworkReport, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(width=width, file=out)
    for part in network_parts(report):
        console.print(part)
    return out.getvalue()


def test_nothing_is_wider_than_a_hundred_columns(report: NetworkReport) -> None:
    long = "stages.0.block.attention.self.query_projection.with_a_very_long_name" * 2
    wide = replace(
        report,
        layers=(LayerRow(long, "3072 -> 768, 3x3", {"fp32": 0.5, "w8 a8": 0.2, "w4 a32": 0.3}),),
        groups=(GroupRow(long, 32, 32, {"fp32": 0.5, "w8 a8": 0.2, "w4 a32": 0.3}),),
        misses=(Miss(long, "float[1,1024,1024]", 0.1, 0.2),),
    )
    for each in (report, wide):
        tables = [line for line in shown(each, 300).splitlines() if "kept in" not in line]
        assert max(map(len, tables)) <= 100


def test_the_summary_says_how_good_the_table_is(report: NetworkReport) -> None:
    text = shown(report)
    assert "100 measured, 7 reused" in text and "12 measured, 1 reused" in text
    # Errors of 0, 2, ..., 38 %.
    assert "20, mean absolute error 19.0 %, largest 38.0 %, rank correlation -" in text
    assert "mean absolute error 20.0 %" in text
    assert "+1.4 %" in text and "it crashed" in text


def test_the_worst_predictions_come_first(report: NetworkReport) -> None:
    text = shown(report)
    assert "hash00000019" in text and "hash00000000" not in text
    assert text.index("hash00000019") < text.index("hash00000018")
    assert text.index("The 8 worst predictions") < text.index("hash00000019")


def test_untrusted_measurements_are_marked(report: NetworkReport) -> None:
    few = replace(report, plans=report.plans[:4])
    assert "1.00 ms*" in shown(few) and "untrusted" in shown(few)
    assert "untrusted" not in shown(report)


def test_levels_that_are_no_faster_are_marked_and_listed(report: NetworkReport) -> None:
    text = shown(report)
    assert "0.6000=" in text and "0.2000=" not in text
    assert "stem 32 -> 24 channels" in text
    assert "Every level of the search space saves time" in shown(replace(report, slow_levels=()))


def test_names_are_no_markup_and_unknown_times_a_dash(report: NetworkReport) -> None:
    text = shown(report)
    row = next(line for line in text.splitlines() if "[b]inner" in line)
    assert row.split()[-1] == "-"


def test_a_table_without_plans_or_groups_is_shown(report: NetworkReport) -> None:
    text = shown(replace(report, plans=(), groups=(), misses=(), layers=()))
    assert "none was measured" in text and "worst" not in text
