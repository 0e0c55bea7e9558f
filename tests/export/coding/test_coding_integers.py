from __future__ import annotations

import math
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from autocompress.errors import ExportError
from autocompress.export.coding import mixing
from autocompress.export.coding.elements import INTEGERS, IntegerType, byte_size
from autocompress.export.coding.histogram import code_histogram
from autocompress.export.coding.integers import Method, pack_integers, unpack_integers
from autocompress.export.coding.ranges import Reader, Writer
from autocompress.export.coding.steps import step_tree
from autocompress.export.coding.stream import ByteReader
from autocompress.export.coding.tensors import pack_tensor, unpack_tensor

SHAPE = (96, 64, 3, 3)


def entropy(values: np.ndarray) -> float:
    """Zero-order empirical entropy in bits per symbol."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts / values.size * np.log2(counts / values.size)).sum())


def bits_per_symbol(values: np.ndarray) -> float:
    packed = pack_integers(values.reshape(-1).astype(np.int64), values.shape)
    assert packed is not None
    source = ByteReader(packed)
    np.testing.assert_array_equal(unpack_integers(source, values.shape), values.reshape(-1))
    source.end()
    return 8 * len(packed) / values.size


def quantized(values: np.ndarray, zeros: float = 0.7) -> np.ndarray:
    """On a uniform grid that makes this share zeros."""
    return np.round(values / (2 * np.quantile(abs(values), zeros))).astype(np.int64)


def scales(seed: int, *shape: int) -> np.ndarray:
    return np.exp(0.6 * np.random.default_rng(seed).normal(size=shape))


def laplace(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).laplace(size=shape)


@pytest.mark.parametrize(
    "values",
    [
        quantized(laplace(*SHAPE)),
        quantized(laplace(*SHAPE), 0.2),
        quantized(laplace(*SHAPE), 0.95),
        np.clip(np.random.default_rng(1).normal(size=SHAPE) * 30, -127, 127).astype(np.int64),
        np.random.default_rng(2).integers(-8, 8, SHAPE),
        quantized(laplace(55296), 0.6),
    ],
    ids=["zeros70", "zeros20", "zeros95", "int8", "even", "vector"],
)
def test_independent_symbols_cost_their_entropy(values: np.ndarray) -> None:
    assert bits_per_symbol(values) <= 1.01 * entropy(values)


@pytest.mark.parametrize(
    ("scale", "least"),
    [
        (scales(1, 96, 1, 1, 1), 0.72),
        (scales(2, 1, 64, 1, 1), 0.72),
        (scales(1, 96, 1, 1, 1) * scales(2, 1, 64, 1, 1), 0.72),
        (scales(1, 96, 1, 1, 1) * scales(2, 1, 64, 1, 1) * scales(3, 1, 1, 3, 3), 0.72),
        (scales(4, 96, 64, 1, 1), 0.2),
    ],
    ids=["rows", "columns", "both", "positions", "kernels"],
)
def test_varying_scales_are_found(scale: np.ndarray, least: float) -> None:
    """What a coder saves that is told the scales is mostly saved by learning them."""
    noise = laplace(*SHAPE) * scale
    values, step = quantized(noise), 2 * np.quantile(abs(noise), 0.7)
    decay = np.exp(-step / np.broadcast_to(scale, SHAPE))
    zero = values == 0
    chance = np.where(zero, 1 - decay**0.5, decay ** (abs(values) - 0.5) * (1 - decay) / 2)
    told = float(-np.log2(chance).mean())
    assert bits_per_symbol(values) <= entropy(values) - least * (entropy(values) - told)


def test_a_transposed_matrix_costs_the_same() -> None:
    values = quantized(laplace(384, 128) * scales(1, 384, 1))
    straight, turned = bits_per_symbol(values), bits_per_symbol(values.T.copy())
    assert straight < 0.94 * entropy(values)
    assert turned == pytest.approx(straight, rel=0.01)


def test_pruned_channels_cost_almost_nothing() -> None:
    generator = np.random.default_rng(5)
    values = quantized(laplace(*SHAPE), 0.5)
    values *= (generator.random((96, 1, 1, 1)) < 0.5) & (generator.random((1, 64, 1, 1)) < 0.5)
    kept = values[np.ix_(values.any((1, 2, 3)), values.any((0, 2, 3)))]
    assert bits_per_symbol(values) * values.size <= 1.06 * bits_per_symbol(kept) * kept.size


def test_unordered_indices_take_the_histogram() -> None:
    generator = np.random.default_rng(6)
    shares = generator.permutation(generator.dirichlet(np.full(256, 0.3)))
    values = generator.choice(256, size=(128, 512), p=shares)
    packed = pack_integers(values.reshape(-1), values.shape)
    assert packed is not None and packed[0] == Method.HISTOGRAM
    assert bits_per_symbol(values) <= 1.01 * entropy(values)


def test_constant_and_empty_tensors_are_a_few_bytes() -> None:
    assert bits_per_symbol(np.full((300, 40), -7)) * 300 * 40 <= 64
    packed = pack_integers(np.zeros(0, np.int64), (0,))
    assert packed is not None and not len(unpack_integers(ByteReader(packed), (0,)))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[IntegerType, tuple[int, ...], bytes]:
    kind = draw(st.sampled_from(INTEGERS))
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 0.4, 3.0, 40.0, 1e6, 1e18]))
    low = -(1 << (kind.bits - 1)) if kind.signed else 0
    high = low + (1 << kind.bits) - 1
    centre = draw(st.sampled_from([0, low, high, (low + high) // 2]))
    noise = (generator.laplace(size=prod(shape)) * spread).clip(-(2.0**61), 2.0**61)
    values = [min(max(centre + int(x), low), high) for x in noise]
    return kind, shape, kind.write(np.array(values, np.int64))


@settings(max_examples=40, deadline=None)
@given(tensors())
def test_every_integer_tensor_comes_back(
    tensor: tuple[IntegerType, tuple[int, ...], bytes],
) -> None:
    kind, shape, data = tensor
    assert len(data) == byte_size(kind.code, shape)
    assert kind.write(kind.read(data, prod(shape))) == data
    packed = pack_tensor(data, kind.code, shape)
    assert unpack_tensor(packed, kind.code, shape) == data
    assert len(packed) <= len(data) + 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 10**6), st.integers(1, 3000))
def test_magnitudes_fall_into_one_leaf(step: int, largest: int, seed: int) -> None:
    tree = step_tree(step + 1, largest)
    sizes = np.random.default_rng(seed).integers(0, largest + 1, 50)
    for size in [0, largest, *sizes]:
        node = 0
        while node < tree.questions:
            node = int(tree.children[node, int(size >= tree.thresholds[node])])
        rest = size - tree.bases[node - tree.questions]
        assert 0 <= rest < 1 << tree.even_bits[node - tree.questions]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(0, 2**32 - 1), st.sampled_from([2, 500, 1 << 19]))
def test_short_streams_need_no_padding(count: int, seed: int, one: int) -> None:
    generator = np.random.default_rng(seed)
    ones = generator.integers(1, 2 * one, count)
    bits = generator.random(count) < ones / (1 << 20)
    writer = Writer()
    writer.bits(bits, ones)
    data = writer.finish()
    np.testing.assert_array_equal(Reader(data).bits(None, ones), bits)
    cost = -np.log2(np.where(bits, ones, (1 << 20) - ones) / (1 << 20)).sum()
    assert len(data) <= cost / 8 + 2


def test_histogram_reads_what_it_wrote() -> None:
    symbols = np.random.default_rng(0).integers(0, 5, 1000)
    writer = Writer()
    code_histogram(writer, symbols, 1000, 5)
    found = code_histogram(Reader(writer.finish()), None, 1000, 5)
    np.testing.assert_array_equal(found, symbols)


def test_counts_stay_in_their_halves() -> None:
    many = 3 * mixing._COUNT_LIMIT // 2
    values = np.zeros((many // 64, 64), np.int64)
    values[:, 0] = np.random.default_rng(7).random(len(values)) < 0.5
    assert bits_per_symbol(values) < 1.4 / 64


def test_nearly_empty_tensors_are_left_to_lzma() -> None:
    values = np.zeros((1000, 1000), np.int8)
    values[500, 500] = 1
    packed = pack_tensor(values.tobytes(), TensorProto.INT8, values.shape)
    assert packed[0] == Method.LZMA and len(packed) < 300


def test_no_table_depends_on_a_platforms_last_digit() -> None:
    """Values before rounding are far from where another rounding would give another table."""
    places = np.arange(mixing._COUNT_LIMIT)
    logs = np.log(2.0 * places + 1) * mixing._UNIT
    odds = np.arange(-mixing._LARGEST, mixing._LARGEST + 1) / mixing._UNIT
    ones = [2**20 / (1 + math.exp(-x)) for x in odds]
    for values in (logs[1:], np.array(ones)):
        distance = abs(values - np.floor(values) - 0.5)
        # One value may be half a unit exactly: it is so on every platform.
        assert (np.sort(distance)[1:] > 1e-9).all()


def test_a_value_outside_its_type_is_refused() -> None:
    with pytest.raises(ExportError, match="malformed"):
        INTEGERS[0].write(np.array([256]))
