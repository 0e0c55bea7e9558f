from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import calibration, candidate, operators, relative_error, run_onnx, values
from networks import exporter_of, graph_of, make_case, make_device, this_device
from torch import nn

from autocompress.errors import ExportError
from autocompress.export.stock import StockOptions, advised_options, stock_quantize


def float_file(name: str) -> onnx.ModelProto:
    return exporter_of(name).export(candidate(name)).graph.model


def stock_file(name: str, folder: Path, options: StockOptions) -> onnx.ModelProto:
    """With weights of 7 bits where this machine's kernels need them."""
    target = folder / "int8.onnx"
    options = replace(options, reduce_range=this_device().integer_weight_bits < 8)
    stock_quantize(float_file(name), target, calibration(name), options)
    assert [p.name for p in folder.iterdir()] == ["int8.onnx"]
    return onnx.load(target)


def closeness(name: str, model: onnx.ModelProto) -> float:
    wanted = run_onnx(float_file(name), calibration(name))[0]
    return relative_error(run_onnx(model, calibration(name))[0], wanted)


@pytest.mark.parametrize("calibration_method", ["minmax", "percentile", "entropy"])
@pytest.mark.parametrize("name", ["residual", "two_inputs"])
def test_static_files_load_and_are_close(
    name: str, calibration_method: str, tmp_path: Path
) -> None:
    model = stock_file(name, tmp_path, StockOptions(calibration=calibration_method))
    assert "QuantizeLinear" in operators(model)
    assert closeness(name, model) < 0.25


def test_the_default_is_per_channel_and_unsigned(tmp_path: Path) -> None:
    stored = values(stock_file("residual", tmp_path, StockOptions()))
    assert stored["x_zero_point"].dtype == np.uint8
    assert stored["block1.conv1.weight_scale"].shape == (8,)


def test_options_reach_the_tool(tmp_path: Path) -> None:
    options = StockOptions(per_channel=False, signed_activations=True)
    stored = values(stock_file("residual", tmp_path, options))
    assert stored["x_zero_point"].dtype == np.int8
    assert stored["block1.conv1.weight_scale"].shape in ((), (1,))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("residual", "static"), ("two_inputs", "static"), ("attention", "dynamic")],
)
def test_ranges_are_taken_as_the_tool_advises(kind: str, mode: str) -> None:
    assert (
        advised_options(make_case(kind).network, graph_of(kind).layers, make_device()).mode == mode
    )


def test_recurrent_networks_take_ranges_anew() -> None:
    network = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "head": nn.Linear(4, 2)})
    assert advised_options(network, (), make_device()).mode == "dynamic"


def test_a_reduced_range_is_seven_bits(tmp_path: Path) -> None:
    found = []
    for reduced in (False, True):
        target = tmp_path / f"{reduced}.onnx"
        options = StockOptions(reduce_range=reduced)
        stock_quantize(float_file("residual"), target, calibration("residual"), options)
        stored = values(onnx.load(target))
        found.append(max(np.abs(v).max() for v in stored.values() if v.dtype == np.int8 and v.ndim))
    assert found[0] == 127 and found[1] <= 64


def test_devices_whose_sums_saturate_get_the_reduced_range() -> None:
    layers, network = graph_of("residual").layers, make_case("residual").network
    for sums, reduced in (("exact", False), ("saturating", True)):
        device = make_device().model_copy(update={"integer_sums": sums})
        assert advised_options(network, layers, device).reduce_range is reduced


def test_percentiles_cut_what_minmax_keeps(tmp_path: Path) -> None:
    scales = []
    for method in ("percentile", "minmax"):
        stored = values(stock_file("residual", tmp_path, StockOptions(calibration=method)))
        names = sorted(n for n, v in stored.items() if n.endswith("_scale") and v.ndim == 0)
        scales.append(np.array([stored[n] for n in names]))
    assert (scales[0] <= scales[1]).all() and (scales[0] < scales[1]).any()


def test_dynamic_files_fix_no_range(tmp_path: Path) -> None:
    model = stock_file("tokens", tmp_path, StockOptions(mode="dynamic"))
    assert "DynamicQuantizeLinear" in operators(model)
    assert "QuantizeLinear" not in operators(model)
    assert 0 < closeness("tokens", model) < 0.1


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_tools_failure_is_an_export_error(mode: str, tmp_path: Path) -> None:
    target = tmp_path / "int8.onnx"
    broken = onnx.ModelProto()
    with pytest.raises(ExportError, match=f"{mode} quantizer"):
        stock_quantize(broken, target, [np.zeros((2, 2), np.float32)], StockOptions(mode=mode))
    assert list(tmp_path.iterdir()) == []
