from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from marked import KERNEL_DEVICE, float_model, integers
from models import assert_tidy, calibration, operators, optimized, relative_error, run_onnx, values
from networks import DENSE, assemble, graph_of, make_device
from torch import Tensor, nn

from autocompress.bank import Bank
from autocompress.config import CalibrationSettings
from autocompress.export.exporter import Exporter
from autocompress.export.nbits import pack_blocks
from autocompress.export.packed import stored_weight_bytes
from autocompress.export.quantize import quantize
from autocompress.graph import trace
from autocompress.plan import Plan, Step
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision

FOUR_BITS = integers(4, 32)
# Inputs are rounded to 8 bits in blocks of 32.
CLOSENESS = 0.03


@pytest.mark.parametrize("name", DENSE)
def test_linear_layers_run_on_the_kernel_and_others_are_unpacked(name: str, tmp_path: Path) -> None:
    floating = float_model(name, FOUR_BITS)
    quantized = quantize(floating, calibration(name), KERNEL_DEVICE)
    assert_tidy(quantized.model)
    linear = {layer.name for layer in graph_of(name).layers if layer.kind != "conv"}
    assert linear
    assert {n for n, how in quantized.labels.items() if how == "4-bit kernel"} == linear
    assert {how for n, how in quantized.labels.items() if n not in linear} <= {"storage only"}
    found = operators(optimized(quantized.model, tmp_path))
    assert found.count("MatMulNBits") == len(linear)
    for found, wanted in zip(
        run_onnx(quantized.model, calibration(name)),
        run_onnx(floating.graph.model, calibration(name)),
        strict=True,
    ):
        assert 0 < relative_error(found, wanted) < CLOSENESS


@pytest.mark.parametrize("how", [integers(8, 32), integers(4), integers(4, 16), integers(3, 32)])
def test_other_widths_and_groups_have_no_kernel(how) -> None:
    quantized = quantize(float_model("tokens", how), calibration("tokens"), KERNEL_DEVICE)
    assert set(quantized.labels.values()) == {"storage only"}


def test_devices_without_the_kernel_unpack() -> None:
    quantized = quantize(float_model("tokens", FOUR_BITS), calibration("tokens"), make_device())
    assert set(quantized.labels.values()) == {"storage only"}


class Fixed(nn.Module):
    """A table whose rows are read in a fixed order: its product with a factor is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(6, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x + self.places(torch.arange(x.shape[1]))))


def test_what_is_computed_once_at_load_needs_no_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Fixed().eval(), torch.randn(32, 6, 64)
    graph = trace(network, (x[:2],))
    bank = Bank(network, graph, 1, tmp_path / "bank")
    bank.calibrate((x,), CalibrationSettings())
    four = Precision(weight_bits=4, activation_bits=32, granularity="group")
    steps = (
        Step("places", LowRank(rank_ratio=0.5)), *(Step(n, four) for n in ("places", "head")),
    )  # fmt: skip
    stitched = assemble(bank, Plan(steps))
    floating = Exporter(network, graph, (x[:2],), (x[:4],)).export(stitched.network)
    quantized = quantize(floating, [x.numpy()], KERNEL_DEVICE)
    assert quantized.labels == {
        "places.0": "storage only", "places.1": "storage only", "head": "4-bit kernel",
    }  # fmt: skip
    found = operators(optimized(quantized.model, tmp_path))
    assert found.count("MatMulNBits") == 1 and "Gather" not in found


def test_every_group_is_stored_whole() -> None:
    """54 columns make two groups of 32."""
    model = quantize(float_model("flatten", FOUR_BITS), calibration("flatten"), KERNEL_DEVICE).model
    assert values(model)["hidden.weight_quantized"].shape == (16, 2, 16)
    assert stored_weight_bytes(model, "hidden.weight") == 16 * 2 * (16 + 4)


@given(st.integers(1, 3), st.integers(1, 70), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_blocks_hold_the_codes_and_zeros(out: int, width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-7, 8, (out, width)).astype(np.int8)
    blocks = pack_blocks(codes, 32)
    assert blocks.shape == (out, -(-width // 32), 16)
    pairs = np.stack([blocks & 15, blocks >> 4], -1).astype(np.int64) - 8
    rows = pairs.reshape(out, -1)
    np.testing.assert_array_equal(rows[:, :width], codes)
    assert not rows[:, width:].any()
