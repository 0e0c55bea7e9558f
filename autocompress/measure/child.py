"""The child's half of the protocol: one JSON request per line in, one JSON answer per line out."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, final

from autocompress.device import DeviceProfile, usable_cores
from autocompress.errors import AutocompressError, DeviceError
from autocompress.measure.lock import core_keys
from autocompress.measure.session import Placement
from autocompress.processes import die_with

Request = dict[str, Any]
Beat = Callable[[], None]
Handler = Callable[[Request, Beat], dict[str, Any]]

_BEAT_S = 1.0
# Of what is free when the child starts; the rest is the parent's.
_MEMORY_SHARE = 0.8
# Noted before the process is pinned to some of them.
_CORES = usable_cores()


@final
@dataclass(frozen=True)
class Setup:
    """What a child is told on its command line, as JSON.

    Attributes:
        parent: the parent's process id; 0 if the parent is on another machine.
        profile: the device; its cores are resolved where the child runs.
    """

    parent: int
    profile: DeviceProfile

    @property
    def cores(self) -> tuple[int, ...]:
        """The profile's cores on this machine."""
        return self.profile.pinned_cores(_CORES)

    @property
    def placement(self) -> Placement:
        """Where on the device the runtimes run."""
        return Placement(self.profile.threads, self.profile.gpu)

    @property
    def lock_keys(self) -> tuple[str, ...]:
        """The device's parts that no other measurement may use meanwhile."""
        gpu = (f"gpu-{self.profile.gpu}",) if self.profile.kind == "cuda" else ()
        return (*core_keys(self.cores), *gpu)

    def to_json(self) -> str:
        """The setup as one line of JSON."""
        return json.dumps({"parent": self.parent, "profile": self.profile.model_dump(mode="json")})

    @staticmethod
    def from_json(text: str) -> Setup:
        """Read back what `to_json` wrote."""
        data = json.loads(text)
        return Setup(data["parent"], DeviceProfile.model_validate(data["profile"]))


def serve(make_handler: Callable[[Setup], Handler]) -> None:
    """Answer requests until standard input ends or the parent dies.

    A line of the answer stream is `{"alive": true}` (between steps of a long request),
    `{"answer": ...}` or `{"error": ...}`.

    Args:
        make_handler: called once, after the process has been pinned.
    """
    channel = _private_stdout()
    setup = Setup.from_json(sys.argv[1])
    die_with(setup.parent)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    handler: Handler | None = None
    while True:
        request = json.loads(requests.get())
        try:
            if handler is None:
                _pin(setup.cores)
                _limit_memory(setup.profile)
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


def _limit_memory(profile: DeviceProfile) -> None:
    """Let a model that allocates without end fail by itself, not by taking the machine down."""
    if sys.platform != "linux":
        return
    # If the kernel must end a process for want of memory, it is to be this one.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    limit = profile.measuring.memory_limit_bytes
    if limit is None and profile.kind == "cpu":
        limit = int(_MEMORY_SHARE * _available_bytes())
    if limit:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _describe(error: Exception, request: Request) -> dict[str, Any]:
    if isinstance(error, AutocompressError):
        fields = {"given": error.given, "allowed": error.allowed, "advice": error.advice}
        texts = {key: None if value is None else str(value) for key, value in fields.items()}
        kind = "device" if isinstance(error, DeviceError) else "measurement"
        return {"kind": kind, "what": error.what, **texts}
    return {
        "kind": "measurement",
        "what": f"The runtime cannot run the model: {type(error).__name__}: {error}",
        "given": str(request.get("model") or request.get("candidate", {}).get("model")),
        "allowed": None,
        "advice": None,
    }
