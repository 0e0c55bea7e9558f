"""A Ray cluster, joined or started here, and the nodes in it that carry a device."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from autocompress.device import DeviceProfile, Fingerprint, make_fingerprint, usable_cores
from autocompress.device.facts import differences
from autocompress.errors import ConfigError, DeviceError
from autocompress.search.cluster.device_node import DeviceNode
from autocompress.search.cluster.node_host import NodeHost
from autocompress.search.cluster.own_folder import tidy

_TIDY_S = 5.0
_CONNECT_S = 10.0
_WAIT_S, _POLL_S = 30.0, 0.5
_VARIABLES = {
    # Tune would write every result three times more; the study is what is kept.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The study is the truth: Tune's own snapshots are never read.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "-1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # An interrupt is the search's to handle.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
    # A candidate that failed has no figures.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


@final
@dataclass(frozen=True)
class Node:
    """A node that measures.

    Attributes:
        host: speaks to its actor.
        name: of the machine.
        cores: of the machine that measure.
    """

    actor: ActorHandle
    host: NodeHost
    name: str
    cores: tuple[int, ...]


@final
@dataclass(frozen=True)
class Cluster:
    """A cluster that was joined.

    Attributes:
        nodes: those that carry the device, all with the same fingerprint; at least one.
        cpus: of all nodes together, as Ray counts them.
        started_here: whether it is this machine alone, and ends with this process.
        resource: what the nodes carry.
    """

    nodes: tuple[Node, ...]
    cpus: float
    started_here: bool
    resource: str

    def away(self) -> int:
        """How many of the nodes that measure the cluster lacks at present."""
        present = int(ray.cluster_resources().get(self.resource, 0))
        return max(0, len(self.nodes) - present)


def resource_of(profile: DeviceProfile) -> str:
    """The resource that a node with a profile's device carries."""
    return f"device:{profile.name}"


@contextmanager
def joined(
    address: str | None, profile: DeviceProfile, note: Callable[[str], None]
) -> Iterator[Cluster]:
    """Join a cluster, or start one on this machine, and find the device in it.

    Args:
        address: of the cluster's head, `auto` for the one that runs on this machine, or None to
            start one here that ends with the block.
        note: told of nodes that are left out.

    Raises:
        ConfigError: there is no cluster at the address, or nothing in it that builds.
        DeviceError: no node carries the device, or none that can be used.
    """
    set_variables()
    _init(address, profile)
    try:
        found = _resources(profile, note)
        nodes = _nodes(profile, int(found[resource_of(profile)]), note)
        try:
            yield Cluster(nodes, found["CPU"], address is None, resource_of(profile))
        finally:
            for node in nodes:
                _close(node.actor)
    finally:
        ray.shutdown()
        tidy()


def set_variables() -> None:
    """Tell Tune, before it is used, to be quiet and to write nothing that nobody reads."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)


def _init(address: str | None, profile: DeviceProfile) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        # Nothing else is to run on the cores that measure.
        others = len(usable_cores()) - (profile.threads if profile.kind == "cpu" else 0)
        # Without an address Ray would look for a cluster that somebody else has started here.
        ray.init(
            address="local",
            num_cpus=max(1, others),
            resources={resource_of(profile): 1},
            include_dashboard=False,
            **quiet,
        )
        return
    try:
        _check_answers(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as cause:
        raise ConfigError(
            f"The cluster cannot be joined: {cause}",
            given=address,
            allowed="HOST:PORT of a head node, or auto for the cluster that this machine is in",
            advice=(
                "start one with `ray start --head`, or leave --address out to use this machine; if "
                "it asks for a token, put it into ~/.ray/auth_token"
            ),
        ) from cause


def _resources(profile: DeviceProfile, note: Callable[[str], None]) -> Mapping[str, float]:
    """What all nodes have together; a cluster that has just been started is waited for.

    Raises:
        DeviceError: none carries the device.
        ConfigError: none has a CPU to build candidates with.
    """
    wanted, deadline, noted = (resource_of(profile), "CPU"), time.monotonic() + _WAIT_S, False
    while True:
        found = ray.cluster_resources()
        missing = [name for name in wanted if found.get(name, 0) < 1]
        if not missing:
            return dict(found)
        if time.monotonic() > deadline:
            raise _no_cpu(found) if missing == ["CPU"] else _no_device(profile, found)
        if not noted:
            note(f"no node has {' or '.join(missing)} yet; waiting {_WAIT_S:.0f} s for one")
            noted = True
        time.sleep(_POLL_S)


def _check_answers(address: str) -> None:
    """Ray itself would try for many minutes, then end this process.

    Raises:
        OSError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    # `auto` and addresses with a scheme are Ray's to resolve.
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def _nodes(profile: DeviceProfile, count: int, note: Callable[[str], None]) -> tuple[Node, ...]:
    """Actors on all nodes that carry the device and are like the first one."""
    actor_class = ray.remote(DeviceNode)
    # Whatever befalls the node or the actor, it comes back where the device does.
    options = actor_class.options(
        num_cpus=0, resources={resource_of(profile): 1}, max_restarts=-1, max_task_retries=0
    )
    actors = [options.remote(profile.model_dump_json()) for _ in range(count)]
    found: list[tuple[Node, Fingerprint]] = []
    refused: list[DeviceError] = []
    with TemporaryDirectory() as scratch:
        for actor in actors:
            host = NodeHost(actor)
            try:
                facts = host.facts(Path(scratch))
            except DeviceError as reason:
                refused.append(reason)
                _close(actor)
                continue
            cores = profile.pinned_cores(facts.cores) if profile.kind == "cpu" else ()
            node = Node(actor, host, host.name, cores)
            found.append((node, make_fingerprint(profile, facts)))
    if not found:
        raise refused[0]
    first = found[0][1]
    alike: list[Node] = []
    for node, fingerprint in found:
        if fingerprint == first:
            alike.append(node)
            continue
        _close(node.actor)
        what = "; ".join(differences(first, fingerprint)) or "the runtimes' versions"
        note(f"a node with {resource_of(profile)} is left out, it differs from the first: {what}")
    for refusal in refused:
        note(f"a node with {resource_of(profile)} is left out: {refusal.what}")
    return tuple(alike)


def _close(actor: ActorHandle) -> None:
    # Its children end with it, whether it can still tidy up or not.
    with suppress(RayError):
        ray.get(actor.close.remote(), timeout=_TIDY_S)
    ray.kill(actor)


def _no_device(profile: DeviceProfile, resources: Mapping[str, float]) -> DeviceError:
    others = sorted(name for name in resources if name.startswith("device:"))
    return DeviceError(
        "No node of the cluster carries the device.",
        given=f"{resource_of(profile)}; the cluster has {', '.join(others) or 'no device'}",
        allowed="a node that was started with the resource",
        advice=(
            "on the device: ray start --address=HEAD:6379 "
            f"--resources='{{\"{resource_of(profile)}\": 1}}'"
        ),
    )


def _no_cpu(resources: Mapping[str, float]) -> ConfigError:
    return ConfigError(
        "No node of the cluster has a CPU to build candidates with.",
        given=f"{resources.get('CPU', 0):g} CPUs on all nodes together",
        allowed="a node that was started with --num-cpus of 1 or more",
        advice="on a machine that is to build: ray start --address=HEAD:6379",
    )
