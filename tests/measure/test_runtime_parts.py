"""What runtimes are made of: compiling by shape, ONNX files, providers' options, bound sessions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_builders as files
import onnxruntime
import openvino
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from autocompress.device import (
    OnnxRuntimeCpuSettings,
    OnnxRuntimeCudaSettings,
    OpenVinoSettings,
    TensorRtSettings,
)
from autocompress.errors import DeviceError
from autocompress.measure.runtimes import onnxruntime_cuda, onnxruntime_gpu, tensorrt
from autocompress.measure.runtimes.by_shape import ByShape
from autocompress.measure.runtimes.onnx_files import (
    expand_functions,
    has_functions,
    has_operators,
    without_functions,
)
from autocompress.measure.runtimes.onnxruntime_gpu import (
    BoundSession,
    FileInputs,
    FixedSession,
    file_inputs,
    open_fixed,
    outputs_like,
)
from autocompress.measure.runtimes.openvino import OpenVino
from autocompress.measure.session import Array, Placement

PLACEMENT = Placement(threads=1)
CPU = OnnxRuntimeCpuSettings(name="onnxruntime")
CUDA = OnnxRuntimeCudaSettings(name="onnxruntime_cuda")
TENSORRT = TensorRtSettings(name="tensorrt")


@given(st.lists(st.integers(1, 4), max_size=20))
def test_the_last_two_shapes_stay_compiled(batches: list[int]) -> None:
    compiled: list[int] = []

    def compile_for(inputs: Sequence[Array]):
        batch = len(inputs[0])
        compiled.append(batch)
        return lambda given: (np.array([batch, len(given[0])]),)

    session = ByShape(("x",), compile_for)
    wanted, recent = [], []
    for batch in batches:
        (pair,) = session.run([np.zeros((batch, 2), np.float32)])
        assert pair.tolist() == [batch, batch]
        if batch not in recent:
            wanted.append(batch)
        recent = [*(b for b in recent if b != batch), batch][-2:]
    assert compiled == wanted


def test_other_types_are_compiled_anew() -> None:
    types: list[str] = []
    session = ByShape(("x",), lambda inputs: types.append(inputs[0].dtype.name) or (lambda _: ()))
    session.run([np.zeros(3, np.int32)])
    session.run([np.zeros(3, np.float32)])
    assert types == ["int32", "float32"]


@pytest.mark.parametrize("make", [files.packed_linear, files.convolutions, files.two_inputs])
def test_functions_are_found_without_parsing(make, tmp_path: Path) -> None:
    model = make()
    assert has_functions(files.save(model, tmp_path, "m")) == bool(model.functions)


@given(st.binary(max_size=60))
def test_any_bytes_can_be_asked_for_functions(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "any.onnx"
    path.write_bytes(content)
    assert has_functions(path) in (True, False)


@pytest.mark.parametrize(
    "make, shape", [(files.packed_linear, (3, 128)), (files.function_of_inputs, (3, 4))]
)
def test_expanded_functions_compute_the_same(make, shape, tmp_path: Path) -> None:
    path = files.save(make(), tmp_path, "functions")
    x = files.draw(*shape)
    with without_functions(path) as plain:
        assert plain != path and not has_functions(plain)
        onnx.checker.check_model(plain)
        np.testing.assert_array_equal(*(files.reference(p, [x])[0] for p in (path, plain)))
    assert not plain.exists() and path.exists()


def test_a_file_without_functions_stays_where_it_is(tmp_path: Path) -> None:
    path = files.save(files.convolutions(), tmp_path, "plain")
    with without_functions(path) as plain:
        assert plain == path


def test_unpacked_weights_replace_their_codes() -> None:
    graph = expand_functions(files.packed_linear()).graph
    assert [node.op_type for node in graph.node] == ["Gemm"]
    assert {i.name for i in graph.initializer} == {"w", "bias"}


def test_operators_are_found_in_functions_too(tmp_path: Path) -> None:
    path = files.save(files.packed_linear(), tmp_path, "packed")
    assert has_operators(path, ["BitShift"]) and has_operators(path, ["Gemm"])
    assert not has_operators(path, ["QuantizeLinear"])


def test_free_sizes_are_named_by_the_file(tmp_path: Path) -> None:
    found = file_inputs(files.save(files.two_inputs(), tmp_path, "two"), CPU)
    assert found == FileInputs(("z", "a"), (("batch", 6), ("batch", 4)))
    assert found.sizes([np.zeros((3, 6)), np.zeros((3, 4))]) == {"batch": 3}
    assert found.sizes([np.zeros((3, 6)), np.zeros((2, 4))]) == {}


@pytest.mark.parametrize("bound", [False, True], ids=["fed", "bound"])
def test_a_fixed_session_runs_its_shapes_alone(bound: bool, tmp_path: Path) -> None:
    path = files.save(files.two_inputs(), tmp_path, "two")
    session = open_fixed(path, CPU, 1, {"batch": 3}, ["CPUExecutionProvider"])
    assert [item.shape for item in session.get_inputs()] == [[3, 6], [3, 4]]
    first, second = ([files.draw(3, 6, seed=s), files.draw(3, 4, seed=s + 10)] for s in (1, 2))
    before = [array.copy() for array in first]
    if bound:
        run = BoundSession(session, first, outputs_like(path, CPU, first), "cpu", 0).run
    else:
        run = FixedSession(session, ("z", "a")).run
    results = [run(first), run(second), run(first)]
    for inputs, outputs in zip([first, second, first], results, strict=True):
        for found, wanted in zip(outputs, files.reference(path, inputs), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for array, copy in zip(first, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_cuda_is_told_what_the_settings_say() -> None:
    def options(**changes: bool) -> dict[str, str]:
        settings = CUDA.model_copy(update=changes)
        return onnxruntime_cuda.provider_options(settings, Placement(threads=1, gpu=2))

    assert options()["device_id"] == "2"
    assert (options()["use_tf32"], options(tf32=False)["use_tf32"]) == ("1", "0")
    graphs = (options()["enable_cuda_graph"], options(cuda_graphs=True)["enable_cuda_graph"])
    assert graphs == ("0", "1")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_tensorrt_is_told_what_the_settings_say(precision, graphs: bool, quantized: bool) -> None:
    settings = TensorRtSettings(name="tensorrt", precision=precision, cuda_graphs=graphs)
    folder = Path("/cache/engines/one")
    options = tensorrt.provider_options(settings, Placement(1, gpu=3), folder, quantized)
    flags = ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_cuda_graph_enable")
    wanted = [precision == "fp16", precision == "bf16", quantized, graphs]
    assert [options[flag] == "1" for flag in flags] == wanted
    assert options["device_id"] == "3"
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == (
        "1",
        str(folder),
    )
    assert all(isinstance(value, str) for value in options.values())


def test_no_two_engines_share_a_folder(tmp_path: Path) -> None:
    x = [np.zeros((1, 3), np.float32)]
    bf16 = TENSORRT.model_copy(update={"precision": "bf16"})
    keys = [
        ("a", TENSORRT, x),
        ("b", TENSORRT, x),
        ("a", bf16, x),
        ("a", TENSORRT, [np.zeros((2, 3), np.float32)]),
        ("a", TENSORRT, [np.zeros((1, 3), np.int64)]),
    ]
    folders = [tensorrt.engine_folder(tmp_path, *key) for key in keys]
    assert len(set(folders)) == len(keys)
    labelled = TENSORRT.model_copy(update={"label": "mine"})
    assert tensorrt.engine_folder(tmp_path, "a", labelled, x) == folders[0]


def test_only_the_newest_engines_are_kept(tmp_path: Path) -> None:
    for age in range(5):
        (tmp_path / f"engine{age}").mkdir()
        os.utime(tmp_path / f"engine{age}", (1000 - age, 1000 - age))
    (tmp_path / "timing.cache").touch()
    tensorrt.keep_newest(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"engine0", "engine1", "timing.cache"}
    tensorrt.keep_newest(tmp_path, 9)
    tensorrt.keep_newest(tmp_path / "missing", 9)
    assert len(list(tmp_path.iterdir())) == 3


def test_engines_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tensorrt.cache_root() == tmp_path / "autocompress" / "tensorrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tensorrt.cache_root() == tmp_path / ".cache" / "autocompress" / "tensorrt"


@pytest.mark.parametrize("both", [False, True])
def test_a_lacking_provider_says_how_to_get_it(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    installed = ("onnxruntime", "onnxruntime-gpu") if both else ("onnxruntime",)
    monkeypatch.setattr(
        onnxruntime_gpu.metadata, "version", _versions(onnxruntime_gpu.metadata, installed)
    )
    for settings in (CUDA, TENSORRT):
        with pytest.raises(DeviceError) as caught:
            onnxruntime_gpu.check_gpu_provider(settings, "WantedProvider")
        text = str(caught.value)
        assert f"autocompress[{settings.extra}]" in text and "WantedProvider" in text
        assert "CPUExecutionProvider" in text
        # Both packages bring one module: only taking the other one out helps.
        assert ("uninstall" in text) == both


def _versions(metadata, installed: tuple[str, ...]):
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    return version


@pytest.mark.parametrize(
    "precision, capability", [("f32", "FP32"), ("bf16", "BF16"), ("f16", "FP16")]
)
def test_openvino_refuses_what_the_cpu_lacks(precision, capability: str, tmp_path: Path) -> None:
    settings = OpenVinoSettings(name="openvino", precision=precision)
    path = files.save(files.convolutions(), tmp_path, "convolutions")
    x = files.draw(2, 3, 32, 32)
    has = capability in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if not has:
        with pytest.raises(DeviceError, match=precision):
            OpenVino().check_available(settings)
        with pytest.raises(DeviceError, match=precision):
            OpenVino().load(path, settings, PLACEMENT)
        return
    OpenVino().check_available(settings)
    (found,) = OpenVino().load(path, settings, PLACEMENT).run([x])
    (wanted,) = files.reference(path, [x])
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    # It really ran in the smaller type, not in float32.
    assert error < 1e-5 if precision == "f32" else 1e-5 < error < 0.05


def test_openvino_runs_rounded_files_on_integer_kernels(tmp_path: Path) -> None:
    if "INT8" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("OpenVINO has no 8-bit kernels for this CPU")
    path = files.save(files.rounded_convolution(), tmp_path, "rounded")
    settings = OpenVinoSettings(name="openvino")
    nodes = OpenVino().profile(path, settings, PLACEMENT, [files.draw(1, 8, 24, 24)], 3)
    (convolution,) = [node for node in nodes if node.operator == "Convolution"]
    assert convolution.kernel.endswith("I8")
    assert convolution.inputs[:2] == ("uint8[1,8,24,24]", "int8[16,8,3,3]")


def test_openvino_keeps_the_threads_that_it_is_given(tmp_path: Path) -> None:
    path = files.save(files.convolutions(), tmp_path, "convolutions")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    for threads in {1, cores}:
        session = OpenVino().load(path, OpenVinoSettings(name="openvino"), Placement(threads))
        assert session.run([files.draw(1, 3, 32, 32)])[0].shape == (1, 5)


def test_a_stray_name_for_two_sizes_stays_free(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "y"], ["z"])]
    shapes = {"x": ["n", 4], "y": ["n", 4]}
    path = files.save(files.build(nodes, shapes, ["z"]), tmp_path, "broadcast")
    inputs = [files.draw(3, 4), files.draw(1, 4)]
    sizes = file_inputs(path, CPU).sizes(inputs)
    session = open_fixed(path, CPU, 1, sizes, ["CPUExecutionProvider"])
    (found,) = FixedSession(session, ("x", "y")).run(inputs)
    np.testing.assert_allclose(found, inputs[0] + inputs[1])
