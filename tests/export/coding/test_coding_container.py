from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import all_int8, arrays, candidate, run_onnx
from networks import exporter_of, make_case, make_device
from onnx import TensorProto, helper, numpy_helper
from onnx_files import KINDS, model_of, random_tensor, raw_tensor, small_model

from autocompress.errors import ExportError
from autocompress.export.coding import (
    CodedSizes,
    decode_file,
    decode_model,
    describe,
    encode_file,
    encode_model,
    load_coded,
    wire,
)
from autocompress.export.quantize import quantize


def round_trip(data: bytes) -> CodedSizes:
    container = encode_model(data)
    assert decode_model(container) == data
    assert encode_model(data) == container
    sizes = describe(container)
    assert sizes.file_bytes == len(data) and sizes.coded_bytes == len(container)
    assert sum(x.file_bytes for x in sizes.tensors) + sizes.rest_file_bytes == len(data)
    left = sizes.coded_bytes - sizes.rest_coded_bytes - sum(x.coded_bytes for x in sizes.tensors)
    assert 25 <= left <= 60
    return sizes


def test_a_model_comes_back_with_its_sizes() -> None:
    sizes = round_trip(small_model())
    assert [x.name for x in sizes.tensors] == ["steps", "weight", "floats"]
    assert sizes.tensors[1].coded_bytes < 100 and sizes.ratio > 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_type_comes_back(kind: int) -> None:
    sizes = round_trip(model_of(random_tensor("a", kind, (31, 17)), random_tensor("b", kind, (9,))))
    assert sizes.tensors[0].name == "a"


@pytest.mark.parametrize(
    "tensor",
    [
        helper.make_tensor("typed", TensorProto.FLOAT, [30, 4], np.arange(120.0)),
        helper.make_tensor("doubles", TensorProto.DOUBLE, [30, 4], np.arange(120.0)),
        helper.make_tensor("integers", TensorProto.INT32, [300], range(300)),
        helper.make_tensor("text", TensorProto.STRING, [2], [b"x" * 200, b"y"]),
        raw_tensor("short", TensorProto.FLOAT, (100, 100), b"\x01" * 999),
        raw_tensor("long", TensorProto.INT4, (3,), b"\x01" * 999),
        raw_tensor("spare bits", TensorProto.INT4, (401,), b"\xff" * 201),
        raw_tensor("no type", 0, (100,), b"\x02" * 100),
        raw_tensor("new type", 99, (100,), b"\x03" * 100),
        raw_tensor("no shape", TensorProto.FLOAT, (), b"\x04" * 400),
        raw_tensor("empty", TensorProto.FLOAT, (0, 5), b""),
        raw_tensor("huge shape", TensorProto.FLOAT, (1 << 62, 1 << 62), b"\x05" * 400),
        raw_tensor("negative", TensorProto.FLOAT, (-1, -100), b"\x06" * 400),
        raw_tensor("deep", TensorProto.INT8, (2,) * 8, bytes(range(256))),
        raw_tensor("deeper", TensorProto.INT8, (2,) * 8 + (1,) * 20, bytes(range(256))),
    ],
    ids=lambda tensor: tensor.name,
)
def test_odd_tensors_come_back(tensor: TensorProto) -> None:
    round_trip(model_of(tensor))


def test_tensors_outside_the_file_are_counted() -> None:
    tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[1000])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    assert round_trip(model_of(tensor)).external_tensors == 1


def test_unknown_and_unordered_fields_come_back() -> None:
    data = small_model()
    unknown = b"\xf2\x07\x03abc" + b"\xf8\x07\x96\x01" + b"\xfd\x07abcd" + b"\xf9\x07abcdefgh"
    round_trip(unknown + data + unknown)
    round_trip(data + data)
    # A length in a longer encoding than it needs.
    tensor = b"\x08\x78" + b"\x10\x03" + b"\x4a\xf8\x80\x00" + bytes(120) + b"\x42\x01w"
    graph = b"\x2a" + bytes([0x80 | len(tensor) & 127, len(tensor) >> 7]) + tensor
    whole = b"\x3a" + bytes([0x80 | len(graph) & 127, len(graph) >> 7]) + graph
    assert [x.name for x in round_trip(b"\x08\x0a" + whole).tensors] == ["w"]


def test_subgraphs_attributes_functions_and_sparse_tensors_are_found() -> None:
    weights = [random_tensor(f"w{i}", TensorProto.INT8, (40, 5)) for i in range(5)]
    inner = helper.make_graph([], "inner", [], [], initializer=[weights[0]])
    nodes = (
        helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner),
        helper.make_node("Constant", [], ["c"], value=weights[1]),
        helper.make_node("Many", [], ["d"], values=weights[2:4], domain="own"),
    )
    model = onnx.ModelProto.FromString(model_of(nodes=nodes))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(weights[4])
    function = helper.make_function("own", "F", [], ["o"], [nodes[1]], [])
    model.functions.append(function)
    names = [x.name for x in round_trip(model.SerializeToString()).tensors]
    assert sorted(names) == ["w0", "w0", "w1", "w1", "w2", "w3", "w4"]


def test_large_tensors_are_coded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LARGEST_TENSOR", 1000)
    monkeypatch.setattr(wire, "_LARGEST_PIECE", 1000)
    sizes = round_trip(
        model_of(
            random_tensor("rows", TensorProto.INT8, (90, 40)),
            random_tensor("odd", TensorProto.INT4, (37, 91)),
            random_tensor("long row", TensorProto.FLOAT, (2, 2, 701)),
            random_tensor("untyped", TensorProto.COMPLEX64, (999,)),
        )
    )
    names = [x.name for x in sizes.tensors]
    assert names == ["rows", "odd", "long row", "untyped"]
    assert sizes.tensors[0].file_bytes == 3600


@pytest.mark.parametrize(
    "data", [b"", b"\x08", b"not a model at all", bytes(1000), b"\x08\x0a", b"PK\x03\x04" * 50]
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ExportError, match="no ONNX model"):
        encode_model(data)


def test_a_file_over_the_limit_is_refused_before_work() -> None:
    data = small_model()
    container = encode_model(data)
    assert decode_model(container, len(data)) == data
    with pytest.raises(ExportError, match="larger than the limit"):
        decode_model(container, len(data) - 1)


def test_noise_is_hardly_larger_than_its_file() -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    data = model_of(raw_tensor("noise", TensorProto.UINT8, (50_000,), noise))
    assert len(encode_model(data)) <= len(data) + 64


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_exported_models_run_from_their_containers(name: str, tmp_path: Path) -> None:
    floating = exporter_of(name).export(candidate(name, *all_int8(name)))
    quantized = quantize(floating, arrays(make_case(name).inputs), make_device())
    for model in (floating.graph.model, quantized.model):
        source, coded, back = tmp_path / "m.onnx", tmp_path / "m.acz", tmp_path / "back.onnx"
        source.write_bytes(model.SerializeToString())
        sizes = encode_file(source, coded)
        assert coded.stat().st_size == sizes.coded_bytes < sizes.file_bytes
        assert decode_file(coded, back) == sizes.file_bytes
        assert back.read_bytes() == source.read_bytes()
        assert describe(coded.read_bytes()) == sizes
        session = load_coded(coded, threads=1)
        inputs = [x[:3] for x in arrays(make_case(name).inputs)]
        feed = dict(zip([i.name for i in session.get_inputs()], inputs, strict=True))
        for found, wanted in zip(session.run(None, feed), run_onnx(model, inputs), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_integers_of_a_real_model_beat_general_compression() -> None:
    generator = np.random.default_rng(0)
    weight = np.round(generator.laplace(size=(64, 64, 3, 3)) * 0.8).astype(np.int8)
    data = model_of(numpy_helper.from_array(weight, "weight"))
    assert len(encode_model(data)) < 0.85 * len(lzma.compress(data, preset=9))


def test_files_that_cannot_be_read_or_run_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        encode_file(tmp_path / "none.onnx", tmp_path / "none.acz")
    with pytest.raises(ExportError, match="cannot be read"):
        load_coded(tmp_path / "none.acz")
    path = tmp_path / "broken.acz"
    path.write_bytes(encode_model(model_of(nodes=(helper.make_node("NoSuch", ["x"], ["z"]),))))
    with pytest.raises(ExportError, match="cannot load"):
        load_coded(path)
