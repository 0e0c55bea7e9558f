"""Everything that is loaded and checked before a search writes its first file."""

from __future__ import annotations

import hashlib
import inspect
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, final

from autocompress.allocator import keep_freed_memory
from autocompress.bank import Bank, Counter
from autocompress.bank.store import make_key, network_hash, tensors_hash
from autocompress.build import Builder, Stopwatch
from autocompress.config import (
    Experiment,
    SearchSettings,
    load_experiment,
    load_search_space,
    parse_duration,
    validate,
)
from autocompress.device import DeviceProfile, Fingerprint, load_profile, make_fingerprint
from autocompress.errors import ConfigError, DeviceError
from autocompress.evaluate import Device
from autocompress.export.exporter import Exporter
from autocompress.graph import NetworkGraph, trace
from autocompress.measure.host import host_of
from autocompress.measure.host_interface import Host
from autocompress.measure.meters import meter_for
from autocompress.measure.settle import settle
from autocompress.plan import Decision
from autocompress.search.arrange import arranged
from autocompress.search.limits import parse_limits
from autocompress.search.progress import Progress
from autocompress.search.run_folder import Identity, RunFolder
from autocompress.search.space import Space, build_space, unused_values
from autocompress.techniques import (
    GroupTechnique,
    LayerTechnique,
    technique_of,
)
from autocompress.techniques.qat import Qat
from autocompress.techniques.recovery import Recover
from autocompress.workload import Workload, check_workload, load_workload

# On so many calibration samples PyTorch and ONNX are compared.
_PARITY_SAMPLES = 8


@final
@dataclass(frozen=True)
class Options:
    """What a call may set beside the experiment file; None leaves the file's value.

    Attributes:
        engine: `local`, or `ray` for a cluster.
        address: of the cluster's head; see `cluster.connect.joined`.
        storage: where the study is kept; see `storage.settle`.
        artifacts: a location that all nodes see; None for the run folder.
    """

    run: Path | None = None
    trials: int | None = None
    time: str | None = None
    seed: int | None = None
    limits: tuple[str, ...] = ()
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    storage: str | None = None
    artifacts: str | None = None


@final
@dataclass(frozen=True)
class Prepared:
    """A checked experiment, before anything is written.

    Attributes:
        workload_s: seconds that the user's own function took; not part of the time limit.
    """

    experiment: Experiment
    device: Device
    workload: Workload
    graph: NetworkGraph
    exporter: Exporter
    space: Space
    identity: Identity
    folder: RunFolder
    workload_s: float

    @property
    def profile(self) -> DeviceProfile:
        """The device's profile."""
        return self.device.profile


def prepare(
    path: Path,
    options: Options,
    progress: Progress,
    find_host: Callable[[DeviceProfile], Host] = host_of,
    profile: DeviceProfile | None = None,
) -> Prepared:
    """Load and check all that a search needs; writes nothing.

    From then on this process keeps large blocks of memory that it frees (`keep_freed_memory`).

    Args:
        find_host: where a profile's device is.
        profile: takes the place of the experiment's own.

    Raises:
        AutocompressError: whatever is wrong with experiment, device, workload or network.
    """
    keep_freed_memory()
    experiment = with_options(load_experiment(path), options)
    space_file = load_search_space(experiment.search_space, path)
    profile = profile or load_profile(experiment.device, path)
    wanted = wanted_figures(experiment)
    device, fingerprint, notes = open_device(profile, find_host(profile), wanted)
    profile = device.profile
    for note in notes:
        progress.note(note)
    progress.stage("load workload")
    clock = Stopwatch()
    with clock.step("workload"):
        workload = load_workload(experiment.workload, path)
    progress.stage("check workload")
    for warning in check_workload(workload):
        progress.note(f"warning: {warning}")
    workload = arranged(workload)
    if workload.padding.axes:
        progress.note("samples end in padding, which statistics and trainings leave out")
    progress.stage("trace network")
    graph = trace(workload.network, workload.example_inputs)
    for note in graph.notes:
        progress.note(f"warning: {note}")
    progress.stage("export network")
    exporter = make_exporter(workload, graph)
    graph = graph.leaving(exporter.faults)
    space = build_space(graph, space_file, profile)
    check_training_data(space, workload)
    unused = unused_values(space_file, space, profile)
    if unused:
        progress.note(
            "not searched, because no layer takes it, the device has no kernel for it, or it makes "
            "nothing cheaper: " + "; ".join(unused)
        )
    note_left(graph, progress)
    identity = Identity(
        experiment,
        space_file,
        profile,
        fingerprint,
        network_hash(workload.network),
        data_identity(workload),
    )
    folder = RunFolder(options.run or Path("runs") / experiment.name)
    seconds = clock.seconds["workload"]
    return Prepared(experiment, device, workload, graph, exporter, space, identity, folder, seconds)


def make_exporter(workload: Workload, graph: NetworkGraph) -> Exporter:
    """The workload's exporter, after the original network has gone through it.

    Raises:
        ExportError: the network cannot be exported, or computes something else in ONNX.
    """
    parity = tuple(x[:_PARITY_SAMPLES] for x in workload.calibration.inputs)
    example, axes = workload.example_inputs, workload.dynamic_axes
    exporter = Exporter(workload.network, graph, example, parity, axes)
    exporter.export(workload.network)
    return exporter


def note_left(graph: NetworkGraph, progress: Progress) -> None:
    """Tell which layers no technique may change, and the first reason."""
    left = [layer for layer in graph.layers if layer.reason]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        progress.note(
            f"left as they are: {left[0].name} ({left[0].reason}){more}; "
            "`autocompress inspect` shows all layers"
        )


def wanted_figures(experiment: Experiment) -> frozenset[str]:
    """The objectives, and the figures that limits are put on."""
    limits = parse_limits(experiment.search.limits)
    return frozenset({*experiment.objectives, *(limit.figure for limit in limits)})


def open_device(
    profile: DeviceProfile, host: Host, wanted: Collection[str]
) -> tuple[Device, Fingerprint, tuple[str, ...]]:
    """A device as it turns out to be, and notes on what of its profile it lacks.

    Args:
        wanted: see `wanted_figures`.

    Raises:
        DeviceError: it lacks cores, a GPU, a runtime that is not optional, or a meter.
    """
    with tempfile.TemporaryDirectory() as scratch:
        profile, facts, notes = settle(profile, Path(scratch), host)
    if host.here and {"energy", "energy_mj"} & set(wanted):
        meter_for(profile)
    if {"gpu_memory", "gpu_memory_bytes"} & set(wanted) and profile.kind != "cuda":
        raise DeviceError(
            "An objective or limit of GPU memory needs a device with a GPU.",
            given=f"device {profile.name} of kind {profile.kind}",
            allowed="a profile of kind cuda",
            advice="take peak_memory, the resident bytes, instead",
        )
    return Device(profile, host), make_fingerprint(profile, facts), notes


def check_training_data(space: Space, workload: Workload) -> None:
    """Check that there is a train split if the space offers to train.

    Raises:
        ConfigError: there is none.
    """
    trained = [step.decision for step in space.steps() if technique_of(step.decision).stage.trains]
    if trained and workload.train is None:
        names = sorted({decision.technique for decision in trained})
        raise ConfigError(
            "The search space offers to train, and the workload has no train split.",
            given=", ".join(names),
            advice="give Workload(train=Split(inputs, targets)); distillation needs no targets",
        )
    unlabeled = workload.train is not None and workload.train.targets is None
    supervised = [d for d in trained if _needs_labels(d)]
    if unlabeled and supervised:
        raise ConfigError(
            "The search space offers to learn from labels, and the train split has no targets.",
            given=supervised[0].model_dump(mode="json"),
            allowed="method response, feature or response_feature; distil true",
            advice="give the train split targets, or distil",
        )


def _needs_labels(decision: Decision) -> bool:
    return (isinstance(decision, Recover) and decision.method == "fine_tune") or (
        isinstance(decision, Qat) and not decision.distil
    )


def data_identity(workload: Workload) -> str:
    """A hash of every split, of the metric's name or source, and of the open axes."""
    tensors = [
        tensor
        for split in workload.splits().values()
        for tensor in (*split.inputs, *(() if split.targets is None else (split.targets,)))
    ]
    text = _source(workload.metric) if callable(workload.metric) else workload.metric
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return make_key(tensors_hash(tuple(tensors)), digest, *map(dict, workload.dynamic_axes))


def _source(function: Callable[..., object]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        # A metric without source, such as a partial function, is known by its type only.
        return type(function).__name__


def with_options(experiment: Experiment, options: Options) -> Experiment:
    """The experiment with a call's own limits; a limit given in the call replaces the file's.

    Raises:
        ConfigError: there is no limit at all, or one that cannot be read.
    """
    settings = experiment.search.model_dump()
    if options.trials is not None or options.time is not None:
        settings |= {"trials": options.trials, "time_s": None}
    if options.time is not None:
        settings["time_s"] = parse_duration(options.time)
    if options.seed is not None:
        settings["seed"] = options.seed
    if options.limits:
        settings["limits"] = options.limits
    parse_limits(settings["limits"])
    if settings["trials"] is None and settings["time_s"] is None:
        raise ConfigError(
            "The search has no limit.",
            allowed="search.trials or search.time_s in the experiment, --trials N or --time 10m",
        )
    checked = validate(SearchSettings, settings, "the search's limits", ConfigError)
    return experiment.model_copy(update={"search": checked})


def fill_bank(prepared: Prepared, progress: Progress) -> Bank:
    """Calibrate and solve every variant of the original layers; what is on disk is read."""
    bank = Bank(
        prepared.workload.network,
        prepared.graph,
        prepared.profile.channel_multiple,
        prepared.folder.bank,
    )
    settings = prepared.experiment.calibration
    counter = Counter(partial(progress.stage, "calibrate"), progress.advance)
    workload = prepared.workload
    bank.calibrate(workload.calibration.inputs, settings, counter, workload.padding)
    steps = list(prepared.space.steps())
    if any(_reads_gradients(step.decision) for step in steps):
        bank.gather_gradients(Counter(partial(progress.stage, "gradients"), progress.advance))
    progress.stage("fill bank", len(steps))
    for step in steps:
        _solve(bank, step.target, step.decision)
        progress.advance()
    return bank


def builder_of(prepared: Prepared, bank: Bank) -> Builder:
    """What makes a search's candidates, in its run folder."""
    return Builder(
        prepared.workload,
        prepared.exporter,
        bank,
        prepared.profile,
        prepared.experiment.calibration,
        prepared.folder.path,
    )


def _reads_gradients(decision: Decision) -> bool:
    technique = technique_of(decision)
    if isinstance(technique, (GroupTechnique, LayerTechnique)):
        return technique.uses_gradients(decision)
    return False


def _solve(bank: Bank, target: str, decision: Decision) -> None:
    """Solve one decision for an unchanged target; what works on the whole network has no part."""
    technique = technique_of(decision)
    if isinstance(technique, GroupTechnique):
        bank.order(bank.graph.group(target), technique, decision)
    elif isinstance(technique, LayerTechnique) and not technique.folds_norm(decision):
        bank.solve_unchanged(technique, decision, target)
