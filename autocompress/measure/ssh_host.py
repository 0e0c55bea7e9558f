"""`SshHost`: a machine that measures at the other end of `ssh`, such as a Raspberry Pi."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, NoReturn, final

from autocompress.device import DeviceProfile, MachineFacts, RemoteSettings
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.arrays import content_name, file_key, plain_name
from autocompress.measure.child import Setup
from autocompress.measure.host_interface import Host
from autocompress.measure.process import ChildProcess

# A dead connection is noticed after half a minute, and nobody is asked for a password.
_OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
)
_SSH_FAILED = 255
_COMMAND_LIMIT_S = 900.0
_FACTS_LIMIT_S = 120.0
# Only files of this name are ever deleted there: the folder may hold others.
_PREFIX = "autocompress-"
_KEPT_DAYS = 14
_ABOUT = (
    "import json; from importlib import metadata; from autocompress.device import usable_cores; "
    "print(json.dumps([metadata.version('autocompress'), usable_cores()]))"
)
_INSTALL = "pip install 'autocompress'"


@final
class SshHost(Host):
    """A machine that `ssh` reaches without a password, with autocompress of the same version.

    Every file goes there once per content and stays for later workers; what has not been sent or
    used for two weeks is deleted when the next one starts. A child there ends when the connection
    does. Relative paths, and those that begin with `~/`, are relative to the home folder there.

    Args:
        profile: the device.
        remote: where it is.
    """

    here = False

    def __init__(self, profile: DeviceProfile, remote: RemoteSettings) -> None:
        # There, the device is the local machine.
        self._profile = profile.model_copy(update={"remote": None})
        self._host = remote.host
        self._python = remote.python.removeprefix("~/")
        self._folder = _folder(remote.folder)
        self._token = uuid.uuid4().hex[:12]
        self._names: dict[tuple[str, int, int], str] = {}
        self._sure: set[str] = set()
        self._listed: frozenset[str] | None = None

    def start(
        self, module: str, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> ChildProcess:
        """Start a child that ends with the connection.

        Raises:
            DeviceError: there is no program `ssh` here.
        """
        # Modules in the home folder, where the child starts, may shadow libraries.
        variables = {"PYTHONSAFEPATH": "1", **(environment or {})}
        settings = [f"{name}={value}" for name, value in variables.items()]
        run = [self._python, "-m", module, Setup(0, self._profile).to_json()]
        # `exec`: the child's parent must be the ssh server, whose end ends the child.
        command = f"exec {shlex.join(['env', *settings, *run])}"
        try:
            return ChildProcess(self._ssh(command), scratch, {})
        except FileNotFoundError as cause:
            self._no_ssh(cause)

    def put(self, path: Path) -> str:
        """Send a file, unless one of the same content has been sent; its path there.

        Raises:
            DeviceError: the host does not answer, or its folder cannot be written to.
            MeasurementError: the ONNX file cannot be read, or keeps weights in other files.
        """
        path = path.resolve()
        key = file_key(path)
        if key not in self._names:
            name = f"{_PREFIX}{content_name(path)}"
            if name not in self._sure:
                self._send(path, name)
            self._names[key] = name
            self._sure.add(name)
        return f"{self._folder}/{self._names[key]}"

    def result(self, path: Path) -> str:
        """A path in the host's folder that belongs to this object and `path` alone."""
        self._list()
        place = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
        name = f"{_PREFIX}result-{self._token}-{place}{plain_name(path.suffix)}"
        return f"{self._folder}/{name}"

    def fetch(self, path: Path) -> None:
        """Bring a result here, whole or not at all, and delete it there.

        Raises:
            DeviceError: the host does not answer, or has no such result.
        """
        there = shlex.quote(self.result(path))
        with tempfile.NamedTemporaryFile(
            prefix=".unfinished-", suffix=path.suffix, dir=path.parent, delete=False
        ) as file:
            partial = Path(file.name)
            try:
                self._run(f"cat {there} && rm -f {there}", "A result", output=file)
                file.close()
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def facts(self, scratch: Path) -> MachineFacts:
        """What the host says of itself, after a check that it runs the same autocompress.

        Raises:
            DeviceError: the host does not answer, lacks autocompress or has another version, or
                lacks what the profile asks for.
        """
        cores = self._checked_cores()
        child = self.start("autocompress.measure.worker", scratch)
        try:
            answer = child.ask({"operation": "facts"}, _FACTS_LIMIT_S)
        except (DeviceError, MeasurementError) as cause:
            raise DeviceError(
                f"On {self._host}: {cause.what}",
                given=cause.given,
                allowed=cause.allowed,
                advice=f"on {self._host}: {cause.advice}" if cause.advice else None,
            ) from cause
        finally:
            child.stop()
            child.remove_stderr()
        # The child was pinned before it looked, so it saw its own cores only.
        return MachineFacts.model_validate({**answer, "cores": cores})

    def _checked_cores(self) -> list[int]:
        """The cores that the host gives, after a check of its autocompress."""
        command = shlex.join(["env", "PYTHONSAFEPATH=1", self._python, "-c", _ABOUT])
        done, here = self._call(command), metadata.version("autocompress")
        if done.returncode:
            raise DeviceError(
                f"The device's Python has no autocompress: {_last_line(done.stderr)}",
                given=f"host {self._host}, python {self._python}",
                allowed=f"an interpreter there that imports autocompress {here}",
                advice=f"there: {_INSTALL}; or name the interpreter in `remote.python`",
            )
        try:
            version, cores = json.loads(done.stdout)
        except ValueError as cause:
            raise DeviceError(
                "The device's shell prints text of its own.",
                given=f"{done.stdout.decode('utf-8', 'replace').strip()!r} from {self._host}",
                allowed="nothing but the output of the command that ssh is given",
                advice="let the shell's start-up files there print only if it is interactive",
            ) from cause
        if version != here:
            raise DeviceError(
                "The device has another version of autocompress than this machine.",
                given=f"{version} on {self._host}",
                allowed=f"{here}, as here",
                advice=f"there: pip install 'autocompress=={here}'",
            )
        return list(cores)

    def _list(self) -> frozenset[str]:
        """Names of the files in the host's folder when first asked; old ones are deleted."""
        if self._listed is None:
            folder = shlex.quote(self._folder)
            old = (
                f"find {folder} -type f -name '{_PREFIX}*' -mtime +{_KEPT_DAYS} -exec rm -f {{}} +"
            )
            what = "The device's folder"
            done = self._run(f"mkdir -p {folder} && {{ {old}; ls -1 {folder}; }}", what)
            self._listed = frozenset(done.stdout.decode("utf-8", "replace").split())
        return self._listed

    def _send(self, path: Path, name: str) -> None:
        there = shlex.quote(f"{self._folder}/{name}")
        # Touched, so that it is not deleted as old; and another process may just have done that.
        if name in self._list() and not self._call(f"test -f {there} && touch {there}").returncode:
            return
        _refuse_other_files(path)
        partial = shlex.quote(f"{self._folder}/{name}.{self._token}.part")
        with path.open("rb") as file:
            self._run(f"cat > {partial} && mv -f {partial} {there}", f"{path}", data=file)

    def _run(
        self,
        command: str,
        what: str,
        *,
        data: IO[bytes] | None = None,
        output: IO[bytes] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command there that must not fail; `what` names the file that it is about."""
        done = self._call(command, data, output)
        if done.returncode:
            raise DeviceError(
                f"{what} cannot be written or read on the device: {_last_line(done.stderr)}",
                given=f"folder {self._folder} on {self._host}",
                advice="see that `remote.folder` can be written to and its disk is not full",
            )
        return done

    def _call(
        self, command: str, data: IO[bytes] | None = None, output: IO[bytes] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command there; its exit status is the caller's to check."""
        # Users' shells there may be others than sh.
        line = f"exec {shlex.join(['sh', '-c', command])}"
        try:
            done = subprocess.run(
                self._ssh(line),
                stdin=data or subprocess.DEVNULL,
                stdout=output or subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=_COMMAND_LIMIT_S,
                check=False,
            )
        except FileNotFoundError as cause:
            self._no_ssh(cause)
        except subprocess.TimeoutExpired as cause:
            raise self._unreachable(f"no end after {_COMMAND_LIMIT_S:g} s") from cause
        if done.returncode == _SSH_FAILED:
            raise self._unreachable(_last_line(done.stderr))
        return done

    def _ssh(self, command: str) -> list[str]:
        return ["ssh", *_OPTIONS, self._host, command]

    def _unreachable(self, message: str) -> DeviceError:
        return DeviceError(
            f"The device cannot be reached: {message}",
            given=f"host {self._host}",
            allowed="a host that ssh reaches without asking for a password",
            advice=f"make `ssh {self._host} true` work: switch it on, and give it your public key",
        )

    def _no_ssh(self, cause: FileNotFoundError) -> NoReturn:
        raise DeviceError(
            "This machine has no program `ssh`, which remote devices need.",
            given=f"host {self._host}",
            advice="install an OpenSSH client, or take `remote` out of the device profile",
        ) from cause


def _folder(text: str) -> str:
    """A folder that no command takes for an option."""
    text = text.removeprefix("~/").rstrip("/")
    return text if text.startswith("/") else f"./{text}"


def _refuse_other_files(path: Path) -> None:
    if path.suffix != ".onnx":
        return
    # Imported here, for the child of a local device needs no onnx.
    from autocompress.measure.any_file import open_model

    if any(len(tensor.external_data) for tensor in open_model(path).graph.initializer):
        raise MeasurementError(
            "The ONNX file keeps weights in other files, which are not sent to a remote device.",
            given=path,
            allowed="a file that holds its weights itself (up to 2 GiB)",
            advice="save it by onnx.save(onnx.load(path), new_path)",
        )


def _last_line(text: bytes) -> str:
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
