"""The device's side, called directly: it needs neither Ray nor PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from autocompress.device import DeviceProfile
from autocompress.errors import MeasurementError
from autocompress.measure.arrays import read_arrays, write_arrays
from autocompress.search.cluster import device_node
from autocompress.search.cluster.device_node import FILE, ChildKey, DeviceNode, Reply

PROFILE = DeviceProfile.model_validate(
    {
        "version": 2, "name": "quick", "kind": "cpu", "runtimes": [{"name": "onnxruntime"}],
        "kernels": {},
        "measuring": {
            "target_half_width": 0.5, "time_limit_s": 0.2, "final_target_half_width": 0.5,
            "final_time_limit_s": 0.2, "hang_limit_s": 30.0,
        },
    }
)  # fmt: skip
KEY = ChildKey("test", "autocompress.measure.worker")


def negating_model() -> bytes:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 3]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ends[:1], ends[1:])
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def inputs(tmp_path: Path) -> bytes:
    path = tmp_path / "inputs.npz"
    write_arrays(path, [np.arange(12, dtype=np.float32).reshape(4, 3)])
    return path.read_bytes()


@pytest.fixture
def node() -> Iterator[DeviceNode]:
    node = DeviceNode(PROFILE.model_dump_json())
    yield node
    node.close()


def predict(node: DeviceNode, key: ChildKey = KEY) -> Reply:
    request = {
        "operation": "predict", "model": f"{FILE}model.onnx", "runtime": "onnxruntime",
        "inputs": f"{FILE}inputs.npz", "batch_size": 2, "outputs": f"{FILE}result.npz",
        "lock_wait_s": 60.0,
    }  # fmt: skip
    return node.ask(key, request, ("model.onnx", "inputs.npz"), 30.0)


def test_files_are_asked_for_sent_once_and_results_taken_once(
    node: DeviceNode, tmp_path: Path
) -> None:
    assert predict(node).missing == ("model.onnx", "inputs.npz")
    node.put("model.onnx", negating_model())
    assert predict(node).missing == ("inputs.npz",)
    node.put("inputs.npz", inputs(tmp_path))
    reply = predict(node)
    assert reply.answer == {} and reply.error is None and not reply.missing
    assert 0 < reply.end_s - reply.start_s < 60 and reply.node
    data = node.take("result.npz")
    assert data is not None
    (tmp_path / "outputs.npz").write_bytes(data)
    (found,) = read_arrays(tmp_path / "outputs.npz")
    assert found.tolist() == (-np.arange(12.0).reshape(4, 3)).tolist()
    assert node.take("result.npz") is None


def test_a_refusal_comes_back_whole(node: DeviceNode, tmp_path: Path) -> None:
    node.put("model.onnx", b"no model")
    node.put("inputs.npz", inputs(tmp_path))
    reply = predict(node)
    assert isinstance(reply.error, MeasurementError)
    assert "cannot run the model" in reply.error.what
    # The child lives on.
    node.put("model.onnx", negating_model())
    assert predict(node).answer == {}


def test_a_child_that_died_is_started_anew(node: DeviceNode, tmp_path: Path) -> None:
    node.put("model.onnx", negating_model())
    node.put("inputs.npz", inputs(tmp_path))
    assert predict(node).answer == {}
    node._children[KEY].stop()
    assert predict(node).answer == {}
    assert len(node._children) == 1


def test_the_least_recently_used_children_and_files_give_way(
    node: DeviceNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_node, "_MOST_CHILDREN", 2)
    node.put("model.onnx", negating_model())
    node.put("inputs.npz", inputs(tmp_path))
    keys = [ChildKey(owner, KEY.module) for owner in ("a", "b", "c")]
    for key in keys:
        assert predict(node, key).answer == {}
    assert list(node._children) == keys[1:]
    monkeypatch.setattr(device_node, "_MOST_BYTES", 3000)
    node.put("large", b"x" * 2900)
    assert set(predict(node).missing) == {"model.onnx", "inputs.npz"}


def test_it_is_imported_without_torch_ray_and_optuna() -> None:
    code = (
        "import sys\n"
        "names = {'torch', 'torch_pruning', 'ray', 'optuna', 'tensorly', 'moocore'}\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in names:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import autocompress.search.cluster.device_node\n"
        "import autocompress.measure.worker, autocompress.measure.memory\n"
        "import autocompress.cli, autocompress.report.measured\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
