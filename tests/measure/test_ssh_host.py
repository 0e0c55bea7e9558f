"""Remote devices, through a stand-in for `ssh` that runs commands in another folder."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from measuring import Models, make_profile, of

import autocompress
from autocompress.device import (
    DeviceProfile,
    RemoteSettings,
    load_profile,
    local_facts,
    make_fingerprint,
)
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.client import Worker
from autocompress.measure.host import LocalHost, host_of
from autocompress.measure.memory import peak_memory
from autocompress.measure.ssh_host import SshHost

ROOT = Path(autocompress.__file__).parents[1]
# As ssh does: options, the host, then one text for the user's shell, in the home folder. Commands
# and process ids are noted in the log; the shell's children are its own, as the server's are.
STAND_IN = """#!/bin/sh
while :; do case "$1" in -o) shift 2;; -*) shift;; *) break;; esac; done
host="$1"; shift
if [ "$host" = pi@nowhere ]; then
  echo 'Warning: something' >&2
  echo 'ssh: connect to host nowhere port 22: No route to host' >&2
  exit 255
fi
cd {home} && export HOME={home} PYTHONPATH={path}
printf '%s' {noise}
sh -c 'echo "$$ $1" >> "$2"; eval "$1"' sh "$*" {log}
"""


@dataclass(frozen=True)
class Pi:
    """The stand-in's machine: its home folder, and what it was asked."""

    home: Path
    log: Path
    program: Path

    def become(self, path: Path = ROOT, noise: str = "''") -> None:
        names = {"home": self.home, "log": self.log, "path": path}
        texts = {name: shlex.quote(str(value)) for name, value in names.items()}
        self.program.write_text(STAND_IN.format(**texts, noise=noise))
        self.program.chmod(0o755)

    @property
    def folder(self) -> Path:
        return self.home / ".cache/autocompress/remote"

    @property
    def commands(self) -> list[tuple[int, str]]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [(int(line.split()[0]), line.partition(" ")[2]) for line in lines]

    def sent(self) -> int:
        return sum("cat > " in command for _, command in self.commands)

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pi:
    # A space in every path: what is not quoted fails.
    base = tmp_path / "the pi"
    (base / "home").mkdir(parents=True)
    (base / "bin").mkdir()
    made = Pi(base / "home", base / "log", base / "bin" / "ssh")
    made.become()
    monkeypatch.setenv("PATH", f"{base / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return made


def remote(
    profile: DeviceProfile, host: str = "pi@pi", python: str = sys.executable
) -> DeviceProfile:
    return profile.model_copy(update={"remote": RemoteSettings(host=host, python=python)})


@pytest.fixture
def worker(pi: Pi, profile: DeviceProfile, tmp_path: Path) -> Iterator[Worker]:
    with Worker(remote(profile), tmp_path / "scratch") as made:
        yield made


def host(profile: DeviceProfile, **changes: str) -> SshHost:
    made = host_of(remote(profile, **changes))
    assert isinstance(made, SshHost)
    return made


def gone(pid: int, within_s: float = 5) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def there(pi: Pi, path: str) -> Path:
    return pi.home / path


def test_a_worker_measures_through_ssh_as_it_does_here(
    pi: Pi, worker: Worker, profile: DeviceProfile, models: Models, split: list[np.ndarray],
    tmp_path: Path,
) -> None:  # fmt: skip
    with Worker(profile, tmp_path / "here") as here:
        expected = here.predict(of(models.two_outputs()), split, 8)
        assert worker.fingerprint == here.fingerprint
        assert worker.cores == here.cores
    outputs = worker.predict(of(models.two_outputs()), split, 8)
    for found, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    pair = worker.compare(of(models.dense(256)), of(models.dense(32)), split, seed=0)
    assert pair.speedup > 0
    assert pair.device == make_fingerprint(profile, local_facts(profile)).id
    nodes = worker.profile(of(models.dense(32)), split, 3)
    assert {node.operator for node in nodes} >= {"MatMul"}
    # Three models and a split.
    assert pi.sent() == len(pi.files()) == 4


@pytest.mark.slow
def test_memory_is_measured_through_ssh(
    pi: Pi, profile: DeviceProfile, models: Models, split: list[np.ndarray]
) -> None:
    found = peak_memory(of(models.dense(4096)), split, remote(profile))
    # The weights: 16 * 4096 * 2 floats.
    assert found.resident_bytes > 16 * 4096 * 2 * 4


@pytest.mark.slow
def test_predict_leaves_only_what_was_put(
    pi: Pi, worker: Worker, models: Models, split: list[np.ndarray]
) -> None:
    worker.predict(of(models.dense(32)), split, 8)
    worker.predict(of(models.dense(32)), split, 8)
    names = sorted(name.partition("-")[2].partition("-")[2] for name in pi.files())
    assert names[0] == "dense-32.onnx"
    assert len(names) == 2 and names[1].startswith("inputs-")


def test_a_content_is_sent_once_whatever_its_path_time_and_host(
    pi: Pi, profile: DeviceProfile, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.npz", tmp_path / "b" / "a.npz"
    second.parent.mkdir()
    for path in (first, second):
        path.write_bytes(b"same")
    one = host(profile)
    path = one.put(first)
    assert there(pi, path).read_bytes() == b"same"
    calls = len(pi.commands)
    assert one.put(first) == path
    assert len(pi.commands) == calls
    os.utime(first, (1, 1))
    assert one.put(first) == one.put(second) == path
    os.utime(there(pi, path), (time.time() - 9e5,) * 2)
    assert host(profile).put(second) == path
    assert pi.sent() == 1
    # Used anew, it is not deleted as old.
    assert there(pi, path).stat().st_mtime > time.time() - 60


def test_files_of_one_name_do_not_collide(pi: Pi, profile: DeviceProfile, tmp_path: Path) -> None:
    path, sender = tmp_path / "it's a model.npz", host(profile)
    paths = []
    for content in (b"first", b"other"):
        path.write_bytes(content)
        os.utime(path, ns=(len(paths), len(paths)))
        paths.append(sender.put(path))
    assert [there(pi, each).read_bytes() for each in paths] == [b"first", b"other"]


def test_a_file_that_another_process_deleted_is_sent_again(
    pi: Pi, profile: DeviceProfile, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"a")
    place, sender = there(pi, host(profile).put(path)), host(profile)
    # It reads once which files are there.
    sender.result(tmp_path / "any.npz")
    place.unlink()
    assert there(pi, sender.put(path)) == place
    assert place.read_bytes() == b"a"


def test_only_our_own_old_files_are_deleted(pi: Pi, profile: DeviceProfile, tmp_path: Path) -> None:
    pi.folder.mkdir(parents=True)
    old = [pi.folder / "autocompress-0123-old.onnx", pi.folder / "somebody's.txt"]
    young = pi.folder / "autocompress-0123-young.onnx"
    for path in (*old, young):
        path.write_text("text")
    for path in old:
        os.utime(path, (1, 1))
    host(profile).result(tmp_path / "any.npz")
    assert pi.files() == {"somebody's.txt", "autocompress-0123-young.onnx"}


def test_a_result_comes_back_whole_and_leaves_nothing(
    pi: Pi, profile: DeviceProfile, tmp_path: Path
) -> None:
    made, target = host(profile), tmp_path / "out.npz"
    place = there(pi, made.result(target))
    assert place != there(pi, made.result(tmp_path / "other.npz"))
    assert place != there(pi, host(profile).result(target))
    place.write_bytes(bytes(range(256)) * 5000)
    made.fetch(target)
    assert target.read_bytes() == bytes(range(256)) * 5000
    assert not pi.files()
    before = set(tmp_path.iterdir())
    target.unlink()
    with pytest.raises(DeviceError, match="No such file"):
        made.fetch(target)
    assert set(tmp_path.iterdir()) == before - {target}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "closed"])
def test_the_child_ends_with_the_connection(
    pi: Pi, worker: Worker, models: Models, split: list[np.ndarray], how: str
) -> None:
    worker.predict(of(models.dense(32)), split, 8)
    child = [pid for pid, command in pi.commands if "measure.worker" in command][-1]
    assert worker.pid is not None and child != worker.pid
    assert not gone(child, 0.05)
    if how == "cut":
        os.kill(worker.pid, signal.SIGKILL)
        assert gone(child)
        # The next request connects anew.
        assert len(worker.predict(of(models.dense(32)), split, 8)) == 1
    else:
        worker.close()
        assert gone(child)


@pytest.mark.slow
def test_a_bad_model_is_a_failed_measurement(
    pi: Pi, worker: Worker, models: Models, split: list[np.ndarray]
) -> None:
    with pytest.raises(MeasurementError, match="no readable ONNX file"):
        worker.predict(of(models.corrupt()), split, 8)
    # This one is found out over there.
    with pytest.raises(MeasurementError, match="first axis must be the batch"):
        worker.predict(of(models.without_batch()), split, 8)
    assert len(worker.predict(of(models.dense(32)), split, 8)) == 1


def test_weights_in_other_files_are_refused(
    pi: Pi, profile: DeviceProfile, models: Models, tmp_path: Path
) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(
        onnx.load(models.dense(256)), path, save_as_external_data=True, location="w.bin",
        size_threshold=0,
    )  # fmt: skip
    with pytest.raises(MeasurementError, match="other files"):
        host(profile).put(path)
    assert not pi.files()


def test_an_unreachable_host_is_named(pi: Pi, profile: DeviceProfile, tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        Worker(remote(profile, host="pi@nowhere"), tmp_path)
    assert "No route to host" in caught.value.what
    assert "pi@nowhere" in str(caught.value.given)
    assert "ssh pi@nowhere true" in str(caught.value.advice)
    path = tmp_path / "a.npz"
    path.write_bytes(b"a")
    with pytest.raises(DeviceError, match="No route to host"):
        host(profile, host="pi@nowhere").put(path)


@pytest.mark.parametrize("lack", ["package", "interpreter"])
def test_a_host_without_the_package_is_told_what_to_install(
    pi: Pi, profile: DeviceProfile, tmp_path: Path, lack: str
) -> None:
    python = sys.executable
    if lack == "package":
        broken = tmp_path / "broken" / "autocompress"
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("raise ImportError('No module named autocompress')")
        pi.become(broken.parent)
    else:
        python = "/no/such/python"
    with pytest.raises(DeviceError, match="no autocompress") as caught:
        host(profile, python=python).facts(tmp_path)
    assert "autocompress" in str(caught.value.advice)
    assert python in str(caught.value.given)


def test_another_version_is_refused_with_both_named(
    pi: Pi, profile: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version("autocompress")
    monkeypatch.setattr(metadata, "version", lambda name: "99.9")
    with pytest.raises(DeviceError, match="another version") as caught:
        host(profile).facts(tmp_path)
    assert installed in str(caught.value.given)
    assert "99.9" in str(caught.value.allowed)


def test_a_shell_that_talks_is_refused(pi: Pi, profile: DeviceProfile, tmp_path: Path) -> None:
    pi.become(noise="'Welcome! '")
    with pytest.raises(DeviceError, match="prints text of its own") as caught:
        host(profile).facts(tmp_path)
    assert "Welcome!" in str(caught.value.given)


@pytest.mark.slow
def test_what_the_host_lacks_is_said_of_the_host(
    pi: Pi, lacking_profile: DeviceProfile, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match=r"On pi@pi: .*not installed"):
        host(lacking_profile).facts(tmp_path)
    beyond = make_profile().model_copy(update={"cores": (4096,)})
    with pytest.raises(DeviceError, match=r"On pi@pi: .*cores"):
        host(beyond).facts(tmp_path)
    assert not list(tmp_path.glob("stderr-*"))


def test_without_ssh_the_error_says_so(
    profile: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="no program `ssh`"):
        host(profile).facts(tmp_path)
    with pytest.raises(DeviceError, match="no program `ssh`"):
        host(profile).start("autocompress.measure.worker", tmp_path)


def test_home_is_where_relative_paths_begin(pi: Pi, profile: DeviceProfile, tmp_path: Path) -> None:
    (pi.home / "my python").symlink_to(sys.executable)
    settings = RemoteSettings(host="pi@pi", python=sys.executable, folder="~/-kept here/")
    path = tmp_path / "a.npz"
    path.write_bytes(b"a")
    sender = host_of(profile.model_copy(update={"remote": settings}))
    assert there(pi, sender.put(path)).parent == pi.home / "-kept here"


def test_the_profile_says_which_host(profile: DeviceProfile) -> None:
    assert isinstance(host_of(profile), LocalHost)
    assert isinstance(host_of(load_profile("raspberry_pi_5")), SshHost)
