"""Whole searches on a cluster that is this machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.cluster_utils import Cluster

from autocompress.errors import ConfigError, DeviceError
from autocompress.evaluation import Evaluation
from autocompress.search.cluster import connect
from autocompress.search.history import read_history
from autocompress.search.prepare import Options
from autocompress.search.record import EVALUATION, TrialRecord
from autocompress.search.run import run_search
from autocompress.search.storage import storage_of

DIGITS = Path(__file__).parents[3] / "experiments" / "digits.yaml"


def measured(run: Path) -> list[Evaluation]:
    return [e for _, e in read_history(run) if e.split == "search"]


def device_times(run: Path) -> list[tuple[float, float]]:
    times = [
        (start, end) for e in measured(run) for _, start, end in e.details.get("device_times", [])
    ]
    return sorted(times)


def assert_once_and_apart(run: Path, count: int) -> None:
    """Every trial is finished once, and no two measurements overlapped."""
    names = Counter(e.candidate for e in measured(run))
    assert len(names) == count and set(names.values()) == {1}
    times = device_times(run)
    assert len(times) >= 2
    assert all(first[1] <= second[0] for first, second in pairwise(times))


def trials(run: Path) -> list[Any]:
    directions = (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
    return TrialRecord(storage_of(run), directions).trials()


def wait_for(condition: Callable[[], bool], search: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert search.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def no_cluster() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_run_goes_from_one_engine_to_the_other_and_back(
    tiny_experiment: Callable[..., Path], tmp_path: Path, no_cluster: None
) -> None:
    experiment, run = tiny_experiment(), tmp_path / "run"
    wanted = {"run": run, "seed": 0}
    front = run_search(experiment, Options(**wanted, trials=6, engine="ray"))
    assert_once_and_apart(run, 6)
    assert front.rows
    for e in measured(run):
        assert (run / e.artifact).is_file()
        assert (run / "measurements" / f"{e.candidate}-search.json").is_file()
    run_search(experiment, Options(**wanted, trials=9))
    assert len(measured(run)) == 9
    run_search(experiment, Options(**wanted, trials=12, engine="ray"))
    names = [e.candidate for e in measured(run)]
    assert len(names) == len(set(names)) == 12


@pytest.mark.slow
def test_without_a_device_a_builder_or_a_cluster_it_is_refused(
    tiny_experiment: Callable[..., Path],
    tmp_path: Path,
    no_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment, run = tiny_experiment(), tmp_path / "run"
    with pytest.raises(ConfigError, match="cannot be joined"):
        run_search(experiment, Options(run=run, engine="ray", address="127.0.0.1:1"))
    monkeypatch.setattr(connect, "_WAIT_S", 2.0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with pytest.raises(DeviceError, match="carries the device") as caught:
            run_search(experiment, Options(run=run, engine="ray", address=cluster.address))
        assert "device:quick" in str(caught.value)
    finally:
        cluster.shutdown()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "resources": {"device:quick": 1}}
    )
    try:
        with pytest.raises(ConfigError, match="has a CPU"):
            run_search(experiment, Options(run=run, engine="ray", address=cluster.address))
    finally:
        cluster.shutdown()
    assert not run.exists()


@pytest.mark.faults
def test_ten_nodes_killed_at_random_lose_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    chance = random.Random(0)
    device = {"num_cpus": 0, "resources": {"device:cpu": 1}}
    builder = {"num_cpus": 2}
    nodes = [(cluster.add_node(**kind), kind) for kind in (device, builder, builder)]
    command = [sys.executable, "-m", "autocompress", "search", str(DIGITS), "--run", str(run)]
    command += ["--trials", "60", "--engine", "ray", "--address", cluster.address]
    killed: list[int] = []
    # Nodes can be added by the main thread only, so the search is another process; the cluster of
    # the tests has no tokens, also where the machine has one.
    search = subprocess.Popen(command, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    try:
        wait_for(lambda: len(list((run / "artifacts").glob("*.onnx"))) > 6, search)
        while len(killed) < 10 and search.poll() is None:
            place = chance.randrange(len(nodes))
            node, kind = nodes[place]
            cluster.remove_node(node, allow_graceful=False)
            killed.append(place)
            time.sleep(chance.uniform(0, 2))
            nodes[place] = (cluster.add_node(**kind), kind)
            time.sleep(chance.uniform(2, 6))
        assert search.wait(900) == 0
    finally:
        search.kill()
        search.wait()
        cluster.shutdown()
    assert len(killed) == 10
    assert_once_and_apart(run, 60)
    states = Counter(t.state for t in trials(run) if EVALUATION in t.user_attrs)
    assert states == {TrialState.COMPLETE: 60}
