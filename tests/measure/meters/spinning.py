"""Meter two models of known CPU time under the stand-in driver; prints JSON.

Run as a program, because a process looks for its libraries where it was told at its start.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

from autocompress.device import DeviceProfile
from autocompress.measure.energy import EnergyPair, WindowPlan, sample_energy
from autocompress.measure.energy_statistics import EnergyStopping
from autocompress.measure.meters import meter_for
from autocompress.measure.session import Array, Session

PLAN = WindowPlan(gap_s=0.02, lead_s=0.05, window_s=0.25)
STOPPING = EnergyStopping(target_half_width=0.05, time_limit_s=4.0, minimum_pairs=3, seed=0)


class Spinning(Session):
    """Uses some CPU time, and notes what the driver's stand-in says that it took."""

    def __init__(self, driver: ctypes.CDLL, cpu_s: float) -> None:
        self._driver = driver
        self._cpu_s = ctypes.c_double(cpu_s)
        self.runs, self.taken_mj = 0, 0.0

    @property
    def input_names(self) -> tuple[str, ...]:
        return ()

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        before = self._driver.standin_energy_mj()
        self._driver.standin_spin(self._cpu_s)
        self.taken_mj += self._driver.standin_energy_mj() - before
        self.runs += 1
        return ()


def main() -> None:
    driver = ctypes.CDLL("libnvidia-ml.so.1")
    driver.standin_energy_mj.restype = ctypes.c_double
    models = [Spinning(driver, cpu_s) for cpu_s in (0.004, 0.002)]
    with closing(meter_for(DeviceProfile.model_validate_json(sys.argv[1]))) as meter:
        pair = EnergyPair(models[0], models[1], (), threads=1)
        samples = sample_energy(pair, meter, PLAN, STOPPING, lambda: None)
        facts = asdict(meter.facts)
    truth = [model.taken_mj / model.runs for model in models]
    print(json.dumps({"samples": samples.to_dict(), "facts": facts, "truth_mj": truth}))


if __name__ == "__main__":
    main()
