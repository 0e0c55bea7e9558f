from __future__ import annotations

import json
from dataclasses import replace

import pytest
from explain_models import ONNXRUNTIME, Rounded, chain, node

from autocompress.measure.explain.explanation import (
    Explanation,
    Profiled,
    Speed,
    explain_profiles,
    kernel_tile,
)
from autocompress.measure.explain.graph import graph_of

BEFORE = Profiled(
    graph_of(chain((16, 16))), (node("Conv", 1.0, ["conv0"], kernel="CPU nchwc"),), 1.0
)
SLOWER = Speed(1.0, 1.25, 0.8, 0.79, 0.81)


def explained(speed: Speed, *, integers: bool, before: Profiled = BEFORE) -> Explanation:
    operator, kind = ("QLinearConv", "uint8") if integers else ("Conv", "float32")
    rounded = graph_of(Rounded(read_by="" if integers else "Tanh").model())
    nodes = (node(operator, speed.candidate_ms, ["layer"], kind=kind),)
    after = Profiled(rounded, nodes, speed.candidate_ms)
    return explain_profiles("plan", ONNXRUNTIME, before, after, speed, 16)


def test_a_slower_candidate_is_told_its_main_cause() -> None:
    told = explained(SLOWER, integers=False)
    assert told.verdict.startswith("Slower: 0.80 x")
    assert "Main cause: Quantized in the file, run in float32: 1 layer (l)" in told.verdict
    assert "Tanh reads it in float" in told.verdict


def test_the_verdict_is_the_paired_measurements_not_the_profiles() -> None:
    # The profile's sum is 1.25 ms against 1.0 ms; the measurement says faster.
    speed = Speed(2.0, 1.25, 1.6, 1.5, 1.7)
    before = replace(BEFORE, latency_ms=2.0)
    told = explained(speed, integers=True, before=before)
    assert told.verdict.startswith("Faster: 1.60 x the original's speed [1.50, 1.70]")


def test_an_interval_around_one_is_neither_faster_nor_slower() -> None:
    told = explained(Speed(1.0, 1.0, 1.0, 0.99, 1.01), integers=True)
    assert told.verdict.startswith("No faster: 1.00 x")
    assert "includes 1" in told.verdict


def test_what_gains_most_is_named_for_a_faster_candidate() -> None:
    told = explained(Speed(1.0, 0.25, 4.0, 3.9, 4.1), integers=True)
    assert "Most is gained by l0 (0.75 ms)." in told.verdict


def test_the_runtimes_own_share_is_told() -> None:
    before = replace(BEFORE, latency_ms=0.5)
    told = explained(Speed(1.0, 0.4, 2.5, 2.4, 2.6), integers=True, before=before)
    assert told.runtime_speedup == 2.0
    assert "The runtime alone makes the original 2.00 x as fast." in told.verdict


def test_findings_are_ordered_by_stake_and_the_floor_comes_last() -> None:
    nodes = (
        node("QuantizeLinear", 0.2, ["x_q"], output="uint8"),
        node("DequantizeLinear", 0.2, ["x_dq"], kind="uint8", output="float32"),
        node("Conv", 1.0, ["layer"]),
        node("Tanh", 0.6, ["reader"]),
    )
    graph = graph_of(Rounded(read_by="Tanh").model())
    speed = Speed(1.0, 2.0, 0.5, 0.49, 0.51)
    after = Profiled(graph, nodes, 2.0)
    told = explain_profiles("plan", ONNXRUNTIME, BEFORE, after, speed, 16)
    assert [f.kind for f in told.findings] == ["float_fallback", "conversions", "outside_layers"]


def test_notes_say_what_was_done_to_the_times_and_what_is_missing() -> None:
    graph = graph_of(chain((16, 16, 16)))
    after = Profiled(graph, (node("Conv", 2.0, ["conv0"]),), 1.0)
    speed = Speed(1.0, 1.0, 1.0, 0.9, 1.1, reason="too few rounds")
    notes = explain_profiles("plan", ONNXRUNTIME, BEFORE, after, speed, 16).notes
    assert any("too few rounds" in note for note in notes)
    assert any("+0% (original) and +100% (candidate)" in note for note in notes)
    assert any("no node for 1 layer of the candidate (l1)" in note for note in notes)


def test_an_explanation_is_plain_json() -> None:
    data = json.loads(json.dumps(explained(SLOWER, integers=False).to_dict()))
    assert data["findings"][0]["kind"] == "float_fallback"
    assert data["layers"][0]["layer"] == "l0"
    assert sum(data["time_ms"]["candidate"].values()) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("multiple", "flags", "tile"),
    [(8, ("avx2", "avx512f"), 16), (1, ("avx2",), 8), (32, ("avx512f",), 32), (4, (), 4)],
)
def test_the_kernels_step_is_the_registers_or_the_profiles(
    multiple: int, flags: tuple[str, ...], tile: int
) -> None:
    assert kernel_tile(multiple, flags) == tile
