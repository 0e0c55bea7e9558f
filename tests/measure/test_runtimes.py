from __future__ import annotations

import numpy as np
import pytest

from autocompress.device import DeviceProfile, RuntimeSettings
from autocompress.errors import DeviceError
from autocompress.measure.runtime import RUNTIMES, Runtime, runtime_for

SETTINGS = {
    "onnxruntime": RuntimeSettings(name="onnxruntime", provider="CPUExecutionProvider", threads=1)
}


@pytest.fixture(params=RUNTIMES, ids=lambda runtime: runtime.name)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return request.param


def test_the_name_leads_to_the_runtime(runtime: Runtime) -> None:
    assert runtime_for(SETTINGS[runtime.name]) is runtime


def test_it_computes_what_numpy_computes(runtime: Runtime, models, split) -> None:
    session = runtime.load(models.two_outputs(), SETTINGS[runtime.name])
    assert session.input_names == ("x",)
    outputs = session.run(split)
    assert isinstance(outputs, tuple) and len(outputs) == 2
    np.testing.assert_array_equal(outputs[0], -split[0])


def test_runs_are_repeatable_and_leave_inputs_alone(runtime: Runtime, models, split) -> None:
    session = runtime.load(models.dense(32), SETTINGS[runtime.name])
    before = split[0].copy()
    first, second = session.run(split), session.run(split)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(split[0], before)


@pytest.mark.parametrize("level", ["all", "extended", "basic", "none"])
def test_every_graph_optimization_loads(runtime: Runtime, models, split, level: str) -> None:
    settings = SETTINGS[runtime.name].model_copy(update={"graph_optimization": level})
    assert runtime.load(models.dense(32), settings).run(split)[0].shape == (37, 16)


def test_a_corrupt_file_raises(runtime: Runtime, models) -> None:
    with pytest.raises(Exception):  # noqa: B017 - each runtime has its own errors
        runtime.load(models.corrupt(), SETTINGS[runtime.name])


def test_wrong_numbers_of_inputs_raise(runtime: Runtime, models, split) -> None:
    session = runtime.load(models.dense(32), SETTINGS[runtime.name])
    with pytest.raises(ValueError):
        session.run([*split, *split])


def test_a_lacking_provider_names_what_there_is(
    runtime: Runtime, lacking_profile: DeviceProfile
) -> None:
    runtime.check_available(SETTINGS[runtime.name])
    with pytest.raises(DeviceError) as caught:
        runtime.check_available(lacking_profile.runtime)
    assert "NoSuchExecutionProvider" in str(caught.value)
    assert SETTINGS[runtime.name].provider in str(caught.value)
