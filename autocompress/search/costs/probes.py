"""Probes: a few files of a space's plans, built, measured and profiled in seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from autocompress.build import Builder
from autocompress.device import DeviceProfile
from autocompress.errors import ExportError, MeasurementError, PlanError
from autocompress.files import write_json
from autocompress.measure.client import Subject, Worker
from autocompress.measure.explain.breakdown import break_down
from autocompress.measure.explain.graph import FileGraph, read_graph
from autocompress.measure.explain.layers import layers_of
from autocompress.measure.session import Array
from autocompress.plan import Plan
from autocompress.search.costs.factored import Indices
from autocompress.search.costs.layer_shapes import ShapedLayer
from autocompress.search.costs.layer_times import PrecisionClass, precision_class
from autocompress.search.random_plans import random_plans
from autocompress.search.space import Space
from autocompress.techniques.technique import NETWORK, Stage

_FILE: Final = "costs.json"
_VERSION: Final = 1
# A profile runs a model so often, and for about so long.
_MOST_RUNS, _FEWEST_RUNS, _PROFILE_MS = 40, 10, 100.0
# What a probe's latency needs: the fit believes in 2 %.
_HALF_WIDTH, _TIME_LIMIT_S = 0.02, 0.4


@final
@dataclass(frozen=True)
class Probing:
    """What is profiled, and how.

    Attributes:
        runtime: full name of one of the profile's runtimes.
        inputs: one batch; one array per model input.
        multiple: the device's `channel_multiple`.
        folder: `costs.json` is kept there.
        probes: how many files are made at most; at least two.
        seed: of the random plans among them.
    """

    runtime: str
    inputs: Sequence[Array]
    multiple: int
    folder: Path
    probes: int = 10
    seed: int = 0


@final
@dataclass(frozen=True)
class Probe:
    """A file that was profiled and measured.

    Attributes:
        values: those of the space's parameters that are not 0.
        parts: layer, number of its part, and milliseconds of its nodes in the profile.
    """

    values: Mapping[str, int]
    milliseconds: float
    file_bytes: int
    parts: tuple[tuple[str, int, float], ...]


@final
@dataclass(frozen=True)
class Link:
    """A layer that another one reads, or two layers whose values are summed."""

    first: str
    second: str
    summed: bool


@final
@dataclass(frozen=True)
class Probes:
    """All probes of a space in a runtime, with the links between the original's layers."""

    probes: tuple[Probe, ...]
    links: tuple[Link, ...]


def quick_profile(profile: DeviceProfile) -> DeviceProfile:
    """The device with limits that suit probes: a worker with these takes a third of a second each.

    Its ids and fingerprint stay those of the device.
    """
    limits = {"target_half_width": _HALF_WIDTH, "time_limit_s": _TIME_LIMIT_S}
    return profile.model_copy(update={"measuring": profile.measuring.model_copy(update=limits)})


def links_of(graph: FileGraph, names: Iterable[str]) -> tuple[Link, ...]:
    """The links between the layers of those names in the original's file.

    A layer reads the one that is the fewest nodes away; of values that are summed, each is the
    nearest layer's.
    """
    known = set(names)
    layers = [layer for layer in layers_of(graph) if layer.name in known]
    owners = {key: layer.name for layer in layers for key in layer.nodes}
    found: list[Link] = []
    for node in graph.nodes:
        if node.key in owners:
            source = _nearest(graph, owners, node.inputs[0])
            found += [] if source is None else [Link(source, owners[node.key], False)]
        elif node.operator == "Add":
            sources = [_nearest(graph, owners, name) for name in node.inputs]
            told = [source for source in sources if source is not None]
            found += [Link(told[0], told[1], True)] if len(told) == 2 else []
    return tuple(dict.fromkeys(link for link in found if link.first != link.second))


def _nearest(graph: FileGraph, owners: Mapping[str, str], value: str) -> str | None:
    """The layer nearest before a value; None if there is none."""
    level, seen = [value], set[str]()
    while level:
        makers = [m for m in map(graph.maker, level) if m is not None and m.key not in seen]
        for maker in makers:
            if maker.key in owners:
                return owners[maker.key]
        seen |= {maker.key for maker in makers}
        level = [name for maker in makers for name in maker.inputs]
    return None


def probe(
    shaped: Sequence[ShapedLayer], space: Space, builder: Builder, worker: Worker, probing: Probing
) -> Probes:
    """Build, measure and profile the probes; those on disk are read.

    Raises:
        MeasurementError, ExportError: as `latency_costs`.
    """
    key = _key(space, worker, probing)
    path = probing.folder / _FILE
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get(probing.runtime, {}).get("key") == key:
        return _read(kept[probing.runtime])
    files = _Files(shaped, builder, worker, probing)
    try:
        found = files.take(probe_values(space, probing.probes, probing.seed), space)
    finally:
        files.remove()
    probing.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**kept, probing.runtime: {"key": key, **asdict(found)}})
    return found


def _key(space: Space, worker: Worker, probing: Probing) -> str:
    choices = [
        [p.name, [(d.technique, d.model_dump()) for d in p.decisions]] for p in space.parameters
    ]
    about = [
        _VERSION,
        choices,
        worker.fingerprint.id,
        probing.multiple,
        probing.probes,
        probing.seed,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def _read(data: Mapping[str, Any]) -> Probes:
    probes = tuple(
        Probe(**{**row, "parts": tuple((str(n), int(i), float(ms)) for n, i, ms in row["parts"])})
        for row in data["probes"]
    )
    return Probes(probes, tuple(Link(**row) for row in data["links"]))


def probe_values(space: Space, count: int, seed: int) -> tuple[Indices, ...]:
    """The original, the network at every precision class on offer, and random plans."""
    own = Space(tuple(p for p in space.parameters if p.target != NETWORK))
    whole: dict[PrecisionClass, dict[str, int]] = {}
    for parameter in own.parameters:
        if parameter.stage is Stage.QUANTIZE:
            for index, decision in enumerate(parameter.decisions, 1):
                whole.setdefault(precision_class(decision), {}).setdefault(parameter.name, index)
    found: dict[str, Indices] = {}
    for values in ({}, *(v for kind, v in whole.items() if kind != "float")):
        found.setdefault(own.plan(values).hash, values)
    for plan in random_plans(own, count, np.random.default_rng(seed)):
        found.setdefault(plan.hash, _values(own, plan))
    return tuple(found.values())[:count]


def _values(space: Space, plan: Plan) -> dict[str, int]:
    steps = {(s.target, s.decision) for s in plan.steps}
    return {
        p.name: i for p in space.parameters for i, d in enumerate(p.decisions, 1)
        if (p.target, d) in steps
    }  # fmt: skip


@final
class _Files:
    """The probes' files while they are there."""

    def __init__(
        self, shaped: Sequence[ShapedLayer], builder: Builder, worker: Worker, probing: Probing
    ) -> None:
        self._shaped = shaped
        self._builder = builder
        self._worker = worker
        self._probing = probing
        self._paths: list[Path] = []

    def take(self, chosen: Sequence[Indices], space: Space) -> Probes:
        """Build, measure and profile; values whose file cannot be made or run are left out."""
        built: list[tuple[Indices, Path]] = []
        for values in chosen:
            name = f"probe-{len(self._paths)}"
            self._paths.append(self._builder.path(name))
            try:
                built.append((values, self._builder.build(name, space.plan(values)).path))
            except (PlanError, ExportError):
                if not values:
                    raise
        latencies = self._latencies([path for _, path in built])
        graph = read_graph(built[0][1])
        links = links_of(graph, [shaped.layer.name for shaped in self._shaped])
        found = [
            Probe(dict(values), latencies[path], path.stat().st_size, parts)
            for values, path in built
            if path in latencies
            and (parts := self._profile(values, path, latencies[path])) is not None
        ]
        if not any(probe.parts for probe in found):
            raise MeasurementError(
                "The runtime's profile does not tell which nodes belong to which layer.",
                given=self._probing.runtime,
                advice="guess latencies by multiply-accumulates, or take another runtime",
            )
        return Probes(tuple(found), links)

    def remove(self) -> None:
        """Delete the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _latencies(self, paths: Sequence[Path]) -> dict[Path, float]:
        """Milliseconds, two files at a time; files that cannot run have none.

        Raises:
            MeasurementError: the first cannot.
        """
        found: dict[Path, float] = {}
        for i in range(0, len(paths), 2):
            first, second = paths[i], paths[min(i + 1, len(paths) - 1)]
            try:
                found |= self._pair(first, second)
            except MeasurementError:
                # One of the two fails: each is tried by itself.
                for path in (first, second):
                    try:
                        found |= self._pair(path, path)
                    except MeasurementError:
                        if path == paths[0]:
                            raise
        return found

    def _pair(self, first: Path, second: Path) -> dict[Path, float]:
        one, other = (Subject(path, self._probing.runtime) for path in (first, second))
        paired = self._worker.compare(one, other, self._probing.inputs, seed=0)
        return {first: paired.baseline_ms, second: paired.candidate_ms}

    def _profile(
        self, values: Indices, path: Path, latency_ms: float
    ) -> tuple[tuple[str, int, float], ...] | None:
        """The times of the parts that the profile tells; None if this file has no profile."""
        runs = int(np.clip(_PROFILE_MS / latency_ms, _FEWEST_RUNS, _MOST_RUNS))
        subject = Subject(path, self._probing.runtime)
        try:
            nodes = self._worker.profile(subject, self._probing.inputs, runs)
        except MeasurementError:
            if not values:
                raise
            return None
        # Nothing is taken off the times here: the fit tells profiling's overhead by itself.
        told = break_down(read_graph(path), nodes, float("inf"))
        parts = []
        for shaped in self._shaped:
            name, state = shaped.layer.name, shaped.chosen(values)
            for index, part in enumerate(state.parts):
                time = told.layer(name if len(state.parts) == 1 else f"{name}.{index}")
                if time is not None and time.layer.out_channels == part.out_channels:
                    parts.append((name, index, time.milliseconds))
        return tuple(parts)
