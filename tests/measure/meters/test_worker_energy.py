from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.errors import DeviceError
from autocompress.measure.client import Subject, Worker
from autocompress.measure.meters import Meter, rapl, sysfs

# One pair of windows takes longer than this.
SHORT = {"time_limit_s": 0.1, "final_time_limit_s": 0.1}


def test_the_worker_meters_two_models(
    standin: Path, device_profile, models, split, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(standin))
    monkeypatch.setenv("STANDIN_TICK_MS", "20")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    profile = device_profile(energy={"meter": "nvml", **SHORT})
    large, small = (Subject(models.dense(width), "onnxruntime") for width in (2**14, 16))
    with Worker(profile, tmp_path) as worker:
        paired = worker.energy(large, small, split, final=True, seed=0)
        assert paired.device == worker.fingerprint.id
    assert (paired.samples.meter, paired.pairs) == ("nvml", 1)
    assert paired.energy().unit == "mJ" and paired.energy().value == paired.candidate_mj > 0
    # A wide layer takes many times as long as a narrow one, at about the same power.
    assert paired.saving > 1.5
    # One thread at 200 W beside 10 W always, and what the watching takes.
    for window in (*paired.samples.baseline, *paired.samples.candidate):
        assert 100_000 < window.power_mw < 350_000 and window.runs > 10
    assert not paired.trusted and "only 1 of 8 window pairs" in paired.reason


def test_without_a_meter_energy_is_refused(device_profile, models, split, tmp_path: Path) -> None:
    profile = device_profile(energy=SHORT)
    if any(isinstance(kind.find(profile), Meter) for kind in (rapl, sysfs)):
        pytest.skip("this machine has an energy meter")
    subject = Subject(models.dense(8), "onnxruntime")
    with Worker(profile, tmp_path) as worker, pytest.raises(DeviceError) as refused:
        worker.energy(subject, subject, split, seed=0)
    text = str(refused.value)
    assert "no energy meter that can be read" in text
    assert "no intel-rapl zone in /sys/class/powercap" in text
    assert "no power sensor of the device in /sys" in text
    assert "INA226" in text and "leave energy out of the objectives and limits" in text
