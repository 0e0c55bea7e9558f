from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.device import DeviceProfile
from autocompress.errors import DeviceError
from autocompress.measure.client import Subject
from autocompress.measure.memory import PeakMemory, peak_memory

WIDTH = 2**18
WEIGHTS = 2 * 16 * WIDTH * 4


@pytest.fixture
def gpu_profile(standin: Path, device_profile, monkeypatch: pytest.MonkeyPatch) -> DeviceProfile:
    """A device of kind `cuda` whose children find the driver's stand-in."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(standin))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    profile: DeviceProfile = device_profile(kind="cuda")
    return profile


@pytest.mark.parametrize(
    "settings",
    [
        {"STANDIN_STRANGERS": "2"},
        # In a container the process's id is the host's, and new.
        {"STANDIN_HIDDEN": "1", "STANDIN_EMPTY_CALLS": "1"},
    ],
)
def test_the_drivers_memory_of_this_process(
    gpu_profile: DeviceProfile, models, split, monkeypatch, settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    peak = peak_memory(Subject(models.dense(WIDTH), "onnxruntime"), split, gpu_profile)
    assert peak.gpu_bytes is not None and peak.gpu_reason == ""
    assert peak.gpu_bytes >= 0.9 * WEIGHTS
    # The stand-in's GPU memory is the process's resident memory.
    assert peak.gpu_bytes == pytest.approx(peak.resident_bytes, rel=0.1)


def test_a_hidden_process_has_no_figure(
    gpu_profile: DeviceProfile, models, split, monkeypatch
) -> None:
    monkeypatch.setenv("STANDIN_HIDDEN", "1")
    peak = peak_memory(Subject(models.dense(8), "onnxruntime"), split, gpu_profile)
    assert peak.gpu_bytes is None and "container" in peak.gpu_reason
    assert peak.resident_bytes > 0


def test_a_cpu_has_no_gpu_memory(device_profile, models, split) -> None:
    peak = peak_memory(Subject(models.dense(8), "onnxruntime"), split, device_profile())
    assert peak == PeakMemory(peak.resident_bytes, None)


def test_a_gpu_that_is_not_there_is_an_error(device_profile, models, split, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match="CUDA does not see"):
        peak_memory(Subject(models.dense(8), "onnxruntime"), split, device_profile(kind="cuda"))
