from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from measuring import FEATURES, Models, make_profile

from autocompress.device import DeviceProfile, TensorRtSettings
from autocompress.measure.client import Worker


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def profile() -> DeviceProfile:
    return make_profile()


@pytest.fixture
def short_profile() -> DeviceProfile:
    return make_profile(hang_limit_s=4)


@pytest.fixture
def lacking_profile() -> DeviceProfile:
    return make_profile(TensorRtSettings(name="tensorrt"))


@pytest.fixture(scope="session")
def worker(profile: DeviceProfile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(profile, tmp_path_factory.mktemp("scratch")) as made:
        yield made


@pytest.fixture(scope="session")
def split() -> list[np.ndarray]:
    return [np.random.default_rng(0).standard_normal((37, FEATURES), np.float32)]
