from __future__ import annotations

import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pandas as pd
import pytest
import yaml
from tiny_workload import QUICK_PROFILE

import autocompress
from autocompress import cli
from autocompress.cli import main
from autocompress.workload import load_workload, network_outputs

HERE = Path(__file__).resolve().parent
COMMAND = [sys.executable, "-m", "autocompress"]


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process: starting PyTorch anew takes seconds."""

    def run(*arguments) -> Result:
        monkeypatch.setattr(sys, "argv", ["autocompress", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run


def in_a_process(*arguments, cwd=None):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny search: the run folder, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "quick.yaml").write_text(yaml.safe_dump(QUICK_PROFILE))
    experiment = folder / "tiny.yaml"
    experiment.write_text(yaml.safe_dump({
        "version": 1, "name": "tiny", "workload": f"{HERE / 'tiny_workload.py'}:workload",
        "device": "./quick.yaml", "search_space": "cnn",
        "objectives": ["metric", "latency", "file_bytes", "peak_memory"],
        "search": {"trials": 6, "finalists": 3},
    }))  # fmt: skip
    result = in_a_process("search", experiment, "--run", folder / "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_search_prints_a_front_that_fits_100_columns(finished):
    _, result = finished
    assert all(len(line) <= 100 for line in result.stdout.splitlines()[:-3])
    for word in ("original", "stock_int8", "speed-up", "ms"):
        assert word in result.stdout
    assert "search: " in result.stderr


def test_the_run_folder_holds_what_it_should(finished):
    folder, _ = finished
    run = folder / "run"
    frame = pd.read_csv(run / "front.csv")
    assert set(frame["role"]) == {"original", "stock_int8", "candidate", "finalist"}
    assert len(frame) == 8
    assert frame["candidate"].is_unique
    assert frame[frame["role"] == "finalist"]["metric_test"].notna().all()
    for name in ("experiment.yaml", "device.json", "study.sqlite3", "bank", "plans"):
        assert (run / name).exists(), name
    assert all((run / path).is_file() for path in frame["artifact"])
    sizes = [(run / path).stat().st_size for path in frame["artifact"]]
    assert sizes == frame["file_bytes"].tolist()


def test_front_as_json_prints_the_same_rows(finished, call):
    folder, _ = finished
    result = call("front", folder / "run", "--json")
    rows = json.loads(result.stdout)
    frame = pd.read_csv(folder / "run" / "front.csv")
    assert [row["candidate"] for row in rows] == frame["candidate"].tolist()
    assert list(rows[0]) == list(frame.columns)


def test_a_picked_model_scores_what_its_card_says(finished, call):
    folder, _ = finished
    result = call("pick", folder / "run", "--knee", "--out", folder / "picked")
    assert result.returncode == 0, result.stderr
    (card_path,) = (folder / "picked").glob("*.json")
    card = json.loads(card_path.read_text())
    session = ort.InferenceSession(str(card_path.with_name(card["model"])))
    workload = load_workload(f"{HERE / 'tiny_workload.py'}:workload")
    inputs = workload.test_split.inputs
    name = session.get_inputs()[0].name
    found = session.run(None, {name: inputs[0].numpy()})[0].argmax(1)
    wanted = network_outputs(workload.network, inputs)[0].argmax(1)
    assert np.isclose((found == wanted).mean(), card["figures"]["metric_test"]["value"])


def test_a_container_gives_the_file_back_and_a_session(finished, call, tmp_path):
    folder, _ = finished
    model = folder / "run" / "artifacts" / "stock_int8.onnx"
    container, again = tmp_path / "small.acz", tmp_path / "again.onnx"
    told = call("encode", model, "--out", container)
    assert told.returncode == 0 and "times smaller" in told.stdout
    assert all(len(line) <= 100 for line in told.stdout.splitlines()[:-1])
    assert call("decode", container, "--out", again).returncode == 0
    assert again.read_bytes() == model.read_bytes()
    x = np.zeros((1, 3, 8, 8), np.float32)
    one, other = autocompress.load_coded(container), ort.InferenceSession(str(model))
    name = other.get_inputs()[0].name
    assert np.array_equal(one.run(None, {name: x})[0], other.run(None, {name: x})[0])


def test_a_damaged_container_is_refused_and_leaves_nothing(finished, call, tmp_path):
    folder, _ = finished
    container = tmp_path / "small.acz"
    call("encode", folder / "run" / "artifacts" / "stock_int8.onnx", "--out", container)
    container.write_bytes(container.read_bytes()[:-7])
    refused(call("decode", container, "--out", tmp_path / "again.onnx"), "malformed")
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.slow
def test_download_bytes_are_an_objective(call, tiny_experiment, tmp_path):
    path = tiny_experiment(search_space="download", objectives=["metric", "download_bytes"])
    result = call("search", path, "--run", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    frame = pd.read_csv(tmp_path / "run" / "front.csv")
    assert frame["download_bytes"].notna().all()
    assert (frame["download_bytes"] <= 1.05 * frame["file_bytes"]).all()


def test_a_space_that_trains_needs_a_train_split(call, tiny_experiment, tmp_path):
    module = tmp_path / "untrained.py"
    module.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from dataclasses import replace\n"
        "import tiny_workload\n"
        "def workload():\n"
        "    return replace(tiny_workload.workload(), train=None)\n"
    )
    path = tiny_experiment(workload=f"{module}:workload", search_space="cnn_trained")
    refused(call("search", path, "--run", tmp_path / "run"), "train", "recover")


def test_solving_without_a_limit_or_a_run_is_refused(call, tmp_path):
    refused(call("solve", tmp_path), "--max-latency-ms", "--max-download-bytes")
    refused(call("solve", tmp_path, "--min-speedup", "2"), "no models")
    assert list(tmp_path.iterdir()) == []


def test_nothing_fits_is_exit_code_1_and_names_the_nearest(finished, call):
    folder, _ = finished
    result = call("pick", folder / "run", "--min-speedup", "900", "--out", folder / "none")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert not (folder / "none").exists()


def test_a_finished_search_has_nothing_to_do_and_can_be_extended(finished, call):
    folder, _ = finished
    before = (folder / "run" / "front.csv").read_bytes()
    again = call("search", folder / "tiny.yaml", "--run", folder / "run")
    assert again.returncode == 0, again.stderr
    assert (folder / "run" / "front.csv").read_bytes() == before
    more = call("search", folder / "tiny.yaml", "--run", folder / "run", "--trials", "7")
    assert more.returncode == 0, more.stderr
    frame = pd.read_csv(folder / "run" / "front.csv")
    assert len(frame) == 9
    before_rows = pd.read_csv(io.BytesIO(before)).set_index("candidate")
    judged = before_rows[before_rows["role"] == "finalist"].index
    assert frame.set_index("candidate").loc[judged, "metric_test"].notna().all()


def test_a_run_of_another_seed_is_refused(finished, call):
    folder, _ = finished
    result = call("search", folder / "tiny.yaml", "--run", folder / "run", "--seed", "5")
    refused(result, "another experiment", "seed", "--run")


def test_python_gives_the_same_front(finished):
    folder, _ = finished
    front = autocompress.search(folder / "tiny.yaml", run=folder / "run", trials=6)
    table = front.table()
    saved = pd.read_csv(folder / "run" / "front.csv")
    assert table["candidate"].tolist() == saved["candidate"].tolist()
    assert list(table.columns) == list(saved.columns)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "blue"}, ("colour", "unknown key")),
        ({"workload": "nowhere.py:workload"}, ("nowhere.py", "does not exist")),
        ({"workload": f"{HERE / 'tiny_workload.py'}:raises"}, ("moon", "raises")),
        ({"workload": f"{HERE / 'tiny_workload.py'}:absent"}, ("absent", "make_network")),
        ({"workload": f"{HERE / 'tiny_workload.py'}:untraceable"}, ("Untraceable", "export")),
        ({"device": "toaster"}, ("toaster", "cpu")),
        ({"search_space": "everything"}, ("everything", "cnn")),
        ({"objectives": ["beauty"]}, ("objectives", "metric")),
        ({"search": {"seed": 0}}, ("no limit", "--trials")),
        ({"search": {"trials": 5, "seed": -1}}, ("seed",)),
    ],
)
def test_bad_experiments_are_exit_code_2_and_leave_nothing(
    call, tiny_experiment, tmp_path, changes, words
):
    path = tiny_experiment(**changes)
    refused(call("search", path, "--run", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_an_interrupt_is_exit_code_130_and_says_how_to_go_on(monkeypatch, capsys):
    # What newer versions of Typer return for an interrupt.
    monkeypatch.setattr(cli.program, "app", lambda **_: 130)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert "goes on from here" in capsys.readouterr().err


def test_a_runtime_that_is_not_installed_is_refused(call, tiny_experiment, tmp_path):
    path = tiny_experiment(profile={"runtimes": [{"name": "tensorrt"}]})
    result = call("search", path, "--run", tmp_path / "run")
    refused(result, "tensorrt", "pip install 'autocompress[tensorrt]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("search", "missing.yaml"), "missing.yaml"),
        (("front", "missing"), "missing"),
        (("pick", "missing", "--out", "x", "--knee"), "missing"),
        (("profile", "toaster"), "toaster"),
        (("encode", "missing.onnx"), "missing.onnx"),
        (("decode", "missing.acz"), "missing.acz"),
    ],
)
def test_missing_files_are_exit_code_2(call, arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(*arguments), word)
    assert not list(tmp_path.iterdir())


def test_options_are_checked_like_the_file(call, tiny_experiment):
    refused(call("search", tiny_experiment(), "--seed", "-1"), "seed")
    refused(call("search", tiny_experiment(), "--trials", "0"), "trials")


@pytest.mark.slow
def test_the_shortest_time_still_gives_a_front(call, tiny_experiment, tmp_path):
    result = call("search", tiny_experiment(), "--time", "1s", "--run", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    roles = pd.read_csv(tmp_path / "run" / "front.csv")["role"].tolist()
    assert sorted(roles) == ["finalist", "original", "stock_int8"]


def test_time_must_be_a_duration(call, tiny_experiment):
    refused(call("search", tiny_experiment(), "--time", "soon"), "soon", "10m")


def test_debug_shows_the_traceback():
    result = in_a_process("search", "missing.yaml", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_help_has_an_example_for_every_command(call):
    for command in ("search", "front", "pick", "profile", "encode", "decode"):
        result = call(command, "--help")
        assert result.returncode == 0
        assert "Example: autocompress" in result.stdout


@pytest.mark.faults
def test_ten_kills_at_random_moments_lose_and_double_nothing(tiny_experiment, tmp_path):
    path, run = tiny_experiment(), tmp_path / "run"
    arguments = [*COMMAND, "search", str(path), "--run", str(run), "--trials", "30"]
    chance = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(chance.uniform(5, 15))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    frame = pd.read_csv(run / "front.csv")
    assert frame["candidate"].is_unique
    assert len(frame) == 32
    with sqlite3.connect(run / "study.sqlite3") as database:
        kept = database.execute(
            "select count(*) from trial_user_attributes where key = 'evaluation'"
        ).fetchone()[0]
    assert kept == 30


def test_inspect_says_what_can_be_changed_and_writes_nothing(call, tiny_experiment, tmp_path):
    experiment = tiny_experiment()
    before = sorted(tmp_path.rglob("*"))
    result = call("inspect", experiment)
    assert result.returncode == 0, result.stderr
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    for word in ("Conv2d", "filter_prune", "low_rank", "precision", "output", "becomes part of"):
        assert word in result.stdout, word
    data = json.loads(call("inspect", experiment, "--json").stdout)
    assert [row["name"] for row in data["modules"]] == ["0", "1", "3", "4", "8"]
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_looks_at_a_network_that_cannot_be_exported(call, tiny_experiment):
    experiment = tiny_experiment(workload=f"{HERE / 'tiny_workload.py'}:untraceable")
    result = call("inspect", experiment)
    assert result.returncode == 0, result.stderr
    assert "A search refuses this network" in result.stdout
    assert "Linear" in result.stdout
