from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from autocompress.measure.measurement import Measurement
from autocompress.plan import Plan, Step
from autocompress.report.solved import limits_text, solved_parts
from autocompress.search.solve import Solved
from autocompress.search.solve_figures import Figures, MeasuredCandidate
from autocompress.search.solve_limits import Limits
from autocompress.techniques.filter_prune import FilterPrune


def figures(source, ms, drop=1.25, spread=0.05, trusted=True):
    def figure(value, unit):
        return Measurement(
            value, value - spread * value, value + spread * value, unit, source, "device", trusted,
            "" if trusted else "the machine was busy",
        )  # fmt: skip

    lost = None if drop is None else figure(drop, "points")
    if lost is not None and source == "measured":
        lost = replace(lost, ci_low=float("nan"), ci_high=float("nan"))
    size = Measurement(98_700, 98_700, 98_700, "bytes", source, "device")
    return Figures(figure(ms, "ms"), figure(1 / ms, "ratio"), lost, size, None)


def solved(**changed):
    plan = Plan(tuple(Step(f"layer{i}", FilterPrune(pruning_ratio=0.5)) for i in range(3)))
    within = (
        MeasuredCandidate("aaaaaaaaaaaa", "onnxruntime", figures("measured", 0.2, 2.5), False),
        MeasuredCandidate("bbbbbbbbbbbb", "onnxruntime", figures("measured", 0.3, 3.5), True),
    )
    plain = Solved(
        run=Path("run"), limits=Limits(max_latency_ms=0.4), plan=plan, candidate=plan.hash,
        runtime="onnxruntime", predicted=figures("estimated", 0.25), loss=0.02, gap=0.0,
        proven=True, measured=None, within=within, original_metric=0.9, learnt_from=31,
    )  # fmt: skip
    return replace(plain, **changed)


def printed(found):
    file = io.StringIO()
    console = Console(file=file, width=100, color_system=None)
    for part in solved_parts(found):
        console.print(part)
    return file.getvalue()


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(name))


def test_predicted_figures_stand_under_that_word():
    text = printed(solved())
    heading = next(line for line in text.splitlines() if "predicted" in line)
    assert "measured" not in heading
    assert "0.250 [0.237, 0.263]" in row(text, "latency")
    assert "1.25 [1.19, 1.31]" in row(text, "drop")
    assert "98.7 kB" in row(text, "file")
    assert "--measure" in text and "31 measured candidates" in text
    assert "3 filter_prune" in text


def test_measured_figures_have_a_column_of_their_own():
    text = printed(solved(measured=figures("measured", 0.31, 1.75)))
    heading = next(line for line in text.splitlines() if "predicted" in line)
    found = row(text, "latency")
    assert heading.index("predicted") < heading.index("measured")
    assert found.index("0.250 [") < heading.index("predicted") + 9 <= found.index("0.310 [")
    assert row(text, "drop").rstrip().endswith("1.75")
    assert f"{solved().plan.hash}.onnx" in text and "--measure" not in text


def test_a_measured_plan_that_misses_a_limit_is_told():
    within, beyond = (printed(solved(measured=figures("measured", ms))) for ms in (0.39, 0.41))
    assert "not within the limits" not in within
    assert "not within the limits" in beyond


def test_measured_candidates_say_which_are_trained():
    text = printed(solved())
    assert "Measured candidates of the run with latency at most 0.400 ms" in text
    assert "trained" not in row(text, "aaaaaaaaaaaa")
    assert "trained" in row(text, "bbbbbbbbbbbb")
    assert "has measured no candidate" in printed(solved(within=()))


@pytest.mark.parametrize(
    ("limits", "reaches"),
    [
        (Limits(max_latency_ms=0.4), False),
        (Limits(max_latency_ms=0.255), True),
        (Limits(min_speedup=3.0), False),
        (Limits(min_speedup=3.9), True),
        (Limits(max_bytes=98_700), False),
    ],
)
def test_an_interval_past_a_limit_is_told(limits, reaches):
    assert ("reaches past the limit" in printed(solved(limits=limits))) == reaches


def test_a_better_measured_candidate_is_told():
    better = MeasuredCandidate("cccccccccccc", "onnxruntime", figures("measured", 0.2, 0.5), False)
    assert "loses no more" in printed(solved(within=(better,)))
    assert "loses no more" not in printed(solved())


def test_what_is_not_known_is_said():
    text = printed(solved(proven=False, gap=0.004, predicted=figures("estimated", 0.25, None)))
    assert "Too few candidates" in text and "0.0040" in text and "proven)" not in text
    assert row(text, "drop").rstrip().endswith("-")
    untrusted = printed(solved(measured=figures("measured", 0.3, trusted=False)))
    assert "the machine was busy" in untrusted and "x [3.17, 3.50]*" in untrusted


def test_everything_fits_100_columns():
    long = "openvino-with-a-very-long-label-that-somebody-chose"
    figure = figures("measured", 12345.678, 100.0, trusted=False)
    within = tuple(
        MeasuredCandidate(f"{i}bbbbbbbbbbb@{long}", long, figure, True) for i in range(5)
    )
    limits = Limits(12345.6, 12.34, 123_456_789, 12_345_678)
    found = solved(
        limits=limits, runtime=long, candidate=f"{solved().plan.hash}@{long}", measured=figure,
        predicted=figures("estimated", 12345.678, 100.0), within=within,
        run=Path("/a/long/path") / ("folder" * 12),
    )  # fmt: skip
    text = printed(found)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(f"{i}bbbbbbbbbbb" in text for i in range(5))


def test_limits_are_said_with_their_units():
    text = limits_text(Limits(0.5, 3.0, 98_700, 1_210_000))
    assert text == (
        "latency at most 0.500 ms, speed-up at least 3.00x, file at most 98.7 kB, "
        "coded file at most 1.21 MB"
    )
