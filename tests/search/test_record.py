from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autocompress.device import load_profile
from autocompress.errors import RunFolderError
from autocompress.search.history import read_history
from autocompress.search.record import JudgedLog, TrialRecord
from autocompress.search.space import Parameter, Space
from autocompress.search.storage import storage_of
from autocompress.search.study import Sampling, Study
from autocompress.techniques import Stage
from autocompress.techniques.filter_prune import FilterPrune

DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
SPACE = Space(
    tuple(
        Parameter(Stage.PRUNE, name, tuple(FilterPrune(pruning_ratio=r) for r in (0.3, 0.6)))
        for name in ("a", "b", "c")
    )
)


def open_study(folder: Path) -> Study:
    sampling = Sampling("random", 0)
    return Study(folder, SPACE, load_profile("cpu"), ("metric", "latency"), sampling)


def begin(record: TrialRecord, value: int) -> int:
    return record.begin({"p": value}, {"p": IntDistribution(0, 9)}, {"candidate": f"c{value}"})


def test_trials_are_read_back_in_the_order_in_which_they_were_begun(tmp_path: Path) -> None:
    record = TrialRecord(storage_of(tmp_path), DIRECTIONS)
    ids = [begin(record, value) for value in (4, 2, 7)]
    record.finish(ids[1], TrialState.COMPLETE, [0.9, 0.5], {"evaluation": "text"})
    record.finish(ids[0], TrialState.FAIL, None, {"failure": "it does not export"})
    # Another object, as after a kill.
    trials = TrialRecord(storage_of(tmp_path), DIRECTIONS).trials()
    assert [t.user_attrs["candidate"] for t in trials] == ["c4", "c2", "c7"]
    assert [t.params for t in trials] == [{"p": 4}, {"p": 2}, {"p": 7}]
    assert [t.state for t in trials] == [
        TrialState.FAIL, TrialState.COMPLETE, TrialState.RUNNING
    ]  # fmt: skip
    assert trials[1].values == [0.9, 0.5]
    assert trials[1].user_attrs["evaluation"] == "text"
    assert trials[0].user_attrs["failure"] == "it does not export"


def test_the_database_writes_ahead(tmp_path: Path) -> None:
    """Every connection of the record has it: a commit does not wait for the disk."""
    record = TrialRecord(storage_of(tmp_path), DIRECTIONS)
    begin(record, 1)
    with sqlite3.connect(tmp_path / "study.sqlite3") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with record._storage.engine.connect() as own:
        raw: Any = own.connection
        assert raw.execute("PRAGMA synchronous").fetchone() == (1,)


def test_a_finished_trial_is_on_disk_though_nothing_is_closed(tmp_path: Path) -> None:
    """What a kill leaves: the files as they are while the record is open."""
    record = TrialRecord(storage_of(tmp_path), DIRECTIONS)
    record.finish(begin(record, 3), TrialState.COMPLETE, [0.9, 0.5], {})
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tmp_path.glob("study.sqlite3*"):
        (copy / file.name).write_bytes(file.read_bytes())
    (trial,) = TrialRecord(storage_of(copy), DIRECTIONS).trials()
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [0.9, 0.5]


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.sqlite3").write_bytes(b"no database" * 500)
    with pytest.raises(RunFolderError, match="cannot be opened"):
        TrialRecord(storage_of(tmp_path), DIRECTIONS)
    with pytest.raises(RunFolderError, match="cannot be opened"):
        read_history(tmp_path)


def test_lines_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    assert list(JudgedLog(path).lines()) == []
    log = JudgedLog(path)
    lines = [{"number": i, "text": 'ä\n"quoted"'} for i in range(3)]
    for line in lines:
        log.append(line)
        # On disk at once.
        assert json.loads(path.read_bytes().splitlines()[-1]) == line
    assert list(log.lines()) == lines == list(JudgedLog(path).lines())


@pytest.mark.parametrize("cut", [1, 4, 9, 15])
def test_a_cut_line_is_passed_over_and_swallows_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "judged.jsonl"
    JudgedLog(path).append({"number": 0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number":1,"a":"\xc3\xa4"}\n'[:cut])
    again = JudgedLog(path)
    again.append({"number": 2})
    assert list(again.lines()) == [{"number": 0}, {"number": 2}]


def test_lines_that_are_no_objects_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    path.write_bytes(b'12\n[1]\n\n\xff\xfe\n{"number": 5}\n')
    assert list(JudgedLog(path).lines()) == [{"number": 5}]


def test_a_history_is_what_the_study_wrote_in_the_order_of_time(
    tmp_path: Path, make_evaluation: Any
) -> None:
    study = open_study(tmp_path)
    first, second, third, fourth = (study.propose() for _ in range(4))
    assert first and second and third and fourth
    for proposal in (first, second, third):
        study.start(proposal)
    # Finished in another order than begun.
    for proposal, at in ((second, 3.5), (first, 7.25)):
        found = make_evaluation(proposal.candidate, 0.8, 2.0, plan=proposal.plan)
        study.succeed(proposal, found, at)
    study.fail(third, "it does not export")
    study.keep_judgement(fourth, {"loss": 0.1}, 8.0)
    study.set_aside(fourth)
    trained = make_evaluation("trained", 0.85, 3.0)
    study.keep_trained(trained, 30.0)
    history = read_history(tmp_path)
    assert [(at, e.candidate) for at, e in history] == [
        (3.5, second.candidate), (7.25, first.candidate), (30.0, "trained")
    ]  # fmt: skip
    assert history[2][1] == trained
    # A call that goes on adds to it.
    again = open_study(tmp_path)
    proposal = again.propose()
    assert proposal
    again.succeed(proposal, make_evaluation(proposal.candidate, 0.7, 4.0), 12.0)
    assert [at for at, _ in read_history(tmp_path)] == [3.5, 7.25, 12.0, 30.0]


def test_reading_a_history_needs_a_study_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no study"):
        read_history(tmp_path)
    assert not list(tmp_path.iterdir())
