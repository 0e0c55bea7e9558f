from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    INT8,
    all_decomposed,
    all_int8,
    all_pruned,
    arrays,
    assert_tidy,
    calibration,
    candidate,
    one,
    operators,
    optimized,
    relative_error,
    run_onnx,
    values,
)
from networks import NAMES, enliven, exporter_of, graph_of, make_case, run
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export import Exporter, FloatModel, quantize, stock_int8
from autocompress.export.fold import fold_batch_norms
from autocompress.export.qdq import activation_range
from autocompress.graph import trace
from autocompress.plan import Step
from autocompress.techniques.precision import symmetric_scale

# Root mean square error of an all-integer file, as a share of the float outputs' deviation.
CLOSENESS = 0.08
STEPS = {"plain": lambda name: (), "pruned": all_pruned, "decomposed": all_decomposed}
SKELETAL = [name for name in NAMES if name != "reshaped"]


def integer_file(name: str, *steps: Step) -> onnx.ModelProto:
    floating = exporter_of(name).export(candidate(name, *steps))
    return quantize(floating, calibration(name)).model


def rounded(network: nn.Module, *layers: str) -> nn.Module:
    """A copy with some layers marked and rounded as `precision` does it."""
    changed = copy.deepcopy(network)
    for name in layers:
        layer = changed.get_submodule(name)
        layer.register_buffer("weight_scale", symmetric_scale(layer.weight.detach().flatten(1), 8))
    return changed


def exported(network: nn.Module, inputs: tuple[Tensor, ...]) -> FloatModel:
    example = tuple(x[:2] for x in inputs)
    parity = tuple(x[:8] for x in inputs)
    original = copy.deepcopy(network)
    for module in original.modules():
        module._buffers.pop("weight_scale", None)
    return Exporter(original, trace(original, example), example, parity).export(network)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", SKELETAL)
def test_integer_files_are_close_to_float_ones_and_tidy(name: str, kind: str) -> None:
    network = candidate(name, *STEPS[kind](name), *all_int8(name))
    floating = exporter_of(name).export(network)
    quantized = quantize(floating, calibration(name))
    assert quantized.integer_layers == len(floating.scales) > 0
    assert_tidy(quantized.model)
    for batch in (1, 3, 64):
        inputs = tuple(x[:batch] for x in make_case(name).inputs)
        found = run_onnx(quantized.model, arrays(inputs))
        wanted = run_onnx(floating.graph.model, arrays(inputs))
        assert [f.shape for f in found] == [w.shape for w in wanted]
        if batch > 1:
            assert all(relative_error(f, w) < CLOSENESS for f, w in zip(found, wanted, strict=True))
            assert any(relative_error(f, w) > 1e-6 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", SKELETAL)
def test_the_files_integers_are_the_modules_rounded_weights(name: str) -> None:
    network = candidate(name, *all_decomposed(name), *all_int8(name))
    floating = exporter_of(name).export(network)
    stored = values(quantize(floating, calibration(name)).model)
    folded = fold_batch_norms(network, graph_of(name).norms)
    assert floating.graph.sites
    for part, site in floating.graph.sites.items():
        codes = stored[f"{site.initializer}_quantized"]
        scale = stored[f"{site.initializer}_scale"]
        assert codes.dtype == np.int8 and len(scale) == codes.shape[site.axis]
        assert np.abs(codes).max() <= 127
        shape = [1] * codes.ndim
        shape[site.axis] = -1
        module = folded.get_submodule(part)
        weight = module.weight.detach().numpy()
        wanted = weight.T if site.axis else weight
        np.testing.assert_allclose(codes * scale.reshape(shape), wanted, rtol=1e-5, atol=1e-7)
        assert not stored[f"{site.initializer}_zero_point"].any()
        assert site.initializer not in stored


def test_the_residual_network_runs_on_integer_kernels(tmp_path: Path) -> None:
    """Every convolution, the residual sums and the last layer; nothing falls back to float."""
    found = operators(optimized(integer_file("residual", *all_int8("residual")), tmp_path))
    assert found.count("QLinearConv") == 6
    assert found.count("QLinearAdd") == 2
    assert "Conv" not in found and "Add" not in found and "Gemm" not in found
    assert found.count("QGemm") == 1


@pytest.mark.parametrize(("name", "layers"), [("depthwise", 3), ("concat", 3), ("signal", 2)])
def test_other_convolutions_run_on_integer_kernels(name: str, layers: int, tmp_path: Path) -> None:
    found = operators(optimized(integer_file(name, *all_int8(name)), tmp_path))
    assert found.count("QLinearConv") == layers
    assert not {"Conv", "FusedConv"} & set(found)


def test_both_parts_of_decomposed_layers_run_on_integer_kernels(tmp_path: Path) -> None:
    decomposed = all_decomposed("residual")
    found = operators(
        optimized(integer_file("residual", *decomposed, *all_int8("residual")), tmp_path)
    )
    convolutions = [s.target for s in decomposed if s.target != "head"]
    assert len(convolutions) > 3
    assert found.count("QLinearConv") == 6 + len(convolutions)
    assert not {"Conv", "FusedConv"} & set(found)


def test_matrix_products_on_tokens_are_integer(tmp_path: Path) -> None:
    found = operators(optimized(integer_file("tokens", *all_int8("tokens")), tmp_path))
    assert "MatMul" not in found and "Gemm" not in found and "FusedMatMul" not in found


def test_mixed_precision_leaves_other_layers_float(tmp_path: Path) -> None:
    case = make_case("residual")
    network = candidate("residual", one("block1.conv1", INT8), one("head", INT8))
    floating = exporter_of("residual").export(network)
    quantized = quantize(floating, calibration("residual"))
    assert quantized.integer_layers == 2
    stored, before = values(quantized.model), values(floating.graph.model)
    assert_tidy(quantized.model)
    for name in ("stem", "block1.conv2", "block2.conv1", "block2.shortcut"):
        np.testing.assert_array_equal(stored[f"{name}.weight"], before[f"{name}.weight"])
    integer = [n for n, v in stored.items() if v.dtype == np.int8 and n.endswith("_quantized")]
    assert sorted(integer) == ["block1.conv1.weight_quantized", "head.weight_quantized"]
    found = operators(optimized(quantized.model, tmp_path))
    assert found.count("QLinearConv") == 1
    outputs = run_onnx(quantized.model, calibration("residual"))[0]
    assert relative_error(outputs, run(network, case.inputs)[0].numpy()) < CLOSENESS


def test_integer_files_are_smaller() -> None:
    floating = exporter_of("tokens").export(candidate("tokens", *all_int8("tokens")))
    stored = values(quantize(floating, calibration("tokens")).model)
    weights = [v for v in stored.values() if v.ndim == 2]
    assert {v.dtype for v in weights} == {np.dtype(np.int8)}


def test_without_a_chosen_layer_the_model_stays_as_it_is() -> None:
    floating = exporter_of("flatten").export(candidate("flatten"))
    quantized = quantize(floating, calibration("flatten"))
    assert quantized.integer_layers == 0
    assert quantized.model.SerializeToString() == floating.graph.model.SerializeToString()


def test_quantizing_leaves_the_float_model_as_it_is() -> None:
    floating = exporter_of("flatten").export(candidate("flatten", *all_int8("flatten")))
    before = floating.graph.model.SerializeToString()
    quantize(floating, calibration("flatten"))
    assert floating.graph.model.SerializeToString() == before


def test_a_weight_that_no_layer_reads_is_refused() -> None:
    floating = exporter_of("flatten").export(candidate("flatten"))
    wrong = FloatModel(floating.graph, {"nothing": np.ones(3, np.float32)}, 0.0, False)
    with pytest.raises(ExportError) as caught:
        quantize(wrong, calibration("flatten"))
    assert "nothing" in str(caught.value.given)


class Plain(nn.Module):
    """A convolution that gives the output itself, after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.output = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.relu(self.norm(self.conv(x))))


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    network, x = Plain(), torch.randn(32, 2, 6, 6)
    enliven(network, (x,))
    return network, (x,)


def test_a_convolution_that_gives_the_output_is_integer(plain, tmp_path: Path) -> None:
    network, inputs = plain
    floating = exported(rounded(network, "conv", "output"), inputs)
    model = quantize(floating, arrays(inputs)).model
    assert_tidy(model)
    assert [o.name for o in model.graph.output] == [
        o.name for o in floating.graph.model.graph.output
    ]
    assert operators(optimized(model, tmp_path)).count("QLinearConv") == 2
    wanted = run_onnx(floating.graph.model, arrays(inputs))[0]
    assert relative_error(run_onnx(model, arrays(inputs))[0], wanted) < CLOSENESS


def test_a_norm_that_switches_a_channel_off(plain) -> None:
    """Its scale is zero, so is the folded weight's; the bias stays."""
    network = copy.deepcopy(plain[0])
    with torch.no_grad():
        network.norm.weight[1:3] = 0
        network.norm.bias[1:3] = torch.tensor([0.0, 0.7])
    floating = exported(rounded(network, "conv", "output"), plain[1])
    with np.errstate(all="raise"):
        model = quantize(floating, arrays(plain[1])).model
    wanted = run_onnx(floating.graph.model, arrays(plain[1]))[0]
    assert relative_error(run_onnx(model, arrays(plain[1]))[0], wanted) < CLOSENESS


def test_a_bias_that_would_overflow_its_integers(plain) -> None:
    """Tiny weights and inputs make a step of 1e-11, of which a bias of 0.5 is 5e10."""
    network = copy.deepcopy(plain[0])
    with torch.no_grad():
        network.conv.weight[3] *= 1e-6
        network.norm.running_mean[3], network.norm.running_var[3] = 0, 1
        network.norm.bias[3] = 0.5
    inputs = (1e-4 * plain[1][0],)
    floating = exported(rounded(network, "conv", "output"), inputs)
    stored = values(quantize(floating, arrays(inputs)).model)
    step = floating.scales["conv.weight"][3] * stored["x_scale"]
    assert abs(values(floating.graph.model)["conv.bias"][3]) / step > 2**31
    name = next(n for n, v in stored.items() if v.dtype == np.int32 and v.shape == (6,) and v.any())
    scale = stored[name.replace("_quantized", "_scale")]
    np.testing.assert_allclose(
        stored[name] * scale.astype(np.float64),
        values(floating.graph.model)["conv.bias"],
        atol=1e-4,
    )
    model = quantize(floating, arrays(inputs)).model
    wanted = run_onnx(floating.graph.model, arrays(inputs))[0]
    found = run_onnx(model, arrays(inputs))[0]
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


finite = st.floats(-1e4, 1e4, width=32)


@given(st.lists(finite, min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_zero_is_exact_and_values_stay_in_reach(data: list[float]) -> None:
    x = np.array(data, np.float32)
    grid = activation_range(x)
    assert grid.scale > 0 and np.isfinite(grid.scale)
    assert isinstance(grid.zero_point, np.uint8)
    codes = np.clip(np.round(x.astype(np.float64) / grid.scale) + int(grid.zero_point), 0, 255)
    back = (codes - int(grid.zero_point)) * float(grid.scale)
    assert (back[x == 0] == 0).all()
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = max((float(high) - float(low)) / 255, 1e-12)
    plain = np.clip(np.round(x / scale) + np.round(-low / scale), 0, 255) - np.round(-low / scale)
    best = np.square(plain * scale - x.astype(np.float64)).sum()
    assert np.square(back - x).sum() <= best * (1 + 1e-3) + 1e-6 * np.square(x).sum() + 1e-12


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-6, 250.0])
def test_constant_tensors_are_kept(value: float) -> None:
    grid = activation_range(np.full((4, 5), value, np.float32))
    code = np.clip(np.round(value / float(grid.scale)) + int(grid.zero_point), 0, 255)
    assert (code - int(grid.zero_point)) * float(grid.scale) == pytest.approx(value, rel=5e-3)


def test_all_zero_tensors_have_a_scale() -> None:
    grid = activation_range(np.zeros((4, 5), np.float32))
    assert grid.scale > 0
    assert np.round(0 / float(grid.scale)) + int(grid.zero_point) == int(grid.zero_point)


def test_positive_values_use_the_whole_grid() -> None:
    grid = activation_range(np.linspace(0, 2, 1000, dtype=np.float32))
    assert grid.zero_point == 0
    assert float(grid.scale) == pytest.approx(2 / 255, rel=0.03)


def test_rare_outliers_are_clipped() -> None:
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    values[7] = 8.0
    assert float(activation_range(values).scale) < (values.max() - values.min()) / 255 * 0.9


@pytest.mark.parametrize("features", [8, 16, 48])
def test_every_feature_counts_in_a_large_tensor(features: int) -> None:
    """One feature is wide and fills its range, the others are small: a fixed stride misses it."""
    rng = np.random.default_rng(0)
    x = 0.1 * rng.standard_normal((400_000 // features * 2, features)).astype(np.float32)
    x[:, features // 2 - 1] = rng.uniform(-10, 10, len(x))
    grid = activation_range(x)
    assert float(grid.scale) > 0.9 * 20 / 255
    assert activation_range(x) == grid


@pytest.mark.parametrize("name", ["residual", "two_inputs"])
def test_the_stock_tools_file_loads_and_is_close(name: str, tmp_path: Path) -> None:
    floating = exporter_of(name).export(candidate(name))
    original, target = tmp_path / "original.onnx", tmp_path / "int8.onnx"
    onnx.save(floating.graph.model, original)
    names = [i.name for i in floating.graph.model.graph.input]
    stock_int8(original, target, names, calibration(name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8.onnx", "original.onnx"]
    model = onnx.load(target)
    assert "QuantizeLinear" in operators(model)
    wanted = run_onnx(floating.graph.model, calibration(name))[0]
    assert relative_error(run_onnx(model, calibration(name))[0], wanted) < 0.15


def test_the_stock_tools_failure_is_an_export_error(tmp_path: Path) -> None:
    broken = tmp_path / "original.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ExportError, match="static quantizer"):
        stock_int8(broken, tmp_path / "int8.onnx", ["x"], [np.zeros((2, 2), np.float32)])
    assert not (tmp_path / "int8.onnx").exists()
