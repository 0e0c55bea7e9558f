from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from marked import STATIC, exported, float_model, integers, marked
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
from networks import DENSE, enliven, exporter_of, graph_of, make_case, make_device, run
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export.exporter import FloatModel, StoredIntegers
from autocompress.export.quantize import quantize
from autocompress.graph.norms import fold_batch_norms
from autocompress.plan import Step

# Root mean square error of an all-integer file, as a share of the float outputs' deviation.
CLOSENESS = 0.08
STEPS = {"plain": lambda name: (), "pruned": all_pruned, "decomposed": all_decomposed}
SKELETAL = [name for name in DENSE if name != "reshaped"]
DEVICE = make_device()


def integer_file(name: str, *steps: Step) -> onnx.ModelProto:
    floating = exporter_of(name).export(candidate(name, *steps))
    return quantize(floating, calibration(name), DEVICE).model


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", SKELETAL)
def test_integer_files_are_close_to_float_ones_and_tidy(name: str, kind: str) -> None:
    network = candidate(name, *STEPS[kind](name), *all_int8(name))
    floating = exporter_of(name).export(network)
    quantized = quantize(floating, calibration(name), DEVICE)
    assert quantized.integer_layers == len(floating.integers) > 0
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
    stored = values(quantize(floating, calibration(name), DEVICE).model)
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
    quantized = quantize(floating, calibration("residual"), DEVICE)
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
    stored = values(quantize(floating, calibration("tokens"), DEVICE).model)
    weights = [v for v in stored.values() if v.ndim == 2]
    assert {v.dtype for v in weights} == {np.dtype(np.int8)}


def test_without_a_chosen_layer_the_model_stays_as_it_is() -> None:
    floating = exporter_of("flatten").export(candidate("flatten"))
    quantized = quantize(floating, calibration("flatten"), DEVICE)
    assert quantized.integer_layers == 0
    assert quantized.model.SerializeToString() == floating.graph.model.SerializeToString()


def test_quantizing_leaves_the_float_model_as_it_is() -> None:
    floating = exporter_of("flatten").export(candidate("flatten", *all_int8("flatten")))
    before = floating.graph.model.SerializeToString()
    quantize(floating, calibration("flatten"), DEVICE)
    assert floating.graph.model.SerializeToString() == before


def test_a_weight_that_no_layer_reads_is_refused() -> None:
    floating = exporter_of("flatten").export(candidate("flatten"))
    unread = StoredIntegers(STATIC, np.ones((3, 1), np.float32), None)
    wrong = FloatModel(floating.graph, {"nothing": unread}, {}, 0.0, False)
    with pytest.raises(ExportError) as caught:
        quantize(wrong, calibration("flatten"), DEVICE)
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
    floating = exported(marked(network, STATIC), network, inputs)
    model = quantize(floating, arrays(inputs), DEVICE).model
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
    floating = exported(marked(network, STATIC), network, plain[1])
    with np.errstate(all="raise"):
        model = quantize(floating, arrays(plain[1]), DEVICE).model
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
    floating = exported(marked(network, STATIC), network, inputs)
    stored = values(quantize(floating, arrays(inputs), DEVICE).model)
    step = floating.integers["conv.weight"].scale[3, 0] * stored["x_scale"]
    assert abs(values(floating.graph.model)["conv.bias"][3]) / step > 2**31
    name = next(n for n, v in stored.items() if v.dtype == np.int32 and v.shape == (6,) and v.any())
    scale = stored[name.replace("_quantized", "_scale")]
    np.testing.assert_allclose(
        stored[name] * scale.astype(np.float64),
        values(floating.graph.model)["conv.bias"],
        atol=1e-4,
    )
    model = quantize(floating, arrays(inputs), DEVICE).model
    wanted = run_onnx(floating.graph.model, arrays(inputs))[0]
    found = run_onnx(model, arrays(inputs))[0]
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.last(torch.relu(self.middle(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def chain() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Chain().eval(), (torch.randn(32, 2, 8, 8),)


def quantized_chain(chain, *marks) -> onnx.ModelProto:
    network = chain[0]
    for how, layer in marks:
        network = marked(network, how, layer)
    floating = exported(network, chain[0], chain[1])
    model = quantize(floating, arrays(chain[1]), DEVICE).model
    assert_tidy(model)
    wanted = run_onnx(floating.graph.model, arrays(chain[1]))[0]
    assert relative_error(run_onnx(model, arrays(chain[1]))[0], wanted) < CLOSENESS
    return model


@pytest.mark.parametrize("bits", [32, 4])
def test_a_float_layer_between_integer_layers_stays_float(bits: int, chain, tmp_path: Path) -> None:
    """The runtime would round its weight to 8 bits unasked."""
    marks = [(STATIC, "first"), (STATIC, "last")]
    if bits == 4:
        marks.append((integers(4), "middle"))
    found = operators(optimized(quantized_chain(chain, *marks), tmp_path))
    assert found.count("QLinearConv") == 2
    assert found.count("Conv") + found.count("FusedConv") == 1


@pytest.mark.parametrize("order", [(True, False, True), (False, True, False), (True, True, True)])
def test_neighbours_may_have_different_signs(
    order: tuple[bool, ...], chain, tmp_path: Path
) -> None:
    """Integers of both kinds stand for the same numbers, so nothing is lost between them."""
    layers = ("first", "middle", "last")
    marks = [
        (integers(activation_bits=8, signed=signed), layer)
        for signed, layer in zip(order, layers, strict=True)
    ]
    model = quantized_chain(chain, *marks)
    plain = quantized_chain(chain, *((STATIC, layer) for layer in layers))
    found, wanted = (run_onnx(m, arrays(chain[1]))[0] for m in (model, plain))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.01 * np.abs(wanted).max())
    kinds = {v.dtype for n, v in values(model).items() if n.endswith("_zero_point")}
    assert kinds == {np.dtype(np.int8 if signed else np.uint8) for signed in order}
    assert operators(optimized(model, tmp_path)).count("QLinearConv") == 3


def test_inputs_of_sixteen_bits_are_far_finer_than_of_eight() -> None:
    errors = []
    for bits in (8, 16):
        floating = float_model("residual", integers(activation_bits=bits, signed=bits == 16))
        quantized = quantize(floating, calibration("residual"), DEVICE)
        assert_tidy(quantized.model)
        assert set(quantized.labels.values()) == {"int8" if bits == 8 else "int16 emulated"}
        assert quantized.integer_layers == (7 if bits == 8 else 0)
        found = run_onnx(quantized.model, calibration("residual"))[0]
        errors.append(
            relative_error(found, run_onnx(floating.graph.model, calibration("residual"))[0])
        )
    assert errors[1] < errors[0] / 50
    dtypes = {v.dtype for v in values(quantized.model).values()}
    assert np.dtype(np.int16) in dtypes and np.dtype(np.uint16) not in dtypes


def test_layers_of_eight_and_sixteen_bits_and_none_may_read_one_tensor() -> None:
    """Both heads read what the body's integer kernel made."""
    network = make_case("two_outputs").network
    network = marked(network, STATIC, "body", "classes")
    network = marked(network, integers(activation_bits=16), "boxes")
    floating = exporter_of("two_outputs").export(network)
    quantized = quantize(floating, calibration("two_outputs"), DEVICE)
    assert_tidy(quantized.model)
    assert quantized.labels == {"body": "int8", "classes": "int8", "boxes": "int16 emulated"}
    wanted = run_onnx(floating.graph.model, calibration("two_outputs"))
    found = run_onnx(quantized.model, calibration("two_outputs"))
    assert all(relative_error(f, w) < CLOSENESS for f, w in zip(found, wanted, strict=True))


def test_float_weights_may_have_rounded_inputs(tmp_path: Path) -> None:
    floating = float_model("residual", integers(32, activation_bits=8))
    quantized = quantize(floating, calibration("residual"), DEVICE)
    assert_tidy(quantized.model)
    assert set(quantized.labels.values()) == {"int8 emulated"}
    before, after = values(floating.graph.model), values(quantized.model)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert not {"QLinearConv", "QGemm"} & set(operators(optimized(quantized.model, tmp_path)))
    found, wanted = (
        run_onnx(m, calibration("residual"))[0] for m in (quantized.model, floating.graph.model)
    )
    assert 1e-4 < relative_error(found, wanted) < CLOSENESS


def test_few_bits_with_integer_inputs_are_stored_as_the_kernel_reads_them(tmp_path: Path) -> None:
    floating = float_model("flatten", integers(3, activation_bits=8))
    model = quantize(floating, calibration("flatten"), DEVICE).model
    codes = values(model)["hidden.weight_quantized"]
    assert codes.dtype == np.int8 and set(np.unique(codes)) <= set(range(-3, 4))
    assert {"QLinearConv", "QGemm"} <= set(operators(optimized(model, tmp_path)))


def test_one_scale_for_the_whole_weight_is_stored_once(tmp_path: Path) -> None:
    floating = float_model("flatten", integers(per_tensor=True, activation_bits=8))
    model = quantize(floating, calibration("flatten"), DEVICE).model
    assert_tidy(model)
    assert values(model)["hidden.weight_scale"].shape == ()
    found = operators(optimized(model, tmp_path))
    assert found.count("QLinearConv") == 1 and found.count("QGemm") == 2
    wanted = run_onnx(floating.graph.model, calibration("flatten"))[0]
    assert relative_error(run_onnx(model, calibration("flatten"))[0], wanted) < CLOSENESS


def test_pooling_moves_integers(tmp_path: Path) -> None:
    """What is pooled and what is read have one grid, so that nothing becomes float between."""
    found = operators(optimized(integer_file("flatten", *all_int8("flatten")), tmp_path))
    assert "MaxPool" not in found and found.count("DequantizeLinear") == 0


@pytest.mark.parametrize("signed", [False, True])
def test_trained_ranges_are_those_of_the_file(signed: bool) -> None:
    how = integers(activation_bits=8, signed=signed)
    zero_point = 40 - 128 * signed
    network = marked(make_case("tokens").network, how, "up", trained=(0.0625, zero_point))
    model = quantize(exporter_of("tokens").export(network), calibration("tokens"), DEVICE).model
    product = next(n for n in model.graph.node if n.op_type == "MatMul" and "deq" in n.input[0])
    stored = values(model)
    name = product.input[0].removesuffix("_dequantized")
    assert stored[f"{name}_scale"] == np.float32(0.0625)
    assert stored[f"{name}_zero_point"] == zero_point
    assert stored[f"{name}_zero_point"].dtype == (np.int8 if signed else np.uint8)


def test_layers_trained_with_different_ranges_for_one_tensor_are_refused() -> None:
    network = make_case("two_outputs").network
    for layer, scale in (("classes", 0.1), ("boxes", 0.2)):
        network = marked(network, STATIC, layer, trained=(scale, 3))
    floating = exporter_of("two_outputs").export(network)
    with pytest.raises(ExportError, match="same tensor") as caught:
        quantize(floating, calibration("two_outputs"), DEVICE)
    assert "scale 0.1" in str(caught.value.given) and "scale 0.2" in str(caught.value.given)


@pytest.mark.parametrize("trained", [(0.1, 256), (0.1, -1), (0.0, 3), (float("nan"), 3)])
def test_trained_ranges_that_fit_no_integers_are_refused(trained: tuple[float, int]) -> None:
    network = marked(make_case("flatten").network, STATIC, "hidden", trained=trained)
    with pytest.raises(ExportError, match="does not fit"):
        quantize(exporter_of("flatten").export(network), calibration("flatten"), DEVICE)


@pytest.mark.parametrize(
    ("how", "given"),
    [
        (integers(8, 4, activation_bits=8), "groups of 4"),
        (integers(8, 4, activation_bits=8, dynamic=True), "groups of 4"),
        (integers(32, activation_bits=8, dynamic=True), "dynamic"),
        (integers(8, activation_bits=16, dynamic=True), "dynamic inputs of 16"),
        (integers(8, activation_bits=8, dynamic=True, signed=True), "signed"),
        (integers(5), "weights of 5"),
        (integers(8, activation_bits=4), "inputs of 4"),
    ],
)  # fmt: skip
def test_what_no_runtime_can_run_is_refused(how, given: str) -> None:
    floating = float_model("flatten", how)
    with pytest.raises(ExportError, match="no runtime can") as caught:
        quantize(floating, calibration("flatten"), DEVICE)
    assert given in str(caught.value.given) and caught.value.allowed and caught.value.advice


def test_an_unknown_calibration_is_refused() -> None:
    floating = float_model("flatten", integers(activation_bits=8, calibration="guess"))
    with pytest.raises(ExportError) as caught:
        quantize(floating, calibration("flatten"), DEVICE)
    assert "entropy" in str(caught.value.allowed)


@pytest.mark.parametrize("how", [STATIC, integers(4), integers(4, 32)])
def test_a_weight_beside_its_grid_is_refused(how) -> None:
    network = marked(make_case("flatten").network, how)
    with torch.no_grad():
        network.hidden.weight[2, 5] += 0.3 * network.hidden.weight_scale[2, 0]
    floating = exporter_of("flatten").export(network)
    with pytest.raises(ExportError, match="grid") as caught:
        quantize(floating, calibration("flatten"), DEVICE)
    assert "hidden.weight, 0.3 steps" in str(caught.value.given)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_every_calibration_gives_a_usable_file(method: str) -> None:
    floating = float_model("residual", integers(activation_bits=8, calibration=method))
    model = quantize(floating, calibration("residual"), DEVICE).model
    wanted = run_onnx(floating.graph.model, calibration("residual"))[0]
    assert relative_error(run_onnx(model, calibration("residual"))[0], wanted) < 2 * CLOSENESS
