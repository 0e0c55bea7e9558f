from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from autocompress.errors import RunFolderError
from autocompress.search import paying_levels
from autocompress.search.paying_levels import keep_paying_levels
from autocompress.search.prepare import Options, prepare
from autocompress.search.progress import Silent
from autocompress.search.thin import Thinned


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def stage(self, name: str, total: int | None = None, *, limit_s: float | None = None) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def show_front(self, frame: object, objectives: object) -> None:
        pass

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def claimed(tiny_experiment, tmp_path, monkeypatch):
    """A prepared search whose table says that the strongest level of one parameter does not pay."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepared = prepare(tiny_experiment(), Options(run=tmp_path / "run"), Silent())
    first = prepared.space.parameters[0]

    def thin(space, graph, variants, table, profile):
        left = type(first)(first.stage, first.target, first.decisions[:-1])
        return Thinned(type(space)((left, *space.parameters[1:])), ("the last is no faster",))

    monkeypatch.setattr(paying_levels, "thin_space", thin)
    monkeypatch.setattr(paying_levels, "find_variants", lambda *_: ())
    with prepared.folder.claim(prepared.identity):
        yield prepared


def with_table(monkeypatch) -> None:
    monkeypatch.setattr(paying_levels, "Table", lambda entries: [1])


def test_without_a_table_nothing_is_left_out(claimed):
    assert keep_paying_levels(claimed, Silent()).space == claimed.space


def test_levels_that_do_not_pay_are_left_out_and_named(claimed, monkeypatch):
    with_table(monkeypatch)
    notes = Notes()
    kept = keep_paying_levels(claimed, notes).space
    first, before = kept.parameters[0], claimed.space.parameters[0]
    assert first.decisions == before.decisions[:-1]
    assert kept.parameters[1:] == claimed.space.parameters[1:]
    assert "the last is no faster" in notes.texts[0]


def test_what_was_decided_stays_though_the_table_changes(claimed, monkeypatch):
    with_table(monkeypatch)
    kept = keep_paying_levels(claimed, Silent()).space
    monkeypatch.setattr(paying_levels, "Table", lambda entries: [])
    assert keep_paying_levels(claimed, Silent()).space == kept


def test_a_study_that_was_begun_keeps_its_space(claimed, monkeypatch):
    with_table(monkeypatch)
    (claimed.folder.path / "study.sqlite3").write_bytes(b"")
    assert keep_paying_levels(claimed, Silent()).space == claimed.space


def test_where_bytes_count_every_level_stays(claimed, monkeypatch):
    with_table(monkeypatch)
    bytes_too = SimpleNamespace(objectives=("metric", "latency", "file_bytes"))
    monkeypatch.setattr(paying_levels, "latency_alone", lambda names: "file_bytes" not in names)
    object.__setattr__(claimed, "experiment", bytes_too)
    assert keep_paying_levels(claimed, Silent()).space == claimed.space


def test_a_damaged_file_is_refused(claimed):
    (claimed.folder.path / "dropped_levels.json").write_text(json.dumps({"what": 1}))
    with pytest.raises(RunFolderError, match="cannot be read"):
        keep_paying_levels(claimed, Silent())
