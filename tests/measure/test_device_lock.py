from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from autocompress.errors import DeviceError
from autocompress.measure import lock
from autocompress.measure.lock import core_keys, hold

ROOT = Path(lock.__file__).parents[2]
HOLDER = """
import sys, time
from autocompress.measure.lock import hold
with hold(sys.argv[1:], 5):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def key() -> Iterator[str]:
    name = f"test-{uuid.uuid4()}"
    yield name
    (lock.lock_folder() / f"{name}.lock").unlink(missing_ok=True)


@pytest.fixture
def holder(key: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, key], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_lock_names_its_holder(key: str, holder: subprocess.Popen[str]) -> None:
    calls = []
    with pytest.raises(DeviceError) as caught, hold([key], 0.2, lambda: calls.append(1)):
        pytest.fail("two processes hold one lock")
    assert str(holder.pid) in str(caught.value) and calls


def test_the_lock_ends_with_a_killed_holder(key: str, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    with hold([key], 5):
        pass


def test_it_can_be_taken_again_and_an_error_releases_it(key: str) -> None:
    with pytest.raises(RuntimeError), hold([key], 0):
        raise RuntimeError
    with hold([key, key], 0):
        pass


def test_overlapping_cores_exclude_each_other() -> None:
    assert core_keys((3, 1, 3)) == ("core-1", "core-3")
    assert set(core_keys((1,))) & set(core_keys((0, 1)))
