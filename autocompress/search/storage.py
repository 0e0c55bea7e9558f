"""Where a run's study is kept: SQLite in its folder, a database, or Optuna's gRPC proxy.

`storage.json` in the run folder names the place; without it the study is in the folder itself. A
study moves as a whole: its trials are copied, then the file names the new place.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from autocompress.errors import ConfigError, RunFolderError
from autocompress.files import write_json
from autocompress.search.patience import Patience

STUDY_NAME = "autocompress"
_FILE, _DATABASE = "storage.json", "study.sqlite3"
_GRPC = "grpc"
# PostgreSQL without a driver's name means psycopg 3.
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_SQLITE_WAIT_S, _CONNECT_WAIT_S = 60, 10
ALLOWED = "postgresql://USER@HOST/DATABASE, another SQLAlchemy URL, or grpc://HOST:PORT"


@final
@dataclass(frozen=True)
class StudyPlace:
    """A study in a storage.

    Attributes:
        url: of the storage, as SQLAlchemy or `grpc://HOST:PORT` has it.
        study: its name there; several runs may share a storage.
    """

    url: str
    study: str = STUDY_NAME

    @property
    def shown(self) -> str:
        """The URL without its password."""
        if self.url.startswith(f"{_GRPC}://"):
            return self.url
        return make_url(self.url).render_as_string(hide_password=True)

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of this machine."""
        return self.url.startswith("sqlite")


def own_place(folder: Path) -> StudyPlace:
    """The SQLite file in a run folder."""
    return StudyPlace(f"sqlite:///{folder / _DATABASE}")


def place_of(folder: Path) -> StudyPlace:
    """Where the study of a run folder is.

    Raises:
        RunFolderError: the folder's own note of it cannot be read.
    """
    path = folder / _FILE
    if not path.is_file():
        return own_place(folder)
    try:
        return StudyPlace(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as cause:
        raise RunFolderError(
            f"The run folder does not say where its study is: {cause}", given=path
        ) from cause


def has_study(folder: Path) -> bool:
    """Whether a search has begun a study in a run folder, or elsewhere for it."""
    return (folder / _FILE).is_file() or (folder / _DATABASE).is_file()


def settle(folder: Path, url: str | None, note: Callable[[str], None]) -> StudyPlace:
    """Where the study of a run folder is from now on; it is moved there if it is elsewhere.

    Args:
        folder: claimed by this process.
        url: of a storage, `folder` for the SQLite file in the folder, or None for where it is.
        note: told of a move.

    Raises:
        ConfigError: the URL is none.
        RunFolderError: one of the storages cannot be opened.
    """
    now = place_of(folder)
    wanted = now if url is None else _wanted(folder, url)
    if _same(now, wanted):
        # The URL given may hold the password, which the folder does not keep.
        return StudyPlace(wanted.url, now.study)
    if has_study(folder):
        count = _copy(now, wanted)
        note(f"the study of {count} trials was moved from {now.shown} to {wanted.shown}")
    write_json(folder / _FILE, {**asdict(wanted), "url": _without_password(wanted.url)})
    return wanted


def open_storage(place: StudyPlace) -> BaseStorage:
    """Connect to a storage.

    Raises:
        ConfigError: a driver is not installed.
        RunFolderError: it cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if place.url.startswith(f"{_GRPC}://"):
            return _proxy(place.url)
        if place.is_sqlite:
            return _sqlite(place.url)
        wait = {"connect_timeout": _CONNECT_WAIT_S} if place.url.startswith("postgresql") else {}
        # Connections that the server has closed meanwhile are noticed before they are used.
        return RDBStorage(place.url, engine_kwargs={"pool_pre_ping": True, "connect_args": wait})
    except ImportError as cause:
        raise ConfigError(
            f"The storage needs a package that is not installed: {cause}",
            given=place.shown,
            advice="pip install 'autocompress[postgresql]', or the driver that the URL names",
        ) from cause
    except Exception as cause:
        # Whatever the database layer raises, there is no study to be had.
        raise RunFolderError(
            f"The study cannot be opened: {cause}",
            given=place.shown,
            allowed=ALLOWED,
            advice="start the database, correct --storage, or give another folder with --run",
        ) from cause


def is_away(error: BaseException) -> bool:
    """Whether an error says that the storage does not answer, or has no place left, for now."""
    kinds: tuple[type[BaseException], ...] = (StorageInternalError, SQLAlchemyError, OSError)
    return isinstance(error, kinds) or type(error).__module__.startswith("grpc")


@final
@dataclass(frozen=True)
class Storage:
    """A study's place, and the patience with it."""

    place: StudyPlace
    patience: Patience = field(default_factory=lambda: patience_with_storage())


def patience_with_storage(note: Callable[[str], None] = lambda text: None) -> Patience:
    """Patience with a database that does not answer, or whose disk is full.

    Args:
        note: told when the waiting begins and ends.
    """
    return Patience(is_away, "the study's storage", note=note)


def storage_of(folder: Path) -> Storage:
    """Where the study of a run folder is, with the usual patience.

    Raises:
        RunFolderError: as `place_of`.
    """
    return Storage(place_of(folder))


def _wanted(folder: Path, url: str) -> StudyPlace:
    # A name of its own: many runs may share a database, and a study may come back to its folder.
    name = f"{STUDY_NAME}-{folder.name}-{uuid.uuid4().hex[:8]}"
    if url == "folder":
        return replace(own_place(folder), study=name)
    scheme = url.partition("://")[0]
    if scheme == _GRPC:
        _host_and_port(url)
    else:
        try:
            url = make_url(url).set(drivername=_DRIVERS.get(scheme, scheme)).render_as_string(False)
        except ArgumentError as cause:
            raise ConfigError(
                "The storage's address cannot be read.", given=url, allowed=ALLOWED
            ) from cause
    return StudyPlace(url, name)


def _same(one: StudyPlace, other: StudyPlace) -> bool:
    return _without_password(one.url) == _without_password(other.url)


def _without_password(url: str) -> str:
    if url.startswith(f"{_GRPC}://"):
        return url
    parts = make_url(url)
    # `set` leaves a password as it is when it is None.
    return parts._replace(password=None).render_as_string(hide_password=False)


def _copy(source: StudyPlace, target: StudyPlace) -> int:
    """Copy a study; how many trials it has."""
    here, there = open_storage(source), open_storage(target)
    optuna.copy_study(
        from_study_name=source.study,
        from_storage=here,
        to_storage=there,
        to_study_name=target.study,
    )
    return there.get_n_trials(there.get_study_id_from_name(target.study))


def _host_and_port(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix(f"{_GRPC}://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError("The storage's address cannot be read.", given=url, allowed=ALLOWED)
    return host, int(port)


def _proxy(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    host, port = _host_and_port(url)
    proxy = GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=_CONNECT_WAIT_S)
    return proxy


def _sqlite(url: str) -> RDBStorage:
    wait = {"connect_args": {"timeout": _SQLITE_WAIT_S}}
    storage = RDBStorage(url, engine_kwargs=wait)
    event.listen(storage.engine, "connect", _write_ahead)
    # Connections that were opened before do not write ahead.
    storage.engine.dispose()
    return storage


def _write_ahead(connection: Any, _: object) -> None:
    # A commit then survives a kill of this process without waiting for the disk.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
