from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marked import bits_after_loading, coded, float_model, integers, marked
from models import (
    arrays,
    assert_tidy,
    calibration,
    candidate,
    operators,
    optimized,
    relative_error,
    run_onnx,
    values,
)
from networks import DENSE, exporter_of, make_case, make_device
from onnx import helper, numpy_helper

from autocompress.errors import ExportError
from autocompress.export.exporter import FloatModel
from autocompress.export.packed import pack, stored_weight_bytes
from autocompress.export.quantize import quantize
from autocompress.techniques.technique import CodebookWeight

DEVICE = make_device()
WAYS = {
    "int8": integers(8),
    "int4": integers(4),
    "int3": integers(3),
    "int2": integers(2),
    "int4 in fives": integers(4, 5),
    "int8 in thirty-twos": integers(8, 32),
    "int2 in sixteens": integers(2, 16),
    "one int4 scale": integers(4, per_tensor=True),
}
FLOATS = {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}
ADDED = {"Cast", "Mul", "DequantizeLinear", "BitShift", "BitwiseAnd", "Sub", "Expand"}


def unpacked_weights(model: onnx.ModelProto, floating: FloatModel) -> dict[str, np.ndarray]:
    """What the runtime hands to the layers."""
    names = [site.initializer for site in floating.graph.sites.values()]
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    session = ort.InferenceSession(watched.SerializeToString())
    feed = {i.name: np.zeros([1, *i.shape[1:]], np.float32) for i in session.get_inputs()}
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DENSE)
def test_the_runtime_computes_with_the_float_models_weights(name: str, way: str) -> None:
    floating = float_model(name, WAYS[way])
    quantized = quantize(floating, calibration(name), DEVICE)
    assert set(quantized.labels.values()) == {"storage only"}
    assert quantized.integer_layers == 0
    assert_tidy(quantized.model)
    wanted, found = values(floating.graph.model), unpacked_weights(quantized.model, floating)
    assert found
    for initializer, value in found.items():
        np.testing.assert_allclose(value, wanted[initializer], rtol=3e-7, atol=0)


@pytest.mark.parametrize("code_bits", [4, 8, 16])
@pytest.mark.parametrize("name", DENSE)
def test_codewords_are_looked_up(name: str, code_bits: int) -> None:
    floating = exporter_of(name).export(coded(make_case(name).network, code_bits))
    quantized = quantize(floating, calibration(name), DEVICE)
    assert set(quantized.labels.values()) == {"storage only"}
    assert_tidy(quantized.model)
    wanted, stored = values(floating.graph.model), values(quantized.model)
    for initializer, value in unpacked_weights(quantized.model, floating).items():
        np.testing.assert_allclose(value, wanted[initializer], rtol=3e-7, atol=0)
        assert stored[f"{initializer}_codes"].dtype == (np.uint16 if code_bits > 8 else np.uint8)
        assert initializer not in stored


@pytest.mark.parametrize("way", [*WAYS, "codewords"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "tokens"])
def test_nothing_of_the_unpacking_is_left_at_run_time(name: str, way: str, tmp_path: Path) -> None:
    """Every constant is a plain float tensor, and the graph is that of the float model."""
    if way == "codewords":
        floating = exporter_of(name).export(coded(make_case(name).network, 8))
    else:
        floating = float_model(name, WAYS[way])
    model = quantize(floating, calibration(name), DEVICE).model
    loaded, plain = optimized(model, tmp_path), optimized(floating.graph.model, tmp_path)
    assert operators(loaded) == operators(plain)
    assert not ADDED & set(operators(loaded)) and FLOATS & set(operators(loaded))
    assert bits_after_loading(loaded) == {onnx.TensorProto.FLOAT}
    assert len(loaded.functions) == 0


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        (integers(8), 16 * 54 + 4 * 16),
        (integers(4), 16 * 54 // 2 + 4 * 16),
        (integers(3), 16 * 54 // 2 + 4 * 16),
        (integers(2), 16 * 54 // 4 + 4 * 16),
        (integers(4, 32), 16 * 54 // 2 + 4 * 16 * 2),
        (integers(2, 16), 16 * 54 // 4 + 4 * 16 * 4),
        (integers(8, per_tensor=True), 16 * 54 + 4),
        (integers(8, activation_bits=8), 16 * 54 + 4 * 16),
        (integers(2, activation_bits=8), 16 * 54 + 4 * 16),
        (integers(4, activation_bits=16), 16 * 54 // 2 + 4 * 16),
        (integers(8, activation_bits=8, dynamic=True), 16 * 54 + 4 * 16),
        (integers(32, activation_bits=8), 4 * 16 * 54),
    ],
)  # fmt: skip
def test_stored_bytes(how, wanted: int) -> None:
    model = quantize(float_model("flatten", how), calibration("flatten"), DEVICE).model
    assert stored_weight_bytes(model, "hidden.weight") == wanted


@pytest.mark.parametrize(("code_bits", "code_bytes"), [(4, 216), (8, 432), (16, 864)])
def test_stored_bytes_of_codewords(code_bits: int, code_bytes: int) -> None:
    floating = exporter_of("flatten").export(coded(make_case("flatten").network, code_bits))
    model = quantize(floating, calibration("flatten"), DEVICE).model
    words = min(2**code_bits, 300)
    found = stored_weight_bytes(model, "hidden.weight")
    assert found == code_bytes + 4 * words * 2 + 4 * 16


def test_stored_bytes_of_one_weight_leave_out_others_of_a_like_name() -> None:
    arrays = {"v_1": np.zeros(3, np.float32), "v_1_scale": np.zeros(5, np.float32)}
    arrays |= {"v_10": np.zeros(7, np.float32), "v_1_bias": np.zeros(9, np.float32)}
    graph = onnx.GraphProto(initializer=[numpy_helper.from_array(a, n) for n, a in arrays.items()])
    assert stored_weight_bytes(onnx.ModelProto(graph=graph), "v_1") == 4 * 8


def test_files_with_packed_weights_are_smaller() -> None:
    sizes = {
        bits: len(
            quantize(float_model("residual", integers(bits)), calibration("residual"), DEVICE)
            .model.SerializeToString()
        )
        for bits in (32, 8, 4, 2)
    }  # fmt: skip
    assert sizes[32] > sizes[8] > sizes[4] > sizes[2]


def test_packed_layers_and_integer_ones_live_in_one_file() -> None:
    network = make_case("tokens").network
    network = marked(network, integers(4), "up", "embed")
    network = marked(network, integers(activation_bits=8), "down")
    network = coded(network, 8, "head")
    floating = exporter_of("tokens").export(network)
    before = floating.graph.model.SerializeToString()
    quantized = quantize(floating, calibration("tokens"), DEVICE)
    assert quantized.labels == {
        "up": "storage only", "embed": "storage only", "down": "int8", "head": "storage only",
    }  # fmt: skip
    assert floating.graph.model.SerializeToString() == before
    assert_tidy(quantized.model)
    assert sorted(f.name for f in quantized.model.functions) == ["Codebook8", "Int4Transposed"]


def test_weights_that_are_not_their_codewords_are_refused() -> None:
    network = coded(make_case("flatten").network, 4)
    with torch.no_grad():
        network.hidden.weight[3, 7] *= 1.01
    floating = exporter_of("flatten").export(network)
    with pytest.raises(ExportError, match="codewords") as caught:
        quantize(floating, calibration("flatten"), DEVICE)
    assert "hidden.weight" in str(caught.value.given)


def test_codes_without_a_codeword_are_refused() -> None:
    network = coded(make_case("flatten").network, 8)
    network.hidden.codebook_weight = CodebookWeight(4)
    floating = exporter_of("flatten").export(network)
    with pytest.raises(ExportError, match="no codeword") as caught:
        quantize(floating, calibration("flatten"), DEVICE)
    assert caught.value.allowed == "0 to 15"


def test_without_a_chosen_layer_the_model_stays_as_it_is() -> None:
    floating = exporter_of("flatten").export(candidate("flatten"))
    quantized = quantize(floating, calibration("flatten"), DEVICE)
    assert quantized.labels == {} and not quantized.model.functions
    assert quantized.model.SerializeToString() == floating.graph.model.SerializeToString()


@pytest.mark.parametrize("factor", [0.0, 1e-13, 1e-25, 1e-36])
@pytest.mark.parametrize("how", [integers(4), integers(8, activation_bits=8)])
def test_norms_may_switch_channels_off(how, factor: float) -> None:
    network = copy.deepcopy(make_case("residual").network)
    with torch.no_grad():
        network.block1.bn1.weight[2:4] = factor
    floating = exporter_of("residual").export(marked(network, how))
    with np.errstate(all="raise"):
        model = quantize(floating, calibration("residual"), DEVICE).model
    inputs = calibration("residual")
    found, wanted = (run_onnx(m, inputs)[0] for m in (model, floating.graph.model))
    assert relative_error(found, wanted) < 0.08


def test_any_batch_size_runs() -> None:
    floating = float_model("residual", integers(2))
    model = quantize(floating, calibration("residual"), DEVICE).model
    for batch in (1, 3):
        x = arrays(tuple(x[:batch] for x in make_case("residual").inputs))
        np.testing.assert_allclose(
            run_onnx(model, x)[0], run_onnx(floating.graph.model, x)[0], rtol=1e-4, atol=1e-5
        )


@given(st.sampled_from([2, 4]), st.lists(st.integers(0, 3), max_size=30))
def test_packing_fills_bytes_from_the_lowest_bits(bits: int, codes: list[int]) -> None:
    packed = pack(np.array(codes, np.int8), bits)
    assert packed.dtype == np.uint8 and len(packed) == -(-len(codes) * bits // 8)
    each = 8 // bits
    found = [int(b) >> (bits * i) & (2**bits - 1) for b in packed for i in range(each)]
    assert found[: len(codes)] == codes and not any(found[len(codes) :])
