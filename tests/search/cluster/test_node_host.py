"""A host whose device is away now and then: nothing is lost, and nothing is sent twice in vain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from autocompress.device import MachineFacts
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.arrays import write_arrays
from autocompress.search.cluster import node_host
from autocompress.search.cluster.device_node import FILE, Reply
from autocompress.search.cluster.node_host import NodeHost

FACTS = MachineFacts(
    cpu_model="cpu", instruction_sets=(), cores=(0,), accelerator="",
    versions={"onnxruntime": "1.0"},
)  # fmt: skip


class Method:
    def __init__(self, node: Node, name: str) -> None:
        self._node, self._name = node, name

    def remote(self, *arguments: Any) -> tuple[Node, str, tuple[Any, ...]]:
        return self._node, self._name, arguments


class Node:
    """An actor in this process: `ray.get` calls it; `failures` are raised before it answers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.failures: list[Exception] = []
        self.version = ""
        self.refuses: MeasurementError | None = None

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self.calls.append(name)
        if self.failures:
            raise self.failures.pop(0)
        return getattr(self, f"do_{name}")(*arguments)

    def do_about(self) -> tuple[str, str]:
        return self.version, "node"

    def do_facts(self) -> Reply:
        return Reply(answer=FACTS.model_dump(mode="json"))

    def do_put(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def do_take(self, name: str) -> bytes | None:
        return self.files.pop(name, None)

    def do_ask(self, key: Any, request: Any, files: tuple[str, ...], silence_s: float) -> Reply:
        missing = tuple(name for name in files if name not in self.files)
        if missing:
            return Reply(missing=missing)
        if self.refuses:
            return Reply(error=self.refuses)
        if "outputs" in request:
            self.files[request["outputs"].removeprefix(FILE)] = b"result"
        return Reply(answer={"told": request["number"]}, node="node", start_s=1.0, end_s=2.0)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node()
    monkeypatch.setattr(node_host.ray, "get", lambda call: call[0].answer(call[1], call[2]))
    monkeypatch.setattr(node_host.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(node_host.metadata, "version", lambda name: "1.2.3")
    node.version = "1.2.3"
    return node


def unavailable() -> Exception:
    return ActorUnavailableError("the link is cut", b"0" * 16)


def make(tmp_path: Path, node: Node, away_s: float = 60.0) -> tuple[NodeHost, Any, dict[str, Any]]:
    host = NodeHost(node, away_s)  # type: ignore[arg-type]
    model = tmp_path / "model.onnx"
    model.write_bytes(b"model")
    inputs = tmp_path / "inputs.npz"
    write_arrays(inputs, [np.zeros((2, 2), np.float32)])
    child = host.start("module", tmp_path)
    request = {
        "number": 7, "baseline": {"model": host.put(model)}, "inputs": host.put(inputs),
        "outputs": host.result(tmp_path / "outputs.npz"),
    }  # fmt: skip
    return host, child, request


def test_files_are_sent_when_they_are_missing_and_only_then(tmp_path: Path, node: Node) -> None:
    host, child, request = make(tmp_path, node)
    assert node.calls == []
    assert child.ask(request, 1.0) == {"told": 7}
    assert node.calls == ["ask", "put", "put", "ask", "take"]
    host.fetch(tmp_path / "outputs.npz")
    assert (tmp_path / "outputs.npz").read_bytes() == b"result"
    child.ask(request, 1.0)
    assert node.calls.count("put") == 2
    # A node that was replaced lacks them again.
    node.files.clear()
    child.ask(request, 1.0)
    assert node.calls.count("put") == 4
    assert [(held.start_s, held.end_s) for held in host.held] == [(1.0, 2.0)] * 3


@pytest.mark.parametrize("times", [1, 3])
def test_a_request_waits_while_the_node_is_away(tmp_path: Path, node: Node, times: int) -> None:
    _, child, request = make(tmp_path, node)
    node.failures = [unavailable() for _ in range(times)]
    assert child.ask(request, 1.0) == {"told": 7}


def test_a_result_that_went_with_its_node_is_made_anew(tmp_path: Path, node: Node) -> None:
    _, child, request = make(tmp_path, node)
    child.ask(request, 1.0)
    original, lost = node.do_take, []

    def take(name: str) -> bytes | None:
        if not lost:
            lost.append(name)
            node.files.clear()
        return original(name)

    node.do_take = take  # type: ignore[method-assign]
    assert child.ask(request, 1.0) == {"told": 7}
    assert lost


def full() -> RayTaskError:
    return RayTaskError("put", "traceback", OSError("no space left on device"))


@pytest.mark.parametrize(
    ("failure", "what"), [(unavailable, "away from the cluster"), (full, "no space left")]
)
def test_a_node_that_never_serves_again_ends_the_measurement(
    tmp_path: Path,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[], Exception],
    what: str,
) -> None:
    _, child, request = make(tmp_path, node, away_s=5.0)
    now = iter(range(100))
    monkeypatch.setattr(node_host.time, "monotonic", lambda: float(next(now)))
    node.failures = [failure() for _ in range(100)]
    with pytest.raises(DeviceError, match=what):
        child.ask(request, 1.0)


def test_an_actor_that_the_cluster_never_lets_run_is_not_waited_for(
    tmp_path: Path, node: Node
) -> None:
    _, child, request = make(tmp_path, node)
    died = ActorDiedErrorContext(actor_id=bytes(16), never_started=True)
    node.failures = [ActorDiedError(died)]
    with pytest.raises(DeviceError, match="before it runs") as caught:
        child.ask(request, 1.0)
    assert "RAY_AUTH_MODE" in str(caught.value)
    # Once it has run, its death is that of its node.
    node.failures = [ActorDiedError(ActorDiedErrorContext(actor_id=bytes(16)))]
    assert child.ask(request, 1.0) == {"told": 7}


def test_refusals_and_faults_of_the_node_are_told_apart(tmp_path: Path, node: Node) -> None:
    _, child, request = make(tmp_path, node)
    node.refuses = MeasurementError("It crashed the runtime.", given="model.onnx")
    with pytest.raises(MeasurementError, match="crashed the runtime"):
        child.ask(request, 1.0)
    node.refuses = None
    node.failures = [RayTaskError("ask", "traceback", KeyError("a bug"))]
    with pytest.raises(DeviceError, match="a bug"):
        child.ask(request, 1.0)


def test_a_full_disk_of_the_node_is_waited_for(tmp_path: Path, node: Node) -> None:
    _, child, request = make(tmp_path, node)
    node.failures = [full()]
    assert child.ask(request, 1.0) == {"told": 7}


def test_another_version_is_refused(tmp_path: Path, node: Node) -> None:
    host = NodeHost(node)  # type: ignore[arg-type]
    assert host.facts(tmp_path) == FACTS
    node.version = "1.2.4"
    with pytest.raises(DeviceError, match="another version") as caught:
        host.facts(tmp_path)
    assert "autocompress[device]==1.2.3" in str(caught.value)
