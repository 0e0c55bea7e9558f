from __future__ import annotations

import pytest
from measuring import of

from autocompress.device import DeviceProfile
from autocompress.errors import MeasurementError
from autocompress.measure.memory import peak_memory


def test_it_repeats_and_grows_with_the_model(profile: DeviceProfile, models, split) -> None:
    small, again = (
        peak_memory(of(models.dense(64)), split, profile).resident_bytes for _ in range(2)
    )
    assert small == pytest.approx(again, rel=0.1)
    width = 2**18
    weights = 2 * 16 * width * 4
    large = peak_memory(of(models.dense(width)), split, profile).resident_bytes
    assert large - small >= 0.9 * weights


def test_errors_carry_their_reason(profile: DeviceProfile, models, split) -> None:
    with pytest.raises(MeasurementError, match=r"corrupt\.onnx"):
        peak_memory(of(models.corrupt()), split, profile)
