"""The parent's half of the protocol: start a child, ask it with a time limit, tell why it died."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.child import Setup

_CHUNK = 1 << 16
_TAIL_LINES = 8
_TAIL_BYTES = 4000
_END_S = 5.0


@final
class ChildProcess:
    """A running child that speaks the protocol of `child.serve`.

    Args:
        command: the program and its arguments.
        scratch: folder for the file that keeps the child's standard error.
        environment: variables set for the program on top of this process's own.
    """

    def __init__(
        self, command: Sequence[str], scratch: Path, environment: Mapping[str, str]
    ) -> None:
        handle, name = tempfile.mkstemp(prefix="stderr-", suffix=".txt", dir=scratch)
        self._stderr = Path(name)
        self._asked_at = 0
        self._pending = b""
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=handle,
                env={**os.environ, **environment},
                # Ctrl-C in a terminal is the parent's to handle.
                start_new_session=True,
            )
        finally:
            os.close(handle)

    @staticmethod
    def local(
        module: str, setup: Setup, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> ChildProcess:
        """Start a child on this machine.

        Args:
            module: the module that the child runs.
            setup: what the child is told on its command line.
            scratch: as above.
            environment: variables set for the child on top of this process's own.
        """
        command = [sys.executable, "-m", module, setup.to_json()]
        return ChildProcess(command, scratch, {**_importable(), **(environment or {})})

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], silence_s: float) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            request: JSON-ready fields.
            silence_s: how long the child may say nothing before it counts as hung.

        Raises:
            DeviceError: the child found the device profile impossible on this machine.
            MeasurementError: the request failed, or the child crashed or hung. In the latter
                cases, and on an interrupt, the child has been ended.
        """
        assert self._process.stdin is not None
        self._asked_at = self._stderr.stat().st_size
        model = _named_models(request)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            while True:
                line = self._read_line(silence_s)
                if "alive" not in line:
                    break
        except TimeoutError as cause:
            self.stop()
            raise MeasurementError(
                f"The model hung: no sign of life for {silence_s:g} s. {self._last_words()}",
                given=model,
                advice="if it is only slow, raise `measuring.hang_limit_s` in the device profile",
            ) from cause
        except (EOFError, OSError, ValueError) as cause:
            raise self._crash(model) from cause
        # An unread answer would be taken for the next request's.
        except BaseException:
            self.stop()
            raise
        if "error" in line:
            raise _error(line["error"])
        answer: dict[str, Any] = line["answer"]
        return answer

    def stop(self) -> None:
        """End the child; the file of its standard error stays."""
        if self.running:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    # A request that the child never read is flushed in vain.
                    continue

    def remove_stderr(self) -> None:
        """Delete the file of the child's standard error."""
        self._stderr.unlink(missing_ok=True)

    def _read_line(self, silence_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + silence_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                chunk = os.read(self._process.stdout.fileno(), _CHUNK)
                if not chunk:
                    raise EOFError
                self._pending += chunk
        text, _, self._pending = self._pending.partition(b"\n")
        line: dict[str, Any] = json.loads(text)
        return line

    def _crash(self, model: object) -> MeasurementError:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        how, advice = _ending(code)
        what = f"The worker {how} while it measured. {self._last_words()}"
        return MeasurementError(what, given=model, advice=advice)

    def _last_words(self) -> str:
        try:
            with self._stderr.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._asked_at, size - _TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            text = ""
        lines = [line for line in text.splitlines() if line.strip()][-_TAIL_LINES:]
        return "It last said: " + " | ".join(lines) if lines else "It said nothing."


def _named_models(request: Mapping[str, Any]) -> object:
    """What a request is about, for its errors."""
    sides = [request[side] for side in ("baseline", "candidate") if side in request]
    return request.get("model") or ", ".join(side["model"] for side in sides) or None


def _importable() -> dict[str, str]:
    """Variables that put the folder of this package first on the import path."""
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, known]) if known else root
    # A user's working folder may hold modules that shadow libraries.
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _ending(code: int | None) -> tuple[str, str]:
    if code is None:
        return "closed its output", "see its last words"
    if code >= 0:
        return f"ended with exit status {code}", "see its last words"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGKILL:
        return f"was killed by {name}", "often the kernel's out-of-memory killer: free some memory"
    return f"was killed by {name}", "the runtime crashed on this model: try another export of it"


def _error(fields: Mapping[str, Any]) -> DeviceError | MeasurementError:
    kind = DeviceError if fields["kind"] == "device" else MeasurementError
    return kind(
        fields["what"], given=fields["given"], allowed=fields["allowed"], advice=fields["advice"]
    )
