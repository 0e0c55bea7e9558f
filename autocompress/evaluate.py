"""From a plan to an artifact to figures: every figure comes from the file that ships."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from torch import nn

from autocompress.build import BASELINE, Artifact, Builder, Stopwatch
from autocompress.device import DeviceProfile, Fingerprint
from autocompress.errors import ExportError
from autocompress.evaluation import Evaluation, Repeat, SplitName
from autocompress.export.coding.beside import Coding, Codings
from autocompress.files import write_json
from autocompress.measure.client import Subject, Worker
from autocompress.measure.host_interface import Host
from autocompress.measure.latency import PairedLatency
from autocompress.measure.measurement import Measurement
from autocompress.measure.memory import peak_memory
from autocompress.measure.scoring import ScoringPool
from autocompress.plan import Plan, candidate_name
from autocompress.recover import Watch
from autocompress.scorer import Scorer
from autocompress.workload import Workload

# Detail that says why there is no coded size.
NOT_CODED = "not_coded"


@final
@dataclass(frozen=True)
class Measured:
    """Figures that still lack the coded size, whose container is being made.

    Attributes:
        coding: None if none is wanted.
    """

    evaluation: Evaluation
    coding: Coding | None


@final
@dataclass(frozen=True)
class Extras:
    """Figures that cost more, taken of every candidate because the search goes by them.

    Attributes:
        coded: make the coded container; else only that of finalists is made, once they are judged.
        energy: meter the energy.
        memory: measure the peak memory, in a fresh process.
    """

    coded: bool
    energy: bool
    memory: bool = False


@final
@dataclass(frozen=True)
class Device:
    """What is measured on, and where it is."""

    profile: DeviceProfile
    host: Host


@final
class Evaluator:
    """Builds and measures candidates of one workload on one device.

    A context manager: its processes end with it.

    Args:
        workload: checked; its network is in evaluation mode.
        builder: of the workload's candidates.
        device: what is measured on.
        folder: the run folder; files go to `measurements/` and `scratch/`.
        extras: figures that the search goes by.
    """

    def __init__(
        self,
        workload: Workload,
        builder: Builder,
        device: Device,
        folder: Path,
        extras: Extras,
    ) -> None:
        self._workload = workload
        self._builder = builder
        self._profile = profile = device.profile
        self._host = host = device.host
        self._folder = folder
        self._extras = extras
        (folder / "measurements").mkdir(exist_ok=True)
        scratch = folder / "scratch"
        self._timing = Worker(profile, scratch, host)
        self._scoring = ScoringPool(profile, self._timing.cores, scratch, host)
        # While other cores build candidates, scoring keeps to those that measure.
        pinned = profile.pinned_cores(self._timing.cores)
        self._beside = ScoringPool(profile, pinned, scratch, host)
        self._example = self._timing.store([x.numpy() for x in self._example_batch()])
        self._scorer = Scorer(workload, self._timing, self._baseline)
        self._built: dict[str, Artifact] = {}
        # A file that is measured in several runtimes has one container.
        self._codings = Codings(self._begin_coding)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the measuring workers, and what is still being coded."""
        self._codings.close()
        self._timing.close()
        self._scoring.close()
        self._beside.close()

    @property
    def fingerprint(self) -> Fingerprint:
        """What the figures may be compared with."""
        return self._timing.fingerprint

    def build_original(self) -> Artifact:
        """The original network's file: the baseline of every speed-up."""
        return self._builder.build(BASELINE, Plan())

    def build_stock(self, name: str) -> Artifact:
        """The stock tool's int8 file of the original network, under the given name.

        Raises:
            ExportError: the stock tool fails on this network.
        """
        return self._builder.build_stock(name, self._builder.path(BASELINE))

    @property
    def builder(self) -> Builder:
        """What makes the candidates' files."""
        return self._builder

    @property
    def extras(self) -> Extras:
        """Figures that cost more and are taken of every candidate."""
        return self._extras

    @property
    def worker(self) -> Worker:
        """The worker that takes latencies; for the thread that measures only."""
        return self._timing

    @property
    def example(self) -> Path:
        """One batch of real inputs, as `Worker.store` keeps it."""
        return self._example

    def measure(
        self, artifact: Artifact, plan: Plan, runtime: str, split: SplitName, *, final: bool
    ) -> Evaluation:
        """Take every figure of a file in a runtime.

        Args:
            artifact: the file, named after the plan or reference point.
            plan: what the file was made by; empty for reference points.
            runtime: full name of one of the profile's runtimes.
            split: what the metric is taken on.
            final: use the profile's tighter limits and all its cores for scoring, measure the peak
                memory, and leave the container to `start_coding`.

        Raises:
            MeasurementError: the file crashes or hangs the runtime.
            ExportError: the file cannot be coded, and its coded size is an objective.
            WorkloadError: the metric fails or is not finite.
        """
        return self.with_code(self.measure_uncoded(artifact, plan, runtime, split, final=final))

    def measure_uncoded(
        self, artifact: Artifact, plan: Plan, runtime: str, split: SplitName, *, final: bool
    ) -> Measured:
        """As `measure`, but does not wait for the container, which is made beside.

        The result is for `with_code`. No container is begun of what is final: see `start_coding`.
        """
        wanted = self._extras.coded and not final
        with self._codings.wanted(artifact.path) if wanted else nullcontext() as coding:
            return Measured(self._measured(artifact, plan, runtime, split, final=final), coding)

    def start_coding(self, model: Path, *, checked: bool) -> Coding:
        """Begin to make a file's container, on cores that do not measure; ends with the evaluator.

        Args:
            checked: see `Coding`.
        """
        return self._codings.start(model, checked=checked)

    def _begin_coding(self, model: Path, checked: bool) -> Coding:
        every = os.sched_getaffinity(0)
        if self._profile.kind == "cpu" and self._host.here:
            every = set(self._timing.cores)
            every = every - set(self._profile.pinned_cores(self._timing.cores)) or every
        return self._builder.start_coding(model, every, checked=checked)

    def with_code(self, measured: Measured) -> Evaluation:
        """Wait for the container, and add its size; or the reason, where there is no need of it.

        Raises:
            ExportError: the file cannot be coded, and the search goes by its coded size; or the
                coder was killed, and another one may do better.
        """
        found = measured.evaluation
        if measured.coding is None:
            return found
        clock = Stopwatch()
        try:
            with clock.step("code"):
                size = measured.coding.wait()
        except ExportError as reason:
            if self._extras.coded or measured.coding.killed:
                raise
            return replace(found, details={**found.details, NOT_CODED: str(reason)})
        return replace(found, download_bytes=size, seconds={**found.seconds, **clock.seconds})

    def measure_again(self, evaluation: Evaluation) -> Repeat:
        """Take a judged candidate's latency, and energy if it is an objective, in a new process.

        What a process cannot see of its own luck averages out over several of them.

        Args:
            evaluation: on the test split, with all measurements so far; its file is there.

        Raises:
            MeasurementError: the file is gone, or crashes or hangs the runtime.
        """
        clock = Stopwatch()
        subject = Subject(self._folder / evaluation.artifact, evaluation.runtime)
        # Also the places that the models take in memory go by the seed.
        seed = len(evaluation.single_measurements)
        energy = None
        scratch = self._folder / "scratch"
        with clock.step("again"), Worker(self._profile, scratch, self._host) as worker:
            both = (self._baseline, subject, self._example)
            paired = worker.compare(*both, final=True, seed=seed)
            if self._extras.energy:
                energy = worker.energy(*both, final=True, seed=seed).energy()
        self._keep_samples(f"{evaluation.candidate}-{evaluation.split}-{seed + 1}", paired)
        return Repeat(paired.latency(), paired.ratio(), energy, clock.seconds["again"])

    def artifact(
        self, plan: Plan, network: nn.Module | None = None, watch: Watch | None = None
    ) -> Artifact:
        """A candidate's file; made by this evaluator if it was not made by it before.

        Args:
            network: what `Builder.network` gave for the plan; None to make it.
            watch: follows the plan's trainings, and may stop them.

        Raises:
            PlanError: the plan does not fit the network.
            ExportError: the file is invalid or does not compute what the network computes.
            OutOfTimeError: `watch.stop` said so.
        """
        if plan.hash not in self._built:
            self._built[plan.hash] = self._builder.build(plan.hash, plan, watch or Watch(), network)
        return self._built[plan.hash]

    def _energy(
        self, subject: Subject, clock: Stopwatch, details: dict[str, Any], *, final: bool
    ) -> Measurement | None:
        if not self._extras.energy:
            return None
        with clock.step("energy"):
            paired = self._timing.energy(
                self._baseline, subject, self._example, final=final, seed=0
            )
        details |= {"idle_mw": paired.idle_mw, "meter": paired.samples.scope}
        return paired.energy()

    def _measured(
        self, artifact: Artifact, plan: Plan, runtime: str, split: SplitName, *, final: bool
    ) -> Evaluation:
        """All figures but the coded size."""
        clock = Stopwatch()
        subject = Subject(artifact.path, runtime)
        candidate = candidate_name(artifact.path.stem, runtime, self._profile.runtime_names[0])
        with clock.step("metric"):
            # Nothing is built beside reference points, whose plan is empty.
            pool = self._scoring if final or not plan.steps else self._beside
            metric, seen = self._scorer.score(subject, split, pool)
        with clock.step("latency"):
            paired = self._timing.compare(
                self._baseline, subject, self._example, final=final, seed=0
            )
        memory = None
        if final or self._extras.memory:
            with clock.step("memory"):
                memory = peak_memory(subject, self._example, self._profile, self._host)
        details = dict(artifact.details) | seen | _circumstances(paired)
        energy = self._energy(subject, clock, details, final=final)
        self._keep_samples(f"{candidate}-{split}", paired)
        return Evaluation(
            candidate=candidate,
            runtime=runtime,
            plan=tuple(plan.to_rows()),
            split=split,
            metric=metric,
            latency=paired.latency(),
            speedup=paired.ratio(),
            file_bytes=artifact.path.stat().st_size,
            peak_memory_bytes=memory.resident_bytes if memory else None,
            gpu_memory_bytes=memory.gpu_bytes if memory else None,
            energy=energy,
            artifact=str(artifact.path.relative_to(self._folder)),
            details=details,
            seconds={**artifact.seconds, **clock.seconds},
        )

    @property
    def _baseline(self) -> Subject:
        return Subject(self._builder.path(BASELINE), self._profile.runtime_names[0])

    def _example_batch(self) -> Sequence[Any]:
        """One batch of real inputs: latency may depend on the data."""
        size = self._profile.batch_size
        inputs = self._workload.search_split.inputs
        times = -(-size // len(inputs[0]))
        return [x.repeat(times, *(1 for _ in x.shape[1:]))[:size] for x in inputs]

    def _keep_samples(self, name: str, paired: PairedLatency) -> None:
        write_json(self._folder / "measurements" / f"{name}.json", paired.to_dict())


def _circumstances(paired: PairedLatency) -> dict[str, Any]:
    """What stands beside a latency."""
    return {
        "load_average": paired.load_average,
        "others_share": None if math.isnan(paired.others_share) else paired.others_share,
        "clock_mhz": paired.clock_mhz,
        "latency_p50_ms": paired.candidate_p50_ms,
        "latency_p95_ms": paired.candidate_p95_ms,
        "latency_p99_ms": paired.candidate_p99_ms,
    }
