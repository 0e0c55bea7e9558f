"""Building the latency table of an experiment's network, and checking it on random plans."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import numpy as np

from autocompress.build import Builder
from autocompress.device import DeviceProfile
from autocompress.errors import ExportError, MeasurementError, PlanError, SearchError
from autocompress.measure.client import Subject, Worker
from autocompress.measure.latency import PairedLatency
from autocompress.measure.table.cut import Cut, cut_file
from autocompress.measure.table.families import traits_of
from autocompress.measure.table.store import Entry, Store, cache_path
from autocompress.measure.table.survey import (
    SURPRISING_MISS,
    Fill,
    fill_blocks,
    fill_overheads,
    fill_pairs,
    missing_blocks,
    missing_pairs,
    wanted_pairs,
)
from autocompress.measure.table.table import Table
from autocompress.measure.table.timing import BlockTimer
from autocompress.plan import Plan
from autocompress.search.levels import group_rows, layer_rows, level_blocks
from autocompress.search.network_report import Miss, NetworkReport, PlanLatency
from autocompress.search.prepare import Options, Prepared, fill_bank, prepare
from autocompress.search.progress import Progress, Silent
from autocompress.search.random_plans import random_plans
from autocompress.search.thin import thin_space
from autocompress.search.variants import find_variants

_ORIGINAL = "original"
_KNOWN_SHARE = 0.25
# Files beside which the original was slower by a larger share are measured again.
_SLOWED, _ATTEMPTS = 0.03, 3


def profile_network(
    profile: DeviceProfile,
    experiment: Path,
    *,
    plans: int = 50,
    runtime: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> NetworkReport:
    """Measure what the table lacks for an experiment's network, and check it on random plans.

    Entries are kept as soon as they are measured: the same call goes on where it was interrupted,
    and another network on the same device and runtime measures only what is new.

    Args:
        profile: the device; it takes the place of the experiment's own.
        experiment: the experiment file.
        plans: how many random plans are predicted and measured.
        runtime: full name of one of the profile's runtimes; None is the first.
        seed: of the plans.

    Raises:
        AutocompressError: a bad experiment, device, workload or network, or no plan can be built.
    """
    progress = progress or Silent()
    runtime = profile.runtime(runtime or profile.runtime_names[0]).full_name
    prepared = _prepare(profile, experiment, progress)
    # An optional one may turn out to be missing.
    prepared.profile.runtime(runtime)
    with tempfile.TemporaryDirectory() as scratch:
        return _Profiling(prepared, runtime, Path(scratch), progress).run(plans, seed)


def _prepare(profile: DeviceProfile, experiment: Path, progress: Progress) -> Prepared:
    """Load the experiment for a device; solved variants are kept beside the table."""
    folder = cache_path("").parent / "networks" / experiment.stem
    # Nothing is searched: a limit is given for experiments that have none.
    return prepare(experiment, Options(run=folder, trials=1), progress, profile=profile)


@final
class _Profiling:
    """The steps of building and checking a table."""

    def __init__(self, prepared: Prepared, runtime: str, scratch: Path, progress: Progress) -> None:
        self._prepared = prepared
        self._profile = prepared.profile
        self._runtime = runtime
        self._scratch = scratch
        self._progress = progress
        self._failures: list[str] = []
        with Worker(self._profile, scratch) as worker:
            self._device = worker.fingerprint
        self._store = Store(cache_path(self._device.runtime_id(runtime)))

    def run(self, plans: int, seed: int) -> NetworkReport:
        """Build the files, measure what is missing, predict and measure the files."""
        prepared = self._prepared
        files = self._build(plans, seed)
        cuts = {name: cut_file(path, self._profile.batch_size) for name, path in files.items()}
        self._progress.stage("find levels")
        network = (prepared.workload, prepared.graph, prepared.exporter)
        variants = find_variants(*network, prepared.space, self._profile)
        levels = level_blocks(prepared.space, prepared.graph, variants, self._profile)
        every = [*(b for cut in cuts.values() for b in cut.blocks), *levels]
        with BlockTimer(self._profile, self._runtime, self._scratch) as timer:
            fill_overheads(self._store, timer, list(cuts.values()))
            missing = missing_blocks(every, self._table())
            self._progress.stage("measure blocks", len(missing))
            blocks = fill_blocks(self._store, timer, every, self._progress.advance)
            meetings = self._fill_meetings(timer, list(cuts.values()))
        self._failures += [*blocks.failures, *meetings.failures]
        table = self._table()
        checked = self._check(files, cuts, table)
        judged = (prepared.space, prepared.graph, variants, table, self._profile)
        return NetworkReport(
            experiment=prepared.experiment.name,
            device=self._device,
            runtime=self._runtime,
            cache=self._store.path,
            entries=len(table),
            blocks=blocks,
            meetings=meetings,
            misses=_misses(table, list(cuts.values())),
            failures=tuple(dict.fromkeys(self._failures)),
            original=checked[_ORIGINAL],
            plans=tuple(row for name, row in checked.items() if name != _ORIGINAL),
            layers=tuple(layer_rows(prepared.graph, variants, table)),
            groups=tuple(group_rows(*judged)),
            slow_levels=thin_space(*judged).reasons,
        )

    def _table(self) -> Table:
        return Table(self._store.entries().values())

    def _build(self, count: int, seed: int) -> dict[str, Path]:
        """The files of the original and of random plans, by name.

        Raises:
            SearchError: no plan can be built.
        """
        prepared = self._prepared
        bank = fill_bank(prepared, self._progress)
        settings = prepared.experiment.calibration
        builder = Builder(
            prepared.workload, prepared.exporter, bank, self._profile, settings, self._scratch
        )
        files = {_ORIGINAL: builder.build(_ORIGINAL, Plan()).path}
        plans = random_plans(prepared.space, count, np.random.default_rng(seed))
        self._progress.stage("build random plans", len(plans))
        for plan in plans:
            try:
                files[plan.hash] = builder.build(plan.hash, plan).path
            except (PlanError, ExportError) as reason:
                self._failures.append(f"plan {plan.hash}: {reason.what}")
            self._progress.advance()
        if plans and len(files) == 1:
            raise SearchError("No random plan could be built.", given=self._failures[0])
        return files

    def _fill_meetings(self, timer: BlockTimer, cuts: Sequence[Cut]) -> Fill:
        table = self._table()
        pairs = wanted_pairs(cuts, table)
        self._progress.stage("measure meetings of blocks", len(missing_pairs(pairs, table)))
        return fill_pairs(self._store, timer, pairs, self._progress.advance)

    def _check(
        self, files: Mapping[str, Path], cuts: Mapping[str, Cut], table: Table
    ) -> dict[str, PlanLatency]:
        """Predict and measure every file.

        Raises:
            MeasurementError: the original cannot be measured.
        """
        sparse = Table(_sparse_entries(table, list(cuts.values())))
        found = {}
        for name, paired in self._measure(files).items():
            try:
                predicted = table.predict_cut(cuts[name])
            except MeasurementError as reason:
                if name == _ORIGINAL:
                    raise
                self._failures.append(f"plan {name}: {reason.what} {reason.given}")
            else:
                found[name] = PlanLatency(
                    name, predicted, paired.latency(), paired.speedup, _guess(sparse, cuts[name])
                )
        return found

    def _measure(self, files: Mapping[str, Path]) -> dict[str, PairedLatency]:
        """Time every file in turn with the original, again where the machine was slow meanwhile.

        Whether it was is told by the original, which always takes the same time.

        Raises:
            MeasurementError: the original cannot be measured.
        """
        original = Subject(files[_ORIGINAL], self._profile.runtime_names[0])
        inputs = self._example()
        found: dict[str, PairedLatency] = {}
        wanted = dict(files)
        with Worker(self._profile, self._scratch) as worker:
            for _ in range(_ATTEMPTS):
                self._progress.stage("measure random plans", len(wanted))
                for name, path in wanted.items():
                    try:
                        subject = Subject(path, self._runtime)
                        paired = worker.compare(original, subject, inputs, seed=0)
                    except MeasurementError as reason:
                        if name == _ORIGINAL:
                            raise
                        self._failures.append(f"plan {name}: {reason.what}")
                    else:
                        found[name] = min(
                            found.get(name, paired), paired, key=lambda p: p.baseline_ms
                        )
                    self._progress.advance()
                quickest = min(paired.baseline_ms for paired in found.values())
                wanted = {
                    name: files[name]
                    for name, paired in found.items()
                    if paired.baseline_ms > (1 + _SLOWED) * quickest
                }
                if not wanted:
                    break
        return found

    def _example(self) -> list[np.ndarray]:
        """One batch of real inputs: latency may depend on the data."""
        size = self._profile.batch_size
        inputs = self._prepared.workload.search_split.inputs
        return [np.resize(x[:size].numpy(), (size, *x.shape[1:])) for x in inputs]


def _misses(table: Table, cuts: Sequence[Cut]) -> tuple[Miss, ...]:
    """Meetings in some models whose sums miss by more than `SURPRISING_MISS`, the worst first."""
    wanted = {pair.meeting.key for pair in wanted_pairs(cuts, table)}
    found = [e for e in table.meetings() if e.key in wanted and e.miss > SURPRISING_MISS]
    found = [e for e in found if abs(e.latency_ms) > e.noise_ms]
    return tuple(
        Miss(e.meeting.kind, e.meeting.tensor.text, e.apart_ms, e.apart_ms + e.latency_ms)
        for e in sorted(found, key=lambda entry: -entry.miss)
        if e.meeting is not None
    )


def _sparse_entries(table: Table, cuts: Sequence[Cut]) -> list[Entry]:
    """What a table would hold that knows a quarter of the blocks, at least one of each kin."""
    blocks = {block.key: block for cut in cuts for block in cut.blocks}
    entries = [e for b in blocks.values() if (e := table.lookup(b)) is not None]
    order = np.random.default_rng(0).permutation(len(entries))
    kins: set[str] = set()
    first: list[Entry] = []
    rest: list[Entry] = []
    for entry in (entries[i] for i in order):
        traits = None if entry.block is None else traits_of(entry.block)
        kin = entry.key if traits is None else traits.kin
        (rest if kin in kins else first).append(entry)
        kins.add(kin)
    known = [*first, *rest][: max(len(first), round(_KNOWN_SHARE * len(entries)))]
    overheads = [e for c in cuts if (e := table.overhead(c.inputs, c.outputs)) is not None]
    return [*known, *overheads, *table.meetings()]


def _guess(sparse: Table, cut: Cut) -> float | None:
    try:
        return sparse.predict_cut(cut).latency_ms
    except MeasurementError:
        return None
