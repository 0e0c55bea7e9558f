from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from autocompress.errors import ConfigError
from autocompress.search.cluster.artifacts import Location


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shared") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"


def test_files_are_kept_read_and_brought(url: str, tmp_path: Path) -> None:
    location = Location.claimed(url)
    assert location.read("artifacts/a.onnx") is None
    location.keep("artifacts/a.onnx", b"model")
    assert location.read("artifacts/a.onnx") == b"model"
    run = tmp_path / "run"
    location.bring("artifacts/a.onnx", run)
    assert (run / "artifacts" / "a.onnx").read_bytes() == b"model"
    # What is here already is not fetched again.
    location.keep("artifacts/a.onnx", b"other")
    location.bring("artifacts/a.onnx", run)
    assert (run / "artifacts" / "a.onnx").read_bytes() == b"model"
    with pytest.raises(FileNotFoundError):
        location.bring("artifacts/b.onnx", run)


def test_a_node_that_sees_another_folder_is_refused(url: str, tmp_path: Path) -> None:
    location = Location.claimed(url)
    location.check("here")
    elsewhere = Location(str(tmp_path / "elsewhere"), location.mark)
    with pytest.raises(ConfigError, match="does not see") as caught:
        elsewhere.check("node-7")
    assert "node-7" in str(caught.value)
    with pytest.raises(ConfigError, match="does not see"):
        Location(location.url, "another search's").check("here")


@pytest.mark.parametrize("bad", ["nosuchprotocol://bucket", "/proc/nothing/can/be/here"])
def test_a_location_that_cannot_be_written_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        Location.claimed(bad)
