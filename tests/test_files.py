"""Files are written whole, whoever else writes them at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from autocompress.files import write_whole


def test_threads_that_write_the_same_file_at_once_all_succeed(tmp_path):
    path, writers = tmp_path / "variant", 8
    contents = [bytes([number]) * 50_000 for number in range(writers)]
    start = Barrier(writers)

    def write(data: bytes) -> None:
        for _ in range(20):
            start.wait(timeout=10)
            write_whole(path, data)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(writers) as threads:
        list(threads.map(write, contents))
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "variant"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
