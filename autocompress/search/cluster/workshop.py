"""What a process elsewhere needs to judge, build and measure candidates of one search.

All of it is computed once, by the process that runs the search, and shared through Ray's object
store; each process that works for the search unpacks it once.
"""

from __future__ import annotations

import os
import platform
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar, final

from ray import cloudpickle
from ray.actor import ActorHandle

from autocompress.allocator import keep_freed_memory
from autocompress.bank import Bank
from autocompress.bank.bank import BankState
from autocompress.build import BASELINE, Builder, Stopwatch
from autocompress.config import CalibrationSettings
from autocompress.device import DeviceProfile
from autocompress.errors import AutocompressError, DeviceError, SearchError
from autocompress.evaluate import Device, Evaluator, Extras
from autocompress.evaluation import Evaluation
from autocompress.export.exporter import Exporter
from autocompress.graph import NetworkGraph
from autocompress.plan import Plan
from autocompress.recover import Watch
from autocompress.search.agenda import reason_of
from autocompress.search.cluster.artifacts import Location
from autocompress.search.cluster.node_host import NodeHost
from autocompress.search.cluster.own_folder import WORKSHOP, OwnFolder
from autocompress.search.judge import Sample, Seen
from autocompress.search.patience import Patience, may_pass
from autocompress.workload import Workload
from autocompress.workload.loading import WORKLOAD_PREFIX

_PACKAGE = "autocompress"
# In an evaluation's details: when the device was busy with it.
DEVICE_TIMES = "device_times"
ResultT = TypeVar("ResultT")


@final
@dataclass(frozen=True)
class Shared:
    """What is shared.

    Attributes:
        token: of the search's call; processes keep what they unpacked by it.
        workload: without its train split where nothing is trained.
        original: the ONNX file that every speed-up is relative to.
        nodes: actors of `DeviceNode`.
        location: where files go.
        pinned: by a machine's name its cores that measure.
    """

    token: str
    workload: Workload
    graph: NetworkGraph
    exporter: Exporter
    bank: BankState
    profile: DeviceProfile
    calibration: CalibrationSettings
    extras: Extras
    seed: int
    original: bytes
    nodes: tuple[ActorHandle, ...]
    location: Location
    pinned: Mapping[str, tuple[int, ...]]


def new_token() -> str:
    """A token that no other call has."""
    return uuid.uuid4().hex[:12]


@contextmanager
def carried() -> Iterator[None]:
    """Within the block, what a user's modules define is pickled whole, not by the module's name.

    The nodes need not have the user's files then.
    """
    modules = list(_users_modules())
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _users_modules() -> Iterator[ModuleType]:
    """The modules of workload files, and those beside them."""
    modules = {
        name: Path(file).resolve()
        for name, module in list(sys.modules.items())
        if (file := getattr(module, "__file__", None)) and name.partition(".")[0] != _PACKAGE
    }
    folders = {path.parent for name, path in modules.items() if name.startswith(WORKLOAD_PREFIX)}
    for name, path in modules.items():
        own = any(path.is_relative_to(folder) for folder in folders)
        if own and name != "__main__" and "site-packages" not in path.parts:
            yield sys.modules[name]


def keep_off(cores: Sequence[int]) -> None:
    """Let this process run on other cores than those that measure, if there are others."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before - set(cores) or before)


@final
class Workshop:
    """Judges, builds and measures candidates in a process that is not the search's own."""

    def __init__(self, shared: Shared) -> None:
        keep_freed_memory()
        shared.location.check(platform.node())
        keep_off(shared.pinned.get(platform.node(), ()))
        self._shared = shared
        # Deleted with this object.
        self._own = OwnFolder(WORKSHOP)
        self._folder = self._own.path
        network = shared.workload.network.eval()
        multiple = shared.profile.channel_multiple
        bank = Bank(network, shared.graph, multiple, self._folder / "bank")
        bank.take(shared.bank)
        self._builder = Builder(
            shared.workload, shared.exporter, bank, shared.profile, shared.calibration, self._folder
        )
        self._builder.path(BASELINE).write_bytes(shared.original)
        self._sample: Sample | None = None
        self._evaluators: dict[int, tuple[Evaluator, NodeHost]] = {}

    @property
    def builder(self) -> Builder:
        """What makes the candidates."""
        return self._builder

    def look(self, plan: Plan) -> tuple[Seen, ...]:
        """What a plan's network makes of all samples that plans are judged on."""
        if self._sample is None:
            self._sample = Sample(self._shared.workload, self._builder, self._shared.seed)
        tried = self._builder.network(plan, Stopwatch())
        return self._sample.first(tried), self._sample.further(tried.network)

    def measure(
        self, plan: Plan, runtime: str, node: int, watch: Watch | None = None
    ) -> Evaluation:
        """Build a candidate and measure it on one of the nodes; its files are kept.

        What was trained of it on any node is not trained again.

        Args:
            watch: follows the plan's trainings, and may stop them.

        Raises:
            DeviceError: the node is away for too long.
            AutocompressError: as `Evaluator.artifact` and `Evaluator.measure`.
        """
        evaluator, host = self._evaluator(node)
        trained = self._builder.training_files(plan)
        for path in trained:
            with suppress(FileNotFoundError):
                self._shared.location.bring(str(path.relative_to(self._folder)), self._folder)
        try:
            artifact = evaluator.artifact(plan, None, watch)
        finally:
            for path in trained:
                if path.is_file():
                    self._keep(path)
        host.held.clear()
        evaluation = evaluator.measure(artifact, plan, runtime, "search", final=False)
        times = [[held.node, held.start_s, held.end_s] for held in host.held]
        self._keep(artifact.path)
        for path in (self._folder / "measurements").glob(f"{evaluation.candidate}-*.json"):
            self._keep(path)
        return replace(evaluation, details={**evaluation.details, DEVICE_TIMES: times})

    def _keep(self, path: Path) -> None:
        name = str(path.relative_to(self._folder))
        self._shared.location.keep(name, path.read_bytes())

    def _evaluator(self, node: int) -> tuple[Evaluator, NodeHost]:
        if node not in self._evaluators:
            host = NodeHost(self._shared.nodes[node])
            device = Device(self._shared.profile, host)
            evaluator = Evaluator(
                self._shared.workload, self._builder, device, self._folder, self._shared.extras
            )
            self._evaluators[node] = (evaluator, host)
        return self._evaluators[node]


_OPEN: dict[str, Workshop] = {}


def workshop_of(token: str, get: Callable[[], Shared]) -> Workshop:
    """This process's workshop for a search, made once.

    Args:
        get: fetches what is shared.
    """
    if token not in _OPEN:
        # Of an earlier call in the same process nothing is needed any more.
        _OPEN.clear()
        _OPEN[token] = Workshop(get())
    return _OPEN[token]


@final
@dataclass(frozen=True)
class Failure:
    """Why a plan has no figures; for the plan's own fault."""

    reason: str


@final
@dataclass(frozen=True)
class Broken:
    """Why a process cannot work for the search at all; no plan's fault."""

    error: AutocompressError


def guarded(
    call: Callable[[], ResultT], patience: Callable[[Callable[[], ResultT]], ResultT] | None = None
) -> ResultT | Failure | Broken:
    """What a call returns, why the plan failed, or what is wrong with the machine.

    Args:
        patience: calls again while a disk is full; the usual one if left out.
    """
    patience = patience or Patience(may_pass, "a disk")
    try:
        return patience(call)
    except DeviceError as error:
        return Broken(error)
    except OSError as cause:
        return Broken(
            SearchError(
                f"A node of the cluster cannot work: {type(cause).__name__}: {cause}",
                given=platform.node(),
                advice="see to its disk, then give the same command again: it goes on",
            )
        )
    except Exception as cause:
        # Whatever one plan does to PyTorch must not end a search of hours.
        return Failure(reason_of(cause))
