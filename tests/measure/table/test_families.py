from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_models import residual

from autocompress.measure.table.channels import Channels
from autocompress.measure.table.cut import cut_model
from autocompress.measure.table.families import Kin, Traits, traits_of

SIZES = [8, 16, 24, 40, 64]


def traits(c_in: int, c_out: int, side: int = 8, **others: int) -> Traits:
    return Traits("kin", Channels(c_in, c_out), (side**2, side**2), tuple(sorted(others.items())))


def kin_of(time, sides=(8,)) -> Kin:
    found = [traits(a, b, s) for a in SIZES for b in SIZES for s in sides]
    return Kin(tuple(found), tuple(time(t) for t in found))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([8, 16, 32]), st.floats(1e-7, 1e-5), st.floats(0, 1e-3))
def test_a_time_that_the_model_can_express_is_found_exactly(tile, slope, base) -> None:
    """Products of channels that are rounded up to a tile, plus a constant."""

    def time(t: Traits) -> float:
        read, written = (-(-c // tile) * tile for c in (t.channels.inputs, t.channels.outputs))
        return base + slope * read * written * t.positions[1]

    kin = kin_of(time)
    for wanted in (traits(32, 48), traits(56, 32), traits(80, 96)):
        assert kin.estimate(wanted) == pytest.approx(time(wanted), rel=0.02)


def test_image_sizes_share_one_model() -> None:
    def time(t: Traits) -> float:
        return 2e-6 * t.channels.inputs * t.channels.outputs * t.positions[1]

    kin = kin_of(time, sides=(4, 16))
    assert kin.estimate(traits(32, 32, 8)) == pytest.approx(time(traits(32, 32, 8)), rel=0.02)


def test_what_follows_the_lead_costs_by_output() -> None:
    def time(t: Traits) -> float:
        adds = dict(t.others).get("Add", 0)
        work = t.channels.inputs * t.channels.outputs
        return t.positions[1] * (1e-6 * work + 1e-5 * adds * t.channels.outputs)

    found = [traits(a, b, Add=n) for a in SIZES for b in SIZES for n in (1, 2)]
    kin = Kin(tuple(found), tuple(map(time, found)))
    wanted = traits(48, 32, Add=2)
    assert kin.estimate(wanted) == pytest.approx(time(wanted), rel=0.03)


def test_near_blocks_correct_the_model() -> None:
    """A kernel that is twice as slow from 40 channels on: no smooth model can tell."""

    def time(t: Traits) -> float:
        return (
            (2 if t.channels.outputs >= 40 else 1) * 1e-6 * t.channels.inputs * t.channels.outputs
        )

    kin = kin_of(time)
    slow, fast = traits(24, 40), traits(24, 24)
    assert kin.estimate(slow) / time(slow) == pytest.approx(1, abs=0.25)
    assert kin.estimate(fast) / time(fast) == pytest.approx(1, abs=0.25)


def test_one_block_scales_by_its_work() -> None:
    kin = Kin((traits(16, 16),), (0.01,))
    assert kin.estimate(traits(16, 16)) == pytest.approx(0.01)
    assert kin.estimate(traits(32, 32)) == pytest.approx(0.04)


def test_estimates_are_never_below_zero() -> None:
    kin = Kin((traits(16, 16), traits(32, 32)), (-0.001, 0.002))
    assert kin.estimate(traits(8, 8)) >= 0


def test_traits_tell_arithmetic_apart_and_count_what_is_beside_the_lead() -> None:
    floats = [traits_of(b) for b in cut_model(residual(), 1).blocks]
    bytes_ = [traits_of(b) for b in cut_model(residual(int8=True), 1).blocks[1:]]
    for one, other in zip(floats[:3], bytes_[:3], strict=True):
        assert one is not None and other is not None
        assert one.kin != other.kin and one.channels == other.channels
    assert floats[0].kin == floats[1].kin == floats[2].kin
    assert floats[2].others == (("Add", 1), ("Relu", 1))
    assert dict(bytes_[2].others)["DequantizeLinear"] == 2
    assert floats[1].positions == (64, 64)
