"""Folders that go with their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.search.cluster.own_folder import NODE, TUNE, WORKSHOP, OwnFolder, tidy

_CHILD = """
import sys
from autocompress.search.cluster.own_folder import OwnFolder
own = OwnFolder(sys.argv[1])
(own.path / "file").write_text("kept")
print(own.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_it_is_there_until_it_is_removed_and_removing_twice_is_no_error() -> None:
    own = OwnFolder(NODE)
    (own.path / "file").write_text("content")
    tidy()
    assert (own.path / "file").read_text() == "content"
    own.remove()
    own.remove()
    assert not own.path.exists()


def test_it_goes_with_its_object() -> None:
    own = OwnFolder(WORKSHOP)
    path = own.path
    del own
    assert not path.exists()


@pytest.mark.parametrize("kind", [NODE, WORKSHOP, TUNE])
@pytest.mark.parametrize("clean", [OwnFolder, lambda kind: tidy()], ids=["next", "tidy"])
def test_what_a_killed_process_left_is_deleted(
    kind: str, clean: Callable[[str], object], temporary: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    assert left.parent == temporary
    OwnFolder(kind)
    assert (left / "file").is_file()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert left.is_dir()
    clean(kind)
    assert not left.exists()


def test_other_folders_are_left_alone(temporary: Path) -> None:
    other = temporary / "autocompress-other"
    other.mkdir()
    (temporary / f"autocompress-{NODE}-link").symlink_to(other)
    tidy()
    assert other.is_dir()
