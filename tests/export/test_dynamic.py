from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from marked import DYNAMIC, STATIC, float_model, integers, marked
from models import assert_tidy, calibration, operators, optimized, relative_error, run_onnx, values
from networks import DENSE, exporter_of, graph_of, make_case, make_device

from autocompress.errors import ExportError
from autocompress.export.quantize import quantize

CLOSENESS = 0.05
DEVICE = make_device()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", DENSE)
def test_every_layer_is_integer_and_close(name: str, bits: int, tmp_path: Path) -> None:
    floating = float_model(name, integers(bits, activation_bits=8, dynamic=True))
    quantized = quantize(floating, calibration(name), DEVICE)
    layers = graph_of(name).layers
    assert quantized.labels == dict.fromkeys((x.name for x in layers), "int8 dynamic")
    assert quantized.integer_layers == len(layers)
    assert_tidy(quantized.model)
    found = operators(optimized(quantized.model, tmp_path))
    products = found.count("DynamicQuantizeMatMul") + found.count("MatMulIntegerToFloat")
    assert products == sum(x.kind != "conv" for x in layers)
    assert found.count("ConvInteger") == sum(x.kind == "conv" for x in layers)
    assert not {"Conv", "FusedConv", "Gemm", "MatMulInteger"} & set(found)
    for batch in (1, 64):
        inputs = [x[:batch] for x in calibration(name)]
        pairs = zip(
            run_onnx(quantized.model, inputs), run_onnx(floating.graph.model, inputs), strict=True
        )
        assert all(0 < relative_error(found, wanted) < CLOSENESS for found, wanted in pairs)


def test_the_range_follows_the_input() -> None:
    """A static range of small calibration inputs would cut what is a hundred times larger."""
    network = marked(make_case("two_inputs").network, DYNAMIC, "side")
    floating = exporter_of("two_inputs").export(network)
    inputs = calibration("two_inputs")
    model = quantize(floating, inputs, DEVICE).model
    large = [inputs[0], 100 * inputs[1]]
    wanted = run_onnx(floating.graph.model, large)[0]
    assert relative_error(run_onnx(model, large)[0], wanted) < CLOSENESS
    static = marked(make_case("two_inputs").network, STATIC, "side")
    model = quantize(exporter_of("two_inputs").export(static), inputs, DEVICE).model
    assert relative_error(run_onnx(model, large)[0], wanted) > 2 * CLOSENESS


def test_layers_that_read_one_tensor_round_it_once() -> None:
    network = marked(make_case("two_outputs").network, DYNAMIC, "classes", "boxes")
    floating = exporter_of("two_outputs").export(network)
    model = quantize(floating, calibration("two_outputs"), DEVICE).model
    assert operators(model).count("DynamicQuantizeLinear") == 1
    assert operators(model).count("MatMulInteger") == 2


def test_products_store_their_codes_as_the_operator_reads_them() -> None:
    floating = float_model("flatten", DYNAMIC)
    stored = values(quantize(floating, calibration("flatten"), DEVICE).model)
    codes, scale = stored["hidden.weight_quantized"], stored["hidden.weight_scale"]
    assert codes.dtype == np.int8 and codes.shape == (54, 16) and scale.shape == (16,)
    weight = values(floating.graph.model)["hidden.weight"]
    np.testing.assert_allclose(codes * scale, weight.T, rtol=3e-7)
    assert stored["conv.weight_quantized"].dtype == np.uint8


def test_static_and_dynamic_layers_live_in_one_file() -> None:
    network = marked(make_case("residual").network, STATIC, "stem", "block1.conv1")
    network = marked(network, DYNAMIC, "block1.conv2", "head")
    floating = exporter_of("residual").export(network)
    quantized = quantize(floating, calibration("residual"), DEVICE)
    assert_tidy(quantized.model)
    assert sorted(quantized.labels.values()) == ["int8", "int8", "int8 dynamic", "int8 dynamic"]
    found, wanted = (
        run_onnx(m, calibration("residual"))[0] for m in (quantized.model, floating.graph.model)
    )
    assert relative_error(found, wanted) < CLOSENESS


def test_a_product_that_scales_its_terms_is_refused() -> None:
    floating = float_model("flatten", DYNAMIC)
    node = next(n for n in floating.graph.model.graph.node if n.op_type == "Gemm")
    kept = [a for a in node.attribute if a.name != "alpha"]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.add(name="alpha", type=1, f=0.5)
    with pytest.raises(ExportError, match="no plain linear layer"):
        quantize(floating, calibration("flatten"), DEVICE)
