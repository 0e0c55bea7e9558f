from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

from autocompress.errors import ConfigError, RunFolderError
from autocompress.report.columns import read_front
from autocompress.report.hand_out import hand_out, read_card
from autocompress.report.pick import Choice, Limits, pick


@pytest.fixture
def choice(run: Path) -> Choice:
    return pick(read_front(run), Limits(max_drop=1.0))


def test_model_and_card(run: Path, choice: Choice, tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    model = hand_out(run, choice, out)
    assert model == out / "bent.onnx"
    assert model.read_bytes() == (run / "artifacts" / "bent.onnx").read_bytes()
    card = json.loads((out / "bent.json").read_text())
    assert card["version"] == 2 and card["model"] == "bent.onnx"
    assert card["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert card["plan"] == [{"target": "conv1", "technique": "filter_prune", "pruning_ratio": 0.5}]
    speed = card["figures"]["speedup"]
    assert speed["ci_low"] < speed["value"] < speed["ci_high"] and speed["source"] == "measured"
    assert card["figures"]["latency_ms"]["unit"] == "ms"
    assert card["figures"]["drop_test_pp"]["value"] == pytest.approx(0.8)
    assert card["device"]["cpu_model"] == "Test CPU"
    assert card["run_with"]["settings"]["graph_optimization"] == "all"
    assert card["run_with"]["threads"] == 1
    assert card["reason"] == choice.reason
    assert read_card(out / "bent.json").name == "bent"
    assert sorted(path.name for path in out.iterdir()) == ["bent.json", "bent.onnx"]


def test_the_card_says_the_unit_of_a_drop(
    run: Path, own_front: pd.DataFrame, choice: Choice, tmp_path: Path
) -> None:
    own = hand_out(run, pick(own_front, Limits(max_drop=0.01)), tmp_path / "own")
    for model, start in ((own, "of the metric"), (hand_out(run, choice, tmp_path), "percentage")):
        figure = read_card(model.with_suffix(".json")).figures["drop_test_pp"]
        assert figure.unit.startswith(start)


def test_original_has_an_empty_plan(run: Path, tmp_path: Path) -> None:
    model = hand_out(run, pick(read_front(run), Limits(max_drop=0.0)), tmp_path / "out")
    assert read_card(model.with_suffix(".json")).plan == ()


def test_another_model_is_not_overwritten(run: Path, choice: Choice, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = hand_out(run, choice, out)
    assert hand_out(run, choice, out) == model
    model.write_bytes(b"another")
    card = (out / "bent.json").read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        hand_out(run, choice, out)
    assert model.read_bytes() == b"another"
    assert (out / "bent.json").read_bytes() == card


def test_nothing_is_written_when_the_run_lacks_something(
    run: Path, choice: Choice, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (run / "plans" / "hashbent.json").write_text("{")
    with pytest.raises(RunFolderError, match="plan"):
        hand_out(run, choice, out)
    (run / "device.json").unlink()
    with pytest.raises(RunFolderError, match="device"):
        hand_out(run, choice, out)
    (run / "artifacts" / "bent.onnx").unlink()
    with pytest.raises(RunFolderError, match="not in the run folder"):
        hand_out(run, choice, out)
    assert not out.exists()


def test_out_must_be_a_folder(run: Path, choice: Choice, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        hand_out(run, choice, tmp_path / "file")


def test_names_are_safe_file_names(run: Path, choice: Choice, tmp_path: Path) -> None:
    odd = Choice({**choice.row, "candidate": "../a b/c"}, choice.reason)
    assert hand_out(run, odd, tmp_path / "out") == tmp_path / "out" / "a-b-c.onnx"


def test_a_card_must_be_a_card(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"version": 1}')
    with pytest.raises(ConfigError, match="card"):
        read_card(tmp_path / "card.json")
