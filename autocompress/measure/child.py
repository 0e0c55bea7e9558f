"""The child's half of the protocol: one JSON request per line in, one JSON answer per line out."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO, final

from autocompress.device import RuntimeSettings
from autocompress.errors import AutocompressError, DeviceError

Request = dict[str, Any]
Beat = Callable[[], None]
Handler = Callable[[Request, Beat], dict[str, Any]]

_BEAT_S = 1.0
_PR_SET_PDEATHSIG = 1


@final
@dataclass(frozen=True)
class Setup:
    """What a child is told on its command line, as JSON."""

    parent: int
    runtime: RuntimeSettings
    cores: tuple[int, ...]

    def to_json(self) -> str:
        """The setup as one line of JSON."""
        runtime = self.runtime.model_dump(mode="json")
        return json.dumps({"parent": self.parent, "runtime": runtime, "cores": self.cores})

    @staticmethod
    def from_json(text: str) -> Setup:
        """Read back what `to_json` wrote."""
        data = json.loads(text)
        runtime = RuntimeSettings.model_validate(data["runtime"])
        return Setup(data["parent"], runtime, tuple(data["cores"]))


def serve(make_handler: Callable[[Setup], Handler]) -> None:
    """Answer requests until standard input ends or the parent dies.

    A line of the answer stream is `{"alive": true}` (between steps of a long request),
    `{"answer": ...}` or `{"error": ...}`.

    Args:
        make_handler: called once, after the process has been pinned.
    """
    channel = _private_stdout()
    setup = Setup.from_json(sys.argv[1])
    _die_with(setup.parent)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    handler: Handler | None = None
    while True:
        request = json.loads(requests.get())
        try:
            if handler is None:
                _pin(setup.cores)
                handler = make_handler(setup)
            line = {"answer": handler(request, _Heartbeat(channel))}
        # Whatever a runtime raises about one model must not end the worker.
        except Exception as error:
            line = {"error": _describe(error, request)}
        print(json.dumps(line), file=channel, flush=True)


@final
class _Heartbeat:
    """Tells the parent, at most once a second, that a long request goes on."""

    def __init__(self, channel: TextIO) -> None:
        self._channel = channel
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= _BEAT_S:
            print('{"alive": true}', file=self._channel, flush=True)
            self._last = time.monotonic()


def _private_stdout() -> TextIO:
    """A copy of standard output; the real one goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Libraries print from native code too, which would corrupt the protocol.
    os.dup2(2, 1)
    return channel


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the call above.
    if os.getppid() != parent:
        os._exit(1)


def _read_requests(requests: queue.Queue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    # Standard input ends when the parent closes it or dies; a model may still be running.
    os._exit(0)


def _pin(cores: tuple[int, ...]) -> None:
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as cause:
        raise DeviceError(
            f"The worker cannot be pinned to the profile's cores: {cause}",
            given=cores,
            advice="correct `cores` in the device profile",
        ) from cause


def _describe(error: Exception, request: Request) -> dict[str, Any]:
    if isinstance(error, AutocompressError):
        fields = {"given": error.given, "allowed": error.allowed, "advice": error.advice}
        texts = {key: None if value is None else str(value) for key, value in fields.items()}
        kind = "device" if isinstance(error, DeviceError) else "measurement"
        return {"kind": kind, "what": error.what, **texts}
    return {
        "kind": "measurement",
        "what": f"The runtime cannot run the model: {type(error).__name__}: {error}",
        "given": str(request.get("model")),
        "allowed": None,
        "advice": None,
    }
