"""Coding in a process of its own, which leaves this one and the measuring cores alone.

Contexts are mixed symbol by symbol in Python: in this process it would hold up everything else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from autocompress.errors import ExportError, OutOfTimeError
from autocompress.export.coding.container import encode_with_sizes
from autocompress.export.coding.files import encode_file
from autocompress.export.coding.kept import KeptTensors
from autocompress.files import write_whole
from autocompress.processes import die_with

# Beside the containers.
_KEPT = "coded"
_MODULE = "autocompress.export.coding.beside"


@final
class Coding:
    """A container that is being made.

    Args:
        source: an ONNX file.
        target: the container, written whole; tensors that several files of its folder share are
            coded once (`KeptTensors`).
        cores: where the process may run.
        checked: decode it once to be sure, which takes as long again; else a container that is
            there already is taken.
    """

    def __init__(
        self, source: Path, target: Path, cores: Collection[int], *, checked: bool
    ) -> None:
        self._source, self._target, self._cores = source, target, cores
        self._child: subprocess.Popen[str] | None = None
        self._complaint: str | None = None
        if checked or not target.is_file():
            mode = "checked" if checked else "unchecked"
            self._child = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(os.getpid()), str(source), str(target), mode],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            _move(self._child.pid, cores)

    @property
    def ended(self) -> bool:
        """Whether `wait` would not have to wait."""
        return self._child is None or self._child.poll() is not None

    @property
    def killed(self) -> bool:
        """Whether a signal ended the process, which says nothing about the file."""
        return self._child is not None and (self._child.poll() or 0) < 0

    def wait(self, limit_s: float | None = None) -> int:
        """The container's size in bytes; may be asked for several times.

        Meanwhile the process may also run where the waiting thread may: it measures nothing.

        Args:
            limit_s: how long to wait at most; it may be waited for again then.

        Raises:
            ExportError: the file cannot be coded, or the process was `killed`.
            OutOfTimeError: it takes longer.
        """
        if self._child is not None:
            if not self.ended:
                _move(self._child.pid, {*self._cores, *os.sched_getaffinity(0)})
            complaint, code = self._complaint_of(self._child, limit_s), self._child.returncode
            if code < 0:
                raise ExportError(
                    f"The coder was ended by signal {-code} ({signal.strsignal(-code)}).",
                    given=self._source,
                    advice="if that was for lack of memory, leave it more and search again",
                )
            if code:
                lines = complaint.splitlines() or [f"exit code {code}"]
                raise ExportError(f"The file cannot be coded: {lines[-1]}", given=self._source)
        return self._target.stat().st_size

    def cancel(self) -> None:
        """End the process, if it still runs; nothing is left of it."""
        if self._child is not None:
            self._child.kill()
            self._complaint_of(self._child)

    def _complaint_of(self, child: subprocess.Popen[str], limit_s: float | None = None) -> str:
        """What the process wrote, once it has ended."""
        if self._complaint is None:
            try:
                self._complaint = child.communicate(timeout=limit_s)[1].strip()
            except subprocess.TimeoutExpired as cause:
                raise OutOfTimeError("It was not coded in time.", given=self._source) from cause
        return self._complaint


@final
class Codings:
    """Containers that are being made, each of them once.

    Args:
        begin: of a file, and whether it is to be checked (see `Coding`).
    """

    def __init__(self, begin: Callable[[Path, bool], Coding]) -> None:
        self._begin = begin
        self._begun: dict[tuple[Path, bool], Coding] = {}

    def start(self, model: Path, *, checked: bool) -> Coding:
        """Begin to make a file's container, if that was not done before or was killed."""
        coding = self._begun.get((model, checked))
        if coding is None or coding.killed:
            coding = self._begun[model, checked] = self._begin(model, checked)
        return coding

    @contextmanager
    def wanted(self, model: Path) -> Iterator[Coding]:
        """A file's container, unchecked; its making ends if the body of the `with` fails."""
        before = self._begun.get((model, False))
        coding = self.start(model, checked=False)
        try:
            yield coding
        except BaseException:
            # Whoever began it earlier still waits for it.
            if coding is not before:
                del self._begun[model, False]
                coding.cancel()
            raise

    def close(self) -> None:
        """End all that are still being made."""
        for coding in self._begun.values():
            coding.cancel()


def _move(process: int, cores: Collection[int]) -> None:
    """Let a process run on other cores, if it has not ended."""
    with suppress(ProcessLookupError):
        os.sched_setaffinity(process, cores)


def main(source: Path, target: Path, *, checked: bool) -> None:
    """What the process does.

    Raises:
        ExportError: the file cannot be coded.
    """
    kept = KeptTensors(target.parent / _KEPT)
    if checked:
        encode_file(source, target, kept)
    else:
        write_whole(target, encode_with_sizes(source.read_bytes(), kept.pack)[0])
    kept.prune()


if __name__ == "__main__":
    parent, first, second, mode = sys.argv[1:]
    die_with(int(parent))
    try:
        main(Path(first), Path(second), checked=mode == "checked")
    except ExportError as error:
        sys.exit(str(error))
