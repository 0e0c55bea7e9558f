"""Three hosts in network namespaces: a head, a builder, and a device without PyTorch.

Needs root, `ip`, and minutes: a virtual environment is made for the device.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_cluster_search import assert_once_and_apart

ROOT = Path(__file__).resolve().parents[3]
BRIDGE, NETWORK = "acbridge", "10.77.61"
HOSTS = {"head": 1, "builder": 2, "device": 3}
CUT_S = 30.0

# Whoever joins must know the cluster's token.
TOKEN = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
    ),
]


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def inside(host: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", f"ac-{host}", *command]


@pytest.fixture
def hosts() -> Iterator[None]:
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    sh("ip", "link", "set", BRIDGE, "up")
    try:
        for host, number in HOSTS.items():
            sh("ip", "netns", "add", f"ac-{host}")
            here, there = f"ac-{host}-0", f"ac-{host}-1"
            sh("ip", "link", "add", here, "type", "veth", "peer", "name", there)
            sh("ip", "link", "set", here, "master", BRIDGE, "up")
            sh("ip", "link", "set", there, "netns", f"ac-{host}")
            sh(*inside(host, "ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", there))
            sh(*inside(host, "ip", "link", "set", there, "up"))
            sh(*inside(host, "ip", "link", "set", "lo", "up"))
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", f"ac-{host}"], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


@pytest.fixture
def device_python(tmp_path: Path) -> Path:
    """An environment with the extra `device`: it has no PyTorch."""
    folder = tmp_path / "device-venv"
    sh(sys.executable, "-m", "venv", str(folder))
    sh(str(folder / "bin" / "pip"), "install", "-q", "-e", f"{ROOT}[device]")
    python = folder / "bin" / "python"
    absent = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert absent.returncode != 0
    return python


def ray_start(log: Path, host: str, python: Path, *options: str) -> subprocess.Popen[bytes]:
    """A node that has joined, and is started anew when it ends, as the guides do it.

    The hosts share a folder: nodes that begin at once may collide.
    """
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--block", *options]
    loop = ["bash", "-c", 'while true; do "$@"; sleep 2; done', "loop", *command]
    with log.open("wb") as output:
        node = subprocess.Popen(
            inside(host, *loop, f"--node-ip-address={NETWORK}.{HOSTS[host]}"),
            stdout=output, stderr=output, start_new_session=True, env=TOKEN,
        )  # fmt: skip
    deadline = time.monotonic() + 240
    while b"Ray runtime started" not in log.read_bytes():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    return node


def test_a_cut_link_loses_nothing(
    hosts: None, device_python: Path, tiny_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    experiment, run = tiny_experiment(), tmp_path / "run"
    log = tmp_path / "ray.log"
    here, address = Path(sys.executable), f"{NETWORK}.1:6379"
    device = "--resources=" + json.dumps({"device:quick": 1})
    started = [ray_start(log, "head", here, "--head", "--port=6379", "--num-cpus=0")]
    try:
        time.sleep(8)
        started.append(ray_start(log, "builder", here, f"--address={address}", "--num-cpus=2"))
        started.append(
            ray_start(log, "device", device_python, f"--address={address}", "--num-cpus=0", device)
        )
        search = subprocess.Popen(
            inside(
                "head", str(here), "-m", "autocompress", "search", str(experiment), "--run",
                str(run), "--trials", "60", "--engine", "ray", "--address", address,
            ),
            cwd=ROOT, env=TOKEN,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while len(list((run / "artifacts").glob("*.onnx"))) < 15:
            assert search.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        sh("ip", "link", "set", "ac-device-0", "down")
        time.sleep(CUT_S)
        sh("ip", "link", "set", "ac-device-0", "up")
        assert search.wait(600) == 0
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(60)
    assert_once_and_apart(run, 60)
