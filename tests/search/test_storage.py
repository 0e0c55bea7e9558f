"""Where a study is kept, how it moves, and what happens while its storage is away."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from autocompress.errors import ConfigError, RunFolderError
from autocompress.search.patience import Patience
from autocompress.search.record import TrialRecord
from autocompress.search.storage import (
    Storage,
    has_study,
    is_away,
    own_place,
    place_of,
    settle,
    storage_of,
)

DIRECTIONS = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)


def fill(storage: Storage, count: int) -> None:
    record = TrialRecord(storage, DIRECTIONS)
    for number in range(count):
        params, distributions = {"p": number}, {"p": IntDistribution(0, 99)}
        trial = record.begin(params, distributions, {"candidate": f"c{number}"})
        if number % 3 == 0:
            record.finish(trial, TrialState.COMPLETE, [0.9, 0.1 * number], {"evaluation": "text"})
        elif number % 3 == 1:
            record.finish(trial, TrialState.FAIL, None, {"failure": "it crashed"})


def content(storage: Storage) -> list[tuple]:
    return [
        (t.number, t.state, t.params, t.values, t.user_attrs)
        for t in TrialRecord(storage, DIRECTIONS).trials()
    ]


def no_note(text: str) -> None:
    raise AssertionError(text)


def test_a_study_is_in_its_folder_unless_told_otherwise(tmp_path: Path) -> None:
    assert not has_study(tmp_path)
    assert settle(tmp_path, None, no_note) == own_place(tmp_path) == place_of(tmp_path)
    assert settle(tmp_path, "folder", no_note) == own_place(tmp_path)
    fill(storage_of(tmp_path), 1)
    assert has_study(tmp_path)


def test_a_study_moves_as_a_whole_and_back(tmp_path: Path) -> None:
    """Finished, failed and open trials, in order, with all that is known of them."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere.sqlite3"
    folder.mkdir()
    fill(storage_of(folder), 7)
    before, notes = content(storage_of(folder)), []
    url = f"sqlite:///{elsewhere}"
    place = settle(folder, url, notes.append)
    assert content(Storage(place)) == before
    assert place == place_of(folder)
    assert len(notes) == 1 and "7 trials" in notes[0] and str(elsewhere) in notes[0]
    # Called again it is where it belongs.
    assert settle(folder, url, no_note) == place == settle(folder, None, no_note)
    TrialRecord(Storage(place), DIRECTIONS).begin({"p": 8}, {"p": IntDistribution(0, 99)}, {})
    # The old study is still in the folder's file, and is not gone on with.
    settle(folder, "folder", notes.append)
    assert place_of(folder).url == own_place(folder).url
    assert content(storage_of(folder))[:7] == before
    assert len(content(storage_of(folder))) == 8


def test_runs_that_share_a_database_do_not_meet(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    for name, count in (("one", 2), ("other", 5)):
        (tmp_path / name).mkdir()
        fill(Storage(settle(tmp_path / name, url, no_note)), count)
    assert len(content(storage_of(tmp_path / "one"))) == 2
    assert len(content(storage_of(tmp_path / "other"))) == 5


def test_a_folder_keeps_no_password(tmp_path: Path) -> None:
    url = "postgresql://me:secret@host.example:5432/studies"
    place = settle(tmp_path, url, no_note)
    assert place.url == "postgresql+psycopg://me:secret@host.example:5432/studies"
    assert "secret" not in place.shown
    assert "secret" not in (tmp_path / "storage.json").read_text()
    assert place_of(tmp_path).url == "postgresql+psycopg://me@host.example:5432/studies"
    # Given again it is the same place, now with its password.
    again = settle(tmp_path, url, no_note)
    assert again == place


@pytest.mark.parametrize("url", ["grpc://host", "grpc://:13000", "grpc://host:port", "nonsense"])
def test_addresses_that_cannot_be_read_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        settle(tmp_path, url, no_note)
    assert "grpc://HOST:PORT" in str(caught.value)
    assert not (tmp_path / "storage.json").exists()


def test_what_cannot_be_opened_is_refused_and_the_study_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fill(storage_of(folder), 3)
    before = content(storage_of(folder))
    with pytest.raises(RunFolderError, match="cannot be opened"):
        settle(folder, f"sqlite:///{tmp_path}/no/such/folder/study.sqlite3", no_note)
    assert place_of(folder) == own_place(folder)
    assert content(storage_of(folder)) == before
    (folder / "storage.json").write_text("{")
    with pytest.raises(RunFolderError, match="does not say where"):
        place_of(folder)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def patient(note: Callable[[str], None], *arguments: Any, **options: Any) -> Patience:
    return Patience(is_away, "the storage", 60.0, note, *arguments, **options)


def away() -> Exception:
    return OperationalError("INSERT", {}, Exception("connection refused"))


@given(st.integers(0, 40))
def test_patience_ends_with_the_storage_or_the_limit(times: int) -> None:
    clock, notes, calls = Clock(), [], []
    patience = patient(notes.append, clock, clock.pause)

    def call() -> str:
        calls.append(clock.now)
        if len(calls) <= times:
            raise away()
        return "written"

    try:
        result = patience(call)
    except OperationalError:
        assert 60.0 < clock.now < 70.0
        assert len(notes) == 1
        return
    assert result == "written" and len(calls) == times + 1
    assert len(notes) == (2 if times else 0)
    # Not in a hurry, and never long out of touch.
    gaps = [b - a for a, b in pairwise(calls)]
    assert all(0.1 < gap < 5.001 for gap in gaps)


def test_other_errors_are_no_matter_of_patience() -> None:
    def call() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError):
        patient(no_note)(call)


def test_a_trial_is_finished_once_though_answers_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    storage = Storage(own_place(tmp_path), patient(lambda _: None, clock, clock.pause))
    record = TrialRecord(storage, DIRECTIONS)
    trial = record.begin({"p": 1}, {"p": IntDistribution(0, 9)}, {})
    real, lost = record._storage.set_trial_state_values, []

    def written_but_not_told(*args: object) -> bool:
        result = real(*args)
        if not lost:
            lost.append(True)
            raise StorageInternalError("the connection was closed")
        return result

    monkeypatch.setattr(record._storage, "set_trial_state_values", written_but_not_told)
    record.finish(trial, TrialState.COMPLETE, [0.5, 0.5], {"evaluation": "text"})
    assert lost
    (found,) = record.trials()
    assert (found.state, found.values) == (TrialState.COMPLETE, [0.5, 0.5])


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    """A real refusal: another connection holds the write lock until it is told to let go."""
    blocker = sqlite3.connect(tmp_path / "study.sqlite3", timeout=0, check_same_thread=False)

    def let_go(seconds: float) -> None:
        blocker.rollback()

    place = own_place(tmp_path)
    notes: list[str] = []
    record = TrialRecord(Storage(place, patient(notes.append, pause=let_go)), DIRECTIONS)
    with record._storage.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 1")
    blocker.execute("BEGIN IMMEDIATE")
    record.begin({"p": 1}, {"p": IntDistribution(0, 9)}, {"candidate": "c"})
    assert [t.user_attrs["candidate"] for t in record.trials()] == ["c"]
    assert len(notes) == 2
