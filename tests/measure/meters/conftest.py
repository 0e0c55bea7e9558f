from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.device import DeviceProfile

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stand-in for NVIDIA's driver library; for LD_LIBRARY_PATH."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc or gcc) for the stand-in driver library")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libnvidia-ml.so.1"
    source = HERE / "nvml_standin.c"
    command = [compiler, "-O1", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def device_profile() -> Callable[..., DeviceProfile]:
    """A function that makes a profile; arguments replace keys."""

    def make(**changes: object) -> DeviceProfile:
        content: dict[str, object] = {
            "version": 2,
            "name": "test",
            "kind": "cpu",
            "runtimes": [{"name": "onnxruntime"}],
            "kernels": {},
            "measuring": {
                "target_half_width": 0.2,
                "time_limit_s": 1,
                "final_target_half_width": 0.2,
                "final_time_limit_s": 1,
                "hang_limit_s": 30,
            },
        }
        return DeviceProfile.model_validate(content | changes)

    return make
