"""The device's side of a cluster: files, and children that measure, one request at a time.

Imports neither PyTorch nor Ray: a small computer needs ONNX Runtime only.
"""

from __future__ import annotations

import platform
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, final

from autocompress.device import DeviceProfile
from autocompress.errors import AutocompressError
from autocompress.measure.host import LocalHost
from autocompress.measure.host_interface import Child
from autocompress.search.cluster.own_folder import NODE, OwnFolder

# Texts of requests that begin so are names of files in the node's folder.
FILE = "node-file:"
# Children of builders that are gone end when so many others are asked.
_MOST_CHILDREN = 12
_MOST_BYTES = 4 << 30


@final
@dataclass(frozen=True)
class ChildKey:
    """Which child answers: one is started for each, and anew if it ended.

    Attributes:
        owner: tells the children of several measuring objects apart.
        module: the module that it runs.
        environment: variables set for it.
    """

    owner: str
    module: str
    environment: tuple[tuple[str, str], ...] = ()


@final
@dataclass(frozen=True)
class Reply:
    """What came of a request: exactly one of the fields, `answer` with the times it was under way.

    Attributes:
        answer: the child's.
        error: what the child, or the runtime in it, refused.
        missing: names of files that must be put first.
        node: the machine's name.
        start_s, end_s: of the request, in seconds of the node's clock since 1970.
    """

    answer: Mapping[str, Any] | None = None
    error: AutocompressError | None = None
    missing: tuple[str, ...] = ()
    node: str = ""
    start_s: float = 0.0
    end_s: float = 0.0


@final
class DeviceNode:
    """What measures on one node. To be used by one caller at a time.

    Args:
        profile: the device, as JSON.
    """

    def __init__(self, profile: str) -> None:
        self._profile = DeviceProfile.model_validate_json(profile)
        self._host = LocalHost(self._profile)
        self._own = OwnFolder(NODE)
        self._folder = self._own.path
        self._children: OrderedDict[ChildKey, Child] = OrderedDict()

    def about(self) -> tuple[str, str]:
        """The version of autocompress here, and the machine's name."""
        return metadata.version("autocompress"), platform.node()

    def facts(self) -> Reply:
        """What the machine is, as `MachineFacts` writes it."""
        try:
            found = self._host.facts(self._folder).model_dump(mode="json")
        except AutocompressError as error:
            return Reply(error=error)
        return Reply(answer=found, node=platform.node())

    def put(self, name: str, data: bytes) -> None:
        """Keep a file; it appears whole or not at all."""
        self._make_room(len(data))
        partial = self._folder / f".{name}.part"
        partial.write_bytes(data)
        partial.replace(self._folder / name)

    def take(self, name: str) -> bytes | None:
        """The content of a result, which is deleted; None if it is not there."""
        path = self._folder / name
        if not path.is_file():
            return None
        data = path.read_bytes()
        path.unlink()
        return data

    def ask(
        self, key: ChildKey, request: Mapping[str, Any], files: tuple[str, ...], silence_s: float
    ) -> Reply:
        """Let a child answer a request.

        Args:
            request: texts that begin with `FILE` are names of files here.
            files: names that it reads; if some are not here, nothing else is done.
            silence_s: how long the child may say nothing.
        """
        missing = tuple(name for name in files if not (self._folder / name).is_file())
        if missing:
            return Reply(missing=missing)
        for name in files:
            # The least recently used ones are deleted when there is no room.
            (self._folder / name).touch()
        start_s = time.time()
        try:
            answer = self._child(key).ask(self._placed(request), silence_s)
        except AutocompressError as error:
            return Reply(error=error)
        return Reply(answer, node=platform.node(), start_s=start_s, end_s=time.time())

    def stop(self, key: ChildKey) -> None:
        """End a child, if there is one."""
        child = self._children.pop(key, None)
        if child is not None:
            child.stop()
            child.remove_stderr()

    def close(self) -> None:
        """End all children and delete all files."""
        for key in list(self._children):
            self.stop(key)
        self._own.remove()

    def _child(self, key: ChildKey) -> Child:
        child = self._children.get(key)
        if child is not None and not child.running:
            self.stop(key)
            child = None
        if child is None:
            while len(self._children) >= _MOST_CHILDREN:
                self.stop(next(iter(self._children)))
            child = self._host.start(key.module, self._folder, dict(key.environment))
            self._children[key] = child
        self._children.move_to_end(key)
        return child

    def _placed(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(FILE):
            return str(self._folder / value.removeprefix(FILE))
        if isinstance(value, Mapping):
            return {name: self._placed(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._placed(inner) for inner in value]
        return value

    def _make_room(self, wanted: int) -> None:
        files = [p for p in self._folder.iterdir() if p.is_file()]
        kept = sum(p.stat().st_size for p in files)
        for path in sorted(files, key=lambda p: p.stat().st_mtime):
            if kept + wanted <= _MOST_BYTES:
                return
            kept -= path.stat().st_size
            path.unlink()
