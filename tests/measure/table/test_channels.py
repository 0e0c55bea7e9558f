from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_models import Builder, residual

from autocompress.errors import MeasurementError
from autocompress.measure.table.block import Block
from autocompress.measure.table.channels import (
    Channels,
    channels_of,
    family_of,
    with_channels,
)
from autocompress.measure.table.cut import cut_model

COUNTS = st.integers(2, 48)


@settings(max_examples=15, deadline=None)
@given(COUNTS, COUNTS, st.booleans())
def test_other_channels_give_the_block_of_the_network_that_has_them(
    width: int, inner: int, int8: bool
) -> None:
    """The same residual network, built with other widths, is the reference."""
    found = cut_model(residual(16, 32, int8=int8), 1).blocks
    wanted = cut_model(residual(width, inner, int8=int8), 1).blocks
    for block, other in zip(found, wanted, strict=True):
        channels = channels_of(other)
        assert channels is not None
        assert with_channels(block, channels) == other
        assert family_of(block) == family_of(other)


def test_channels_are_those_of_the_weight() -> None:
    blocks = cut_model(residual(16, 32, int8=True), 1).blocks
    found = [channels_of(block) for block in blocks]
    assert found == [
        Channels(1, 1), Channels(1, 16), Channels(16, 32), Channels(32, 16), Channels(16, 16),
        Channels(16, 10),
    ]  # fmt: skip


def depthwise(channels: int) -> Block:
    b = Builder()
    weight = b.keep("w", np.ones((channels, 1, 3, 3)))
    b.add("Conv", ["x", weight], "y", group=channels, kernel_shape=[3, 3])
    return cut_model(b.model([1, channels, 5, 5], [1, channels, 3, 3]), 1).blocks[0]


def test_a_depthwise_convolution_has_as_many_groups_as_channels() -> None:
    assert channels_of(depthwise(8)) == Channels(8, 8)
    assert with_channels(depthwise(8), Channels(24, 24)) == depthwise(24)
    with pytest.raises(MeasurementError, match="cannot have that many"):
        with_channels(depthwise(8), Channels(24, 16))


def grouped(c_in: int, c_out: int) -> Block:
    b = Builder()
    weight = b.keep("w", np.ones((c_out, c_in // 4, 3, 3)))
    b.add("Conv", ["x", weight], "y", group=4, kernel_shape=[3, 3])
    return cut_model(b.model([1, c_in, 5, 5], [1, c_out, 3, 3]), 1).blocks[0]


def test_a_grouped_convolution_keeps_its_groups() -> None:
    assert channels_of(grouped(16, 8)) == Channels(16, 8)
    assert with_channels(grouped(16, 8), Channels(24, 12)) == grouped(24, 12)
    with pytest.raises(MeasurementError, match="cannot have that many"):
        with_channels(grouped(16, 8), Channels(18, 8))


def test_families_tell_kernels_apart() -> None:
    convs = cut_model(residual(), 1).blocks
    # The second and third have other followers.
    assert len({family_of(block) for block in convs}) == len(convs)


def test_what_does_not_fit_is_refused() -> None:
    conv = cut_model(residual(), 1).blocks[1]
    with pytest.raises(MeasurementError, match="cannot have that many"):
        with_channels(conv, Channels(0, 4))
