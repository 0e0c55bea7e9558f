"""`NodeHost`: a device on a node of a Ray cluster, as a machine that measures."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from autocompress.device import MachineFacts
from autocompress.errors import DeviceError
from autocompress.files import write_whole
from autocompress.measure.arrays import content_name, file_key, plain_name
from autocompress.measure.host_interface import Child, Host
from autocompress.search.cluster.device_node import FILE, ChildKey, Reply
from autocompress.search.patience import may_pass

# How long a device may be away, and its disk full, before a measurement is given up.
AWAY_S, _FULL_S = 3600.0, 600.0
_PAUSE_S = 1.0
# A request is sent again if its files went meanwhile, which a full disk may do time and again.
_ATTEMPTS = 5
# Ray says so only in words: an actor that is restarted for ever, dead without ever having run.
_NEVER_RAN = "never ran"


@final
@dataclass(frozen=True)
class Held:
    """When a node was busy with a request, in seconds of its clock since 1970."""

    node: str
    start_s: float
    end_s: float


@final
class NodeHost(Host):
    """The node that an actor of `DeviceNode` runs on.

    Files go there when a request names them and the node lacks them. While the node is away,
    requests wait: the actor is restarted where the device comes back, and the request is sent anew.

    Args:
        node: the actor.
        away_s: how long it may be away.

    Attributes:
        held: when the node was busy for this object, in order.
        name: of the machine, once its facts are known.
    """

    here = False

    def __init__(self, node: ActorHandle, away_s: float = AWAY_S) -> None:
        self._node, self._away_s, self._full_s = node, away_s, min(away_s, _FULL_S)
        self._token = uuid.uuid4().hex[:12]
        self._names: dict[tuple[str, int, int], str] = {}
        self._paths: dict[str, Path] = {}
        self._results: dict[str, Path] = {}
        self.held: list[Held] = []
        self.name = ""

    def start(
        self, module: str, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> Child:
        """A child that is started with its first request."""
        owner = f"{self._token}-{uuid.uuid4().hex[:8]}"
        key = ChildKey(owner, module, tuple(sorted((environment or {}).items())))
        return _NodeChild(self, key)

    def put(self, path: Path) -> str:
        """The name of the file there; it is sent once a request needs it."""
        path = path.resolve()
        key = file_key(path)
        if key not in self._names:
            self._names[key] = content_name(path)
        self._paths[self._names[key]] = path
        return f"{FILE}{self._names[key]}"

    def result(self, path: Path) -> str:
        """A name there that belongs to this object and `path` alone."""
        place = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
        name = f"result-{self._token}-{place}{plain_name(path.suffix)}"
        self._results[name] = path.resolve()
        return f"{FILE}{name}"

    def fetch(self, path: Path) -> None:
        """Check that a result is here: it came with its request's answer.

        Raises:
            DeviceError: it did not.
        """
        if not path.is_file():
            raise DeviceError("The device gave no result.", given=path)

    def facts(self, scratch: Path) -> MachineFacts:
        """What the node is, after a check that it runs the same autocompress.

        Raises:
            DeviceError: it has another version, or lacks what the profile asks for.
        """
        version, self.name = self._call("about")
        here = metadata.version("autocompress")
        if version != here:
            raise DeviceError(
                "The device has another version of autocompress than this machine.",
                given=f"{version} on {self.name}",
                allowed=f"{here}, as here",
                advice=f"there: pip install 'autocompress[device]=={here}'",
            )
        reply = self._call("facts")
        assert isinstance(reply, Reply)
        if reply.error is not None:
            raise reply.error
        return MachineFacts.model_validate(reply.answer)

    def ask(self, key: ChildKey, request: Mapping[str, Any], silence_s: float) -> dict[str, Any]:
        """Let a child there answer; its results are fetched with the answer.

        Raises:
            DeviceError: the node is away for too long.
            MeasurementError: the request failed.
        """
        names = sorted(_names_in(request))
        files = tuple(name for name in names if name in self._paths)
        results = [name for name in names if name in self._results]
        for _ in range(_ATTEMPTS):
            reply = self._call("ask", key, dict(request), files, silence_s)
            assert isinstance(reply, Reply)
            if reply.error is not None:
                raise reply.error
            for name in reply.missing:
                self._call("put", name, self._paths[name].read_bytes())
            if reply.answer is not None and self._take(results):
                self.held.append(Held(reply.node, reply.start_s, reply.end_s))
                return dict(reply.answer)
        raise DeviceError(
            "The device loses files that it was sent.",
            given=", ".join(files),
            advice="see that its folder for temporary files has room",
        )

    def stop(self, key: ChildKey) -> None:
        """End a child there; one that is not to be reached ends with its node."""
        try:
            self._node.stop.remote(key)
        except RayError:
            return

    def _take(self, results: Sequence[str]) -> bool:
        """Fetch what a child wrote; whether it was still there."""
        for name in results:
            data = self._call("take", name)
            if data is None:
                return False
            write_whole(self._results[name], data)
        return True

    def _call(self, method: str, *arguments: Any) -> Any:
        """What a method of the actor gives; called anew while the node is away.

        Raises:
            DeviceError: it stays away.
        """
        start = time.monotonic()
        while True:
            try:
                return ray.get(getattr(self._node, method).remote(*arguments))
            except RayTaskError as cause:
                if may_pass(cause.cause) and time.monotonic() - start < self._full_s:
                    time.sleep(_PAUSE_S)
                    continue
                raise DeviceError(
                    f"The device's node fails: {str(cause.cause).splitlines()[0]}",
                    given=method,
                    advice="see that its folder for temporary files can be written to",
                ) from cause
            except RayError as cause:
                if isinstance(cause, ActorDiedError) and _NEVER_RAN in str(cause):
                    raise DeviceError(
                        "The cluster ends what this machine starts in it before it runs.",
                        given=f"RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', 'disabled')} here",
                        allowed="tokens on all machines of a cluster, or on none",
                        advice="set RAY_AUTH_MODE to token or disabled, as the head has it",
                    ) from cause
                # Whatever Ray raises: the node, or the way there, is not to be had at present.
                if time.monotonic() - start > self._away_s:
                    raise DeviceError(
                        "The device has been away from the cluster for too long.",
                        given=f"{self._away_s:g} s; {type(cause).__name__}",
                        advice="connect it again; the same command goes on",
                    ) from cause
                time.sleep(_PAUSE_S)


@final
class _NodeChild:
    """A child on a node; see `host_interface.Child`."""

    def __init__(self, host: NodeHost, key: ChildKey) -> None:
        self._host, self._key = host, key
        self._ended = False

    @property
    def running(self) -> bool:
        """Whether it was not ended from here; the node starts it anew if it ended there."""
        return not self._ended

    @property
    def pid(self) -> int:
        """Of no use here: the child is on another machine."""
        return 0

    def ask(self, request: Mapping[str, Any], silence_s: float) -> dict[str, Any]:
        """See `NodeHost.ask`."""
        return self._host.ask(self._key, request, silence_s)

    def stop(self) -> None:
        """End the child."""
        self._ended = True
        self._host.stop(self._key)

    def remove_stderr(self) -> None:
        """The node does so when the child ends."""


def _names_in(value: Any) -> set[str]:
    """Names of the node's files in a request."""
    if isinstance(value, str):
        return {value.removeprefix(FILE)} if value.startswith(FILE) else set()
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(inner, (str, bytes)) or not isinstance(inner, Iterable):
        return set()
    return set().union(*(_names_in(part) for part in inner))
