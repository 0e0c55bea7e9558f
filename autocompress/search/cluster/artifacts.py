"""Where builders on other nodes leave their files: any location that fsspec knows.

By default it is the run folder itself, which then must be a shared one.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from autocompress.errors import ConfigError
from autocompress.files import write_whole

_MARK = ".autocompress-shared"


@final
@dataclass(frozen=True)
class Location:
    """A folder that every node sees.

    Attributes:
        url: as fsspec has it, such as `s3://bucket/folder` or a path.
        mark: what a file of the search's own in it says: proof that a node sees the same folder.
    """

    url: str
    mark: str

    @staticmethod
    def claimed(url: str) -> Location:
        """The location, after the mark was written there.

        Raises:
            ConfigError: it is no location, its package is missing, or it cannot be written.
        """
        location = Location(url, uuid.uuid4().hex)
        try:
            location.keep(_MARK, location.mark.encode())
        except (OSError, ValueError, ImportError) as cause:
            raise ConfigError(
                f"The location for artifacts cannot be written: {cause}",
                given=url,
                allowed="a folder that all nodes share, or a location that fsspec knows",
                advice="correct --artifacts; buckets need their package, such as s3fs or gcsfs",
            ) from cause
        return location

    def check(self, node: str) -> None:
        """Check that this node sees the location.

        Raises:
            ConfigError: it does not.
        """
        if self.read(_MARK) != self.mark.encode():
            raise ConfigError(
                "A node of the cluster does not see the location for artifacts.",
                given=f"{self.url} on {node}",
                allowed="a folder that all nodes share, or a location that fsspec knows",
                advice="put the run folder on a shared disk, or give --artifacts s3://BUCKET/FOLDER",
            )

    def keep(self, name: str, data: bytes) -> None:
        """Write a file; it appears whole or not at all."""
        system, root = self._open()
        path = f"{root}/{name}"
        if isinstance(system, LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), data)
            return
        # Object stores have no half-written objects.
        system.pipe_file(path, data)

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it is not there."""
        system, root = self._open()
        try:
            return bytes(system.cat_file(f"{root}/{name}"))
        except FileNotFoundError:
            return None

    def bring(self, name: str, folder: Path) -> None:
        """Make sure that a file is in a local folder too.

        Raises:
            OSError: it is neither here nor there.
        """
        path = folder / name
        if path.is_file():
            return
        data = self.read(name)
        if data is None:
            raise FileNotFoundError(f"{name} is not in {self.url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)

    def _open(self) -> tuple[Any, str]:
        system, root = fsspec.core.url_to_fs(self.url)
        return system, str(root).rstrip("/")
