from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import calibration, candidate
from networks import exporter_of
from onnx import helper

from autocompress.errors import ExportError
from autocompress.export.observe import observe, run_float
from autocompress.export.ranges import (
    CALIBRATIONS,
    Grid,
    Observed,
    entropy_interval,
    find_grid,
    percentile_interval,
)

finite = st.floats(-1e4, 1e4, width=32)
all_calibrations = pytest.mark.parametrize("calibration", CALIBRATIONS)


def seen(values) -> Observed:
    sample = np.asarray(values, np.float32).reshape(-1)
    return Observed(min(float(sample.min()), 0.0), max(float(sample.max()), 0.0), sample)


def rounded(x, grid: Grid):
    low, high = grid.integers
    integers = np.clip(
        np.round(np.asarray(x, np.float64) / grid.scale) + grid.zero_point, low, high
    )
    return (integers - grid.zero_point) * float(grid.scale)


def squared_error(x, grid: Grid) -> float:
    return float(np.square(rounded(x, grid) - np.asarray(x, np.float64)).sum())


@given(st.lists(finite, min_size=1, max_size=40), st.sampled_from(CALIBRATIONS))
@settings(max_examples=150, deadline=None)
def test_zero_is_exact_and_no_value_leaves_its_own_reach(data: list[float], method: str) -> None:
    x = np.array(data, np.float32)
    for bits in (8, 16):
        grid = find_grid(seen(x), method, bits)
        assert grid.scale > 0 and np.isfinite(grid.scale) and not grid.signed
        assert grid.integers[0] <= grid.zero_point <= grid.integers[1]
        assert rounded(0.0, grid) == 0
        step = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
        assert np.abs(rounded(x, grid)).max() <= np.abs(x).max() + step / (2**bits - 1) + 1e-9


@given(st.lists(finite, min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_the_least_squared_error_is_not_above_that_of_the_whole_range(data: list[float]) -> None:
    whole, best = (squared_error(data, find_grid(seen(data), m, 8)) for m in ("minmax", "mse"))
    assert best <= whole * (1 + 1e-3) + 1e-9


@given(st.lists(finite, min_size=1, max_size=20), st.sampled_from([8, 16]))
@settings(max_examples=60, deadline=None)
def test_both_signs_stand_for_the_same_numbers(data: list[float], bits: int) -> None:
    grid = find_grid(seen(data), "mse", bits)
    signed = grid.with_sign(True)
    assert signed.signed and signed.dtype == np.dtype(f"int{bits}")
    assert signed.with_sign(True) == signed and signed.with_sign(False) == grid
    np.testing.assert_array_equal(rounded(data, signed), rounded(data, grid))


@all_calibrations
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-6, 250.0])
def test_constant_tensors_are_kept(value: float, calibration: str) -> None:
    grid = find_grid(seen(np.full((4, 5), value)), calibration, 8)
    assert rounded(value, grid) == pytest.approx(value, rel=5e-3)


@all_calibrations
def test_all_zero_tensors_have_a_scale(calibration: str) -> None:
    grid = find_grid(seen(np.zeros((4, 5))), calibration, 8)
    assert grid.scale > 0 and rounded(0.0, grid) == 0


@all_calibrations
def test_positive_values_use_the_whole_grid(calibration: str) -> None:
    grid = find_grid(seen(np.linspace(0, 2, 10_000)), calibration, 8)
    assert grid.zero_point == 0
    assert float(grid.scale) == pytest.approx(2 / 255, rel=0.04)


def test_minmax_covers_everything() -> None:
    grid = find_grid(seen([-1.0, 0.5, 4.1]), "minmax", 8)
    assert float(grid.scale) == pytest.approx(5.1 / 255)
    assert grid.zero_point == 50


def test_percentiles_are_those_of_the_sample() -> None:
    x = np.arange(-10_000, 90_001)
    low, high = percentile_interval(seen(x))
    assert low == pytest.approx(-10_000 + 10) and high == pytest.approx(90_000 - 10)
    assert percentile_interval(seen(x + 20_000))[0] == 0


@pytest.mark.parametrize("calibration", ["percentile", "mse", "entropy"])
def test_rare_outliers_are_clipped(calibration: str) -> None:
    x = np.random.default_rng(0).standard_normal(50_000)
    x[7] = 8.0
    whole = find_grid(seen(x), "minmax", 8)
    assert find_grid(seen(x), calibration, 8).scale < 0.9 * whole.scale


def test_entropy_is_blind_to_zeros_and_scale() -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(30_000)) ** 3
    low, high = entropy_interval(seen(x), 8)
    assert low == 0 and 0 < high < x.max()
    assert entropy_interval(seen(np.concatenate([x, np.zeros(90_000)])), 8) == (low, high)
    assert entropy_interval(seen(8 * x), 8)[1] == pytest.approx(8 * high)


def test_entropy_keeps_a_distribution_that_fits_the_integers() -> None:
    """Values on 256 points: every cut changes it, none is needed."""
    x = np.repeat(np.arange(256.0), 20)
    assert entropy_interval(seen(x), 8) == (0.0, 255.0)


def test_entropy_is_even_handed() -> None:
    x = np.random.default_rng(0).laplace(size=50_000)
    low, high = entropy_interval(seen(x), 8)
    mirrored = entropy_interval(seen(-x), 8)
    assert mirrored == pytest.approx((-high, -low), rel=0.1)


def test_sixteen_bits_cut_nothing_that_was_seen() -> None:
    x = np.random.default_rng(0).standard_normal(50_000)
    x[7] = 8.0
    for method in ("minmax", "mse", "entropy"):
        assert float(find_grid(seen(x), method, 16).scale) == pytest.approx(np.ptp(x) / 65535)


def test_unknown_calibrations_and_wild_values_are_refused() -> None:
    with pytest.raises(ExportError) as caught:
        find_grid(seen([1.0]), "median", 8)
    assert all(name in str(caught.value.allowed) for name in CALIBRATIONS)
    for value in (np.nan, np.inf):
        with pytest.raises(ExportError, match="finite"):
            find_grid(Observed(0.0, value, np.array([value], np.float32)), "mse", 8)


def identity_model(features: int) -> onnx.ModelProto:
    kind = onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(n, kind, ["b", features]) for n in "xz"]
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    graph = helper.make_graph(nodes, "negative", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("features", [8, 16, 48])
def test_every_feature_and_both_ends_are_in_the_sample(features: int) -> None:
    """One feature is wide and fills its range, the others are small: a fixed stride misses it."""
    rng = np.random.default_rng(0)
    x = 0.1 * rng.standard_normal((800_000 // features, features)).astype(np.float32)
    x[:, features // 2 - 1] = rng.uniform(-10, 10, len(x))
    x[5, 0], x[-5, 0] = 30.0, -31.0
    found = observe(identity_model(features), [x], ["y"])["y"]
    assert (found.low, found.high) == (-30.0, 31.0)
    assert {-30.0, 31.0} <= set(found.sample.tolist())
    assert 50_000 <= found.sample.size < 150_000
    wide = (np.abs(found.sample) > 1).mean()
    assert wide == pytest.approx(0.9 / features, rel=0.1)
    again = observe(identity_model(features), [x], ["y"])["y"]
    np.testing.assert_array_equal(again.sample, found.sample)


def test_values_of_all_batches_inputs_and_outputs_are_seen() -> None:
    x = np.arange(70 * 3, dtype=np.float32).reshape(70, 3) - 7
    found = observe(identity_model(3), [x], ["x", "y", "z"])
    for name, sign in (("x", 1), ("y", -1), ("z", 1)):
        ends = [found[name].low, found[name].high]
        np.testing.assert_array_equal(found[name].sample, [*(sign * x.reshape(-1)), *ends])
    assert (found["y"].low, found["y"].high) == (-202.0, 7.0)
    assert observe(identity_model(3), [x], []) == {}


def test_batches_see_what_one_run_sees() -> None:
    model = exporter_of("residual").export(candidate("residual")).graph.model
    tensor = next(n.output[0] for n in model.graph.node if n.op_type == "Relu")
    inputs = calibration("residual")
    assert len(inputs[0]) > 32
    whole = run_float(model, inputs, [tensor])[-1]
    found = observe(model, inputs, [tensor])[tensor]
    assert found.high == pytest.approx(float(whole.max()), rel=1e-5)
    assert found.low == 0


def test_models_that_do_not_load_or_run_are_export_errors() -> None:
    with pytest.raises(ExportError, match="load"):
        observe(identity_model(3), [np.zeros((2, 3), np.float32)], ["nowhere"])
    with pytest.raises(ExportError, match="run"):
        observe(identity_model(3), [np.zeros((2, 4), np.float32)], ["y"])
