from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.device import DeviceProfile
from autocompress.device.nvml_gpu import others, visible_gpu
from autocompress.errors import DeviceError
from autocompress.measure import energy
from autocompress.measure.energy_statistics import EnergySamples, EnergyStopping
from autocompress.measure.paired_energy import PairedEnergy, paired_energy

ROOT = Path(energy.__file__).parents[2]
SPINNING = Path(__file__).with_name("spinning.py")
STOPPING = EnergyStopping(target_half_width=0.05, time_limit_s=4, minimum_pairs=3, seed=0)
REPORT = """
import json, sys
from dataclasses import asdict
from autocompress.device import DeviceProfile
from autocompress.measure.energy import meter_report
print(json.dumps(asdict(meter_report(DeviceProfile.model_validate_json(sys.argv[1])))))
"""


def run_under(standin: Path, settings: dict[str, str], *command: str) -> dict[str, Any]:
    known = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment = {
        **known,
        "LD_LIBRARY_PATH": str(standin),
        "PYTHONPATH": str(ROOT),
        "STANDIN_TICK_MS": "20",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def spin(
    standin: Path, profile: DeviceProfile, settings: dict[str, str]
) -> tuple[PairedEnergy, dict[str, Any]]:
    answer = run_under(standin, settings, str(SPINNING), profile.model_dump_json())
    return paired_energy(EnergySamples.from_dict(answer["samples"]), "d", STOPPING), answer


def assert_true(paired: PairedEnergy, truth_mj: list[float]) -> None:
    """The figures are near what the stand-in says that the models took, and say how near."""
    figures = (paired.baseline_mj, paired.candidate_mj, paired.saving)
    lows = (paired.baseline_low_mj, paired.candidate_low_mj, paired.saving_low)
    highs = (paired.baseline_high_mj, paired.candidate_high_mj, paired.saving_high)
    truths = (*truth_mj, truth_mj[0] / truth_mj[1])
    for figure, low, high, truth in zip(figures, lows, highs, truths, strict=True):
        # The truth is of all runs, the windows hold most of them.
        assert abs(figure - truth) <= 0.05 * truth + (high - low) / 2


def test_the_energy_counter(standin: Path, device_profile) -> None:
    paired, answer = spin(standin, device_profile(kind="cuda"), {})
    facts = answer["facts"]
    assert facts["reads"] == "counter" and facts["scope"] == "GPU 0 (Stand-in), whole board"
    assert facts["update_period_s"] == pytest.approx(0.02, rel=0.3)
    assert_true(paired, answer["truth_mj"])
    # What the idle device draws is known but for the reading of it.
    assert 10_000 <= paired.idle_mw < 60_000
    assert 0 < paired.candidate_net_mj < paired.candidate_mj
    assert paired.baseline_c == 40 and "process" not in paired.reason


@pytest.mark.slow
def test_the_power_reading_where_there_is_no_counter(standin: Path, device_profile) -> None:
    paired, answer = spin(standin, device_profile(kind="cuda"), {"STANDIN_NO_COUNTER": "1"})
    assert answer["facts"]["reads"] == "power"
    assert_true(paired, answer["truth_mj"])


@pytest.mark.slow
def test_a_sensor_that_sees_a_quarter_of_the_time(standin: Path, device_profile) -> None:
    settings = {"STANDIN_SENSES": "0.25", "STANDIN_STRANGERS": "2", "STANDIN_WARMING": "20"}
    paired, answer = spin(standin, device_profile(kind="cuda"), settings)
    # On a loaded machine a quarter of the time is not all of it; a wrong scale is four times off.
    for figure, truth in zip(
        (paired.baseline_mj, paired.candidate_mj), answer["truth_mj"], strict=True
    ):
        assert figure == pytest.approx(truth, rel=0.2)
    assert not paired.trusted
    assert "2 other processes were" in paired.reason and "stop them" in paired.reason
    assert "a hot device draws more" in paired.reason


@pytest.mark.slow
def test_the_report_of_a_meter(standin: Path, device_profile) -> None:
    chosen = device_profile(energy={"meter": "nvml"}).model_dump_json()
    answer = run_under(standin, {}, "-c", REPORT, chosen)
    assert answer["name"] == "nvml" and "Stand-in" in answer["scope"] and answer["reason"] == ""
    assert 10_000 <= answer["idle_mw"] < 60_000
    mute = run_under(standin, {"STANDIN_NO_POWER": "1"}, "-c", REPORT, chosen)
    assert mute["name"] is None and "tells neither energy nor power" in mute["reason"]


def test_cuda_counts_its_visible_gpus() -> None:
    assert visible_gpu(1, {}) == 1
    assert visible_gpu(1, {"CUDA_VISIBLE_DEVICES": "3, 2,0"}) == 2
    assert visible_gpu(0, {"CUDA_VISIBLE_DEVICES": "GPU-1a-2b"}) == "GPU-1a-2b"
    assert visible_gpu(0, {"CUDA_VISIBLE_DEVICES": "5,-1,2"}) == 5
    for variable, index in [("", 0), ("-1", 0), ("5,-1,2", 1), ("4", 1), ("none", 0)]:
        with pytest.raises(DeviceError, match="CUDA does not see"):
            visible_gpu(index, {"CUDA_VISIBLE_DEVICES": variable})


def test_this_process_is_no_other() -> None:
    own, unseen = os.getpid(), 1 << 23
    assert others([own], own) == ()
    assert others([own, unseen], own) == (unseen,)
    # Ids of the host, seen from a container.
    assert others([unseen], own) == ()
    assert others([unseen, unseen + 1], own) == (unseen + 1,)
    assert others([os.getppid()], own) == (os.getppid(),)
    assert others([], own) == ()


@pytest.mark.gpu
def test_a_real_gpu_draws_more_for_more_work(device_profile) -> None:
    torch = pytest.importorskip("torch")
    profile = device_profile(kind="cuda")

    class Products(energy.Session):
        def __init__(self, count: int) -> None:
            self._count = count
            self._matrix = torch.randn(4096, 4096, device="cuda")

        @property
        def input_names(self) -> tuple[str, ...]:
            return ()

        def run(self, inputs: object) -> tuple[np.ndarray, ...]:
            product = self._matrix
            for _ in range(self._count):
                product = torch.tanh(product @ self._matrix)
            return (product[:1].cpu().numpy(),)

    meter = energy.meter_for(profile)
    pair = energy.EnergyPair(Products(8), Products(4), (), threads=1)
    plan = energy.plan_windows(meter.facts)
    stopping = EnergyStopping(0.03, time_limit_s=60, minimum_pairs=8, seed=0)
    samples = energy.sample_energy(pair, meter, plan, stopping, lambda: None)
    meter.close()
    paired = paired_energy(samples, "d", stopping)
    assert paired.saving == pytest.approx(2, rel=0.15)
    assert min(w.power_mw for w in samples.candidate) > 1.2 * samples.idle_mw > 0
    assert paired.baseline_c is not None
