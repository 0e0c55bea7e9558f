"""The contract of every runtime: what `measure.session` promises."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_builders as files
import pytest

from autocompress.device import (
    OnnxRuntimeCpuSettings,
    OnnxRuntimeCudaSettings,
    OpenVinoSettings,
    PyTorchSettings,
    RuntimeSettings,
    TensorRtSettings,
    load_profile,
)
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.runtimes import RUNTIMES, runtime_for
from autocompress.measure.session import Placement, Runtime

PLACEMENT = Placement(threads=1)
HERE = (
    OnnxRuntimeCpuSettings(name="onnxruntime"),
    OpenVinoSettings(name="openvino"),
    PyTorchSettings(name="pytorch", device="cpu"),
)
ON_GPU = (
    OnnxRuntimeCudaSettings(name="onnxruntime_cuda", tf32=False),
    OnnxRuntimeCudaSettings(name="onnxruntime_cuda", tf32=False, cuda_graphs=True),
    TensorRtSettings(name="tensorrt", precision="fp32"),
    TensorRtSettings(name="tensorrt", precision="fp16"),
    TensorRtSettings(name="tensorrt", precision="fp32", cuda_graphs=True),
    PyTorchSettings(name="pytorch"),
    PyTorchSettings(name="pytorch", cuda_graphs=True),
    PyTorchSettings(name="pytorch", precision="bf16"),
)
FILES = {
    "convolutions": (files.convolutions, [(3, 32, 32)]),
    "two_inputs": (files.two_inputs, [(6,), (4,)]),
    "rounded": (files.rounded_convolution, [(8, 24, 24)]),
    "packed": (files.packed_linear, [(128,)]),
    "own_function": (files.function_of_inputs, [(4,)]),
}
MODULES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime_cuda": "onnxruntime",
    "tensorrt": "onnxruntime",
    "openvino": "openvino",
    "pytorch": "torch",
}
PROFILES = sorted((Path(__file__).resolve().parents[2] / "hw_profiles").glob("*.yaml"))


def _name(settings: RuntimeSettings) -> str:
    return settings.full_name


@pytest.fixture(
    params=[*HERE, *(pytest.param(s, marks=pytest.mark.gpu) for s in ON_GPU)], ids=_name
)
def settings(request: pytest.FixtureRequest) -> RuntimeSettings:
    chosen: RuntimeSettings = request.param
    try:
        runtime_for(chosen).check_available(chosen)
    except DeviceError as error:
        if chosen in HERE:
            raise
        pytest.skip(error.what)
    return chosen


@pytest.fixture
def runtime(settings: RuntimeSettings) -> Runtime:
    return runtime_for(settings)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runtimes")
    return {name: files.save(make(), folder, name) for name, (make, _) in FILES.items()}


def inputs_of(name: str, batch: int, seed: int = 7) -> list[np.ndarray]:
    shapes = FILES[name][1]
    return [files.draw(batch, *shape, seed=seed + i) for i, shape in enumerate(shapes)]


def assert_close(found, wanted, settings: RuntimeSettings, steps: float = 0.0) -> None:
    """Alike but for the order of sums, the type of numbers, and some steps of a grid."""
    precision = getattr(settings, "precision", "fp32")
    tolerance = {"fp16": 1e-2, "bf16": 5e-2}.get(precision, 1e-4)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max() + steps, rtol=0)


def test_every_runtime_is_tested_under_its_name() -> None:
    tested = {settings.name: settings for settings in (*ON_GPU, *HERE)}
    assert {runtime.name for runtime in RUNTIMES} == set(tested)
    assert all(runtime_for(tested[runtime.name]) is runtime for runtime in RUNTIMES)


@pytest.mark.parametrize("name", FILES)
def test_it_computes_what_onnx_runtime_computes(runtime, settings, paths, name: str) -> None:
    inputs = inputs_of(name, 3)
    found = runtime.load(paths[name], settings, PLACEMENT).run(inputs)
    # Kernels that requantize in another order may round to a neighbouring step.
    steps = 0.051 if name == "rounded" else 0.0
    assert_close(found, files.reference(paths[name], inputs), settings, steps)


def test_inputs_come_in_the_files_order(runtime, settings, paths) -> None:
    session = runtime.load(paths["two_inputs"], settings, PLACEMENT)
    assert session.input_names == ("z", "a")


def test_any_batch_runs_in_any_order(runtime, settings, paths) -> None:
    session = runtime.load(paths["convolutions"], settings, PLACEMENT)
    for batch in (1, 4, 1, 2, 4):
        inputs = inputs_of("convolutions", batch, seed=batch)
        wanted = files.reference(paths["convolutions"], inputs)
        assert_close(session.run(inputs), wanted, settings)


def test_later_runs_leave_outputs_and_inputs_alone(runtime, settings, paths) -> None:
    session = runtime.load(paths["two_inputs"], settings, PLACEMENT)
    first, second = inputs_of("two_inputs", 2, seed=1), inputs_of("two_inputs", 2, seed=2)
    before = [array.copy() for array in first]
    outputs = session.run(first)
    copies = [array.copy() for array in outputs]
    session.run(second)
    for array in second:
        array.fill(np.nan)
    for one, other in zip([*outputs, *first], [*copies, *before], strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.flags.c_contiguous


def test_an_output_is_no_view_of_an_input(runtime, settings, tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Identity", ["x"], ["y"])]
    path = files.save(files.build(nodes, {"x": ["batch", 3]}, ["y"]), tmp_path, "identity")
    x = np.ones((2, 3), np.float32)
    (y,) = runtime.load(path, settings, PLACEMENT).run([x])
    x.fill(0)
    np.testing.assert_array_equal(y, np.ones((2, 3), np.float32))


def test_strided_inputs_are_read_as_they_look(runtime, settings, paths) -> None:
    session = runtime.load(paths["two_inputs"], settings, PLACEMENT)
    z, a = inputs_of("two_inputs", 4)
    turned = [np.asfortranarray(z), a[::-1]]
    wanted = session.run([z, np.ascontiguousarray(a[::-1])])
    assert_close(session.run(turned), wanted, settings)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_inputs_raises(runtime, settings, paths, count: int) -> None:
    session = runtime.load(paths["two_inputs"], settings, PLACEMENT)
    with pytest.raises(ValueError):
        session.run([np.zeros((1, 6), np.float32)] * count)


@pytest.mark.parametrize("content", [b"", b"\x08\x09 this is no model"], ids=["empty", "corrupt"])
def test_a_corrupt_file_raises(runtime, settings, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "corrupt.onnx"
    path.write_bytes(content)
    with pytest.raises(Exception):  # noqa: B017 - each runtime has its own errors
        runtime.load(path, settings, PLACEMENT).run([np.zeros((1, 3), np.float32)])


def test_it_starts_without_a_model(runtime, settings) -> None:
    runtime.start(settings, PLACEMENT)


@pytest.mark.parametrize("settings", [*HERE, *ON_GPU], ids=_name)
def test_a_missing_library_names_what_to_install(
    settings: RuntimeSettings, paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[settings.name], None)
    runtime = runtime_for(settings)
    extra = f"autocompress[{settings.extra}]" if settings.extra else settings.distributions[0]
    for attempt in (
        lambda: runtime.check_available(settings),
        lambda: runtime.load(paths["convolutions"], settings, PLACEMENT),
    ):
        with pytest.raises(DeviceError) as caught:
            attempt()
        assert "pip install" in str(caught.value) and extra in str(caught.value)


def _profile(runtime, settings, path: Path, name: str):
    try:
        return runtime.profile(path, settings, PLACEMENT, inputs_of(name, 2), 5)
    except MeasurementError as error:
        assert settings in ON_GPU and error.advice
        pytest.skip(error.what)


def test_the_profile_lists_what_ran(runtime, settings, paths) -> None:
    nodes = _profile(runtime, settings, paths["convolutions"], "convolutions")
    assert all(node.milliseconds >= 0 for node in nodes)
    assert sum(node.milliseconds for node in nodes) > 0
    assert all(node.name and node.operator for node in nodes)
    described = re.compile(r"\w+\[(-?\d+(,-?\d+)*)?\]")
    assert all(described.fullmatch(text) for n in nodes for text in (*n.inputs, *n.outputs))
    convolutions = [node for node in nodes if "conv" in node.operator.lower()]
    assert [node.origins[0] for node in convolutions] == ["first", "second"]
    assert "float32[2,8,32,32]" in convolutions[1].inputs


def test_the_profiles_origins_are_the_files_nodes(runtime, settings, paths) -> None:
    nodes = _profile(runtime, settings, paths["rounded"], "rounded")
    names = {node.name for node in onnx.load(paths["rounded"]).graph.node}
    origins = [origin for node in nodes for origin in node.origins]
    assert origins and set(origins) <= names
    assert "conv" in origins


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_loads(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    assert all(runtime_for(settings) in RUNTIMES for settings in profile.runtimes)
    gpu = {"onnxruntime_cuda", "tensorrt"}
    for settings in profile.runtimes:
        uses_gpu = settings.name in gpu or getattr(settings, "device", "cpu") == "cuda"
        assert uses_gpu == (profile.kind == "cuda")


def test_the_shipped_profiles_cover_every_runtime() -> None:
    listed = {s.name for path in PROFILES for s in load_profile(path.stem).runtimes}
    assert listed == {runtime.name for runtime in RUNTIMES}
