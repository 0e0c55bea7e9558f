"""The files of `experiments/cluster/`, as far as one machine can tell."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FOLDER = Path(__file__).resolve().parents[3] / "experiments" / "cluster"
DIGITS = FOLDER.parent / "digits.yaml"


def test_ray_takes_the_cluster_file() -> None:
    text = (FOLDER / "raycluster.yaml").read_text()
    names = {"HEAD": "10.0.0.1", "BUILDER1": "10.0.0.2", "BUILDER2": "10.0.0.3"}
    for name, address in names.items():
        text = text.replace(name, address)
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    start = " ".join(config["worker_start_ray_commands"])
    assert '"device:cpu": 1' in start and "autocompress[device]" in text


def test_the_slurm_script_starts_a_head_builders_and_a_device(tmp_path: Path) -> None:
    stubs = {
        "scontrol": "printf 'n1\\nn2\\nn3\\nn4\\n'",
        "srun": f'echo "$*" >> {tmp_path}/log.txt',
        "sleep": "exit 0",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip
    script = [str(FOLDER / "slurm.sh"), str(DIGITS), "--trials", "40"]
    subprocess.run(["bash", *script], env=environment, check=True)
    # What it starts in the background may write after its end.
    deadline = time.monotonic() + 60
    while len(lines := (tmp_path / "log.txt").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
    by_node = {
        node: [x for x in lines if f"--nodelist={node} " in x] for node in ["n1", "n2", "n3", "n4"]
    }
    assert any("ray start --head" in line for line in by_node["n1"])
    assert all("ray start --address=n1:6379 --num-cpus=8" in by_node[n][0] for n in ("n2", "n3"))
    (device,) = by_node["n4"]
    resources = device.partition("--resources=")[2].partition(" --block")[0]
    assert json.loads(resources) == {"device:cpu": 1} and "--num-cpus=0" in device
    (search,) = (line for line in by_node["n1"] if "autocompress search" in line)
    assert search.endswith("--engine ray --address n1:6379 --trials 40")


def test_the_kubernetes_file_has_builders_and_a_device() -> None:
    cluster = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
    assert cluster["kind"] == "RayCluster"
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert set(groups) == {"builders", "device"}
    # KubeRay passes the text on to a shell.
    resources = groups["device"]["rayStartParams"]["resources"]
    assert json.loads(json.loads(resources)) == {"device:cpu": 1}
    assert groups["device"]["rayStartParams"]["num-cpus"] == "0"
