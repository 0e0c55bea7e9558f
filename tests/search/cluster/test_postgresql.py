"""A real PostgreSQL: runs move into it and out of it, and wait for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autocompress.search.history import read_history
from autocompress.search.prepare import Options
from autocompress.search.run import run_search
from autocompress.search.storage import has_study, place_of

DIGITS = Path(__file__).parents[3] / "experiments" / "digits.yaml"
PORT = 54761
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not BINARIES, reason="needs PostgreSQL's server (apt: postgresql)"),
]


class Server:
    """A server of its own in a folder; as root it runs as the user `postgres`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "data"
        self._log = folder / "log.txt"
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        self._run("initdb", "-D", str(self.folder), "-U", "tester", "-A", "trust")

    def start(self) -> None:
        options = f"-p {PORT} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run(
            "pg_ctl", "-D", str(self.folder), "-l", str(self._log), "-o", options, "-w", "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder), "-m", "immediate", "-w", "stop")

    @property
    def url(self) -> str:
        return f"postgresql://tester@127.0.0.1:{PORT}/postgres"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(BINARIES[-1] / program), *arguments]
        if os.geteuid() == 0:
            command = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                *command,
            ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder.parent)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = Path(os.path.realpath("/tmp")) / f"autocompress-postgresql-{os.getpid()}"
    folder.mkdir()
    made = Server(folder)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)


def names(run: Path) -> list[str]:
    return [e.candidate for _, e in read_history(run)] if has_study(run) else []


def search(*options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "autocompress", "search", str(DIGITS), *options]
    return subprocess.Popen(command, start_new_session=True)


def killed_after(evaluations: int, run: Path, *options: str) -> list[str]:
    """The names that a search has finished when all of its processes are killed at once."""
    running = search("--run", str(run), "--trials", "200", *options)
    try:
        deadline = time.monotonic() + 300
        while len(names(run)) < evaluations:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(1)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    return names(run)


def test_a_killed_run_goes_on_with_the_other_engine_in_a_database_and_back(
    server: Server, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    local = killed_after(8, run)
    clustered = killed_after(len(local) + 8, run, "--engine", "ray", "--storage", server.url)
    assert place_of(run).url.startswith("postgresql+psycopg://")
    assert clustered[: len(local)] == local
    # Without being told again it goes on in the database, with the other engine.
    again = killed_after(len(clustered) + 8, run, "--engine", "local")
    assert again[: len(clustered)] == clustered
    total = len(again) + 4
    ended = search("--run", str(run), "--trials", str(total), "--storage", "folder")
    assert ended.wait(300) == 0
    server.stop()
    found = names(run)
    assert found[: len(again)] == again
    assert len(set(found)) == len(found) == total
    server.start()


def test_a_database_that_is_away_for_a_while_loses_nothing(
    server: Server, tiny_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    experiment, run = tiny_experiment(), tmp_path / "run"
    (tmp_path / "run").mkdir()
    gone: list[float] = []

    def interrupt() -> None:
        while len(list((run / "artifacts").glob("*.onnx"))) < 8:
            time.sleep(0.1)
        server.stop()
        gone.append(time.monotonic())
        time.sleep(20)
        server.start()

    thread = threading.Thread(target=interrupt)
    thread.start()
    run_search(experiment, Options(run=run, trials=20, storage=server.url))
    thread.join()
    assert gone
    assert len(set(names(run))) == len(names(run)) == 20
