"""Filling a table: which blocks and meetings of some models are still to be measured, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

from autocompress.errors import MeasurementError
from autocompress.measure.table.block import Block
from autocompress.measure.table.cut import Cut
from autocompress.measure.table.joint import Meeting, distinct_edges, join, meeting_of
from autocompress.measure.table.store import Entry, Store
from autocompress.measure.table.table import Table
from autocompress.measure.table.timing import BlockTimer

# Sums of two blocks that miss by a larger share are no noise, as a rule.
SURPRISING_MISS = 0.10

Step = Callable[[], None]


@final
@dataclass(frozen=True)
class Fill:
    """What came of filling a table.

    Attributes:
        measured: how many entries were measured now.
        reused: how many were there.
        failures: why each other one could not be measured.
    """

    measured: int
    reused: int
    failures: tuple[str, ...]


@final
@dataclass(frozen=True)
class Pair:
    """Two blocks that meet, and as one block; both are in the table."""

    meeting: Meeting
    joint: Block
    producer: Entry
    consumer: Entry

    @property
    def apart_ms(self) -> float:
        """What both take alone."""
        return self.producer.latency_ms + self.consumer.latency_ms


def missing_blocks(blocks: Iterable[Block], table: Table) -> tuple[Block, ...]:
    """Those that the table has no entry for, each once."""
    found = {block.key: block for block in blocks}
    return tuple(block for block in found.values() if table.lookup(block) is None)


def wanted_pairs(cuts: Sequence[Cut], table: Table) -> tuple[Pair, ...]:
    """Meetings that a table should know: one for every kind and tensor.

    Of pairs that meet over the same tensor the quickest is taken, for the cost of meeting is a
    difference. Pairs of which a block is not in the table are left out.
    """
    found: dict[str, Pair] = {}
    for cut in cuts:
        for edge in distinct_edges(cut).values():
            producer, consumer = cut.blocks[edge.producer], cut.blocks[edge.consumer]
            first, second = table.lookup(producer), table.lookup(consumer)
            if first is None or second is None:
                continue
            meeting = meeting_of(cut, edge)
            best = found.get(meeting.key)
            if best is None or first.latency_ms + second.latency_ms < best.apart_ms:
                joint = join(producer, edge.output, consumer, edge.input)
                found[meeting.key] = Pair(meeting, joint, first, second)
    return tuple(found.values())


def missing_pairs(pairs: Sequence[Pair], table: Table) -> tuple[Pair, ...]:
    """Those that the table has no entry for."""
    measured = {entry.key for entry in table.meetings()}
    return tuple(pair for pair in pairs if pair.meeting.key not in measured)


def fill_overheads(store: Store, timer: BlockTimer, cuts: Sequence[Cut]) -> Fill:
    """Measure what a run takes, for every kind of inputs and outputs that is not there."""
    table = Table(store.entries().values())
    wanted = {(cut.inputs, cut.outputs) for cut in cuts}
    missing = [kinds for kinds in wanted if table.overhead(*kinds) is None]
    for inputs, outputs in missing:
        store.add(timer.overhead(inputs, outputs))
    return Fill(len(missing), len(wanted) - len(missing), ())


def fill_blocks(store: Store, timer: BlockTimer, blocks: Sequence[Block], step: Step) -> Fill:
    """Measure every block that is not there; each is kept as soon as it is measured.

    A block that fails alone is left out, with its reason.

    Args:
        step: called after each one that had to be measured.
    """
    missing = missing_blocks(blocks, Table(store.entries().values()))
    failures = []
    for block in missing:
        try:
            store.add(timer.block(block))
        except MeasurementError as reason:
            failures.append(f"{block.lead.operator}: {reason.what}")
        step()
    distinct = len({block.key for block in blocks})
    return Fill(len(missing) - len(failures), distinct - len(missing), tuple(failures))


def fill_pairs(store: Store, timer: BlockTimer, pairs: Sequence[Pair], step: Step) -> Fill:
    """Measure what blocks take more together than alone; as `fill_blocks`.

    Where the sum of both misses by much, all three are timed once more, for one of the timings may
    have been disturbed; the smaller miss counts, and a block that was quicker is corrected.
    """
    missing = missing_pairs(pairs, Table(store.entries().values()))
    failures = []
    for pair in missing:
        try:
            entry = _meet(pair, timer)
            if entry.miss > SURPRISING_MISS:
                again = _again(store, timer, pair)
                entry = min(entry, _meet(again, timer), key=lambda e: abs(e.latency_ms))
            store.add(entry)
        except MeasurementError as reason:
            failures.append(f"{pair.meeting.kind}: {reason.what}")
        step()
    return Fill(len(missing) - len(failures), len(pairs) - len(missing), tuple(failures))


def _meet(pair: Pair, timer: BlockTimer) -> Entry:
    together = timer.block(pair.joint)
    noises = (together.noise_ms, pair.producer.noise_ms, pair.consumer.noise_ms)
    return Entry(
        pair.meeting.key,
        together.latency_ms - pair.apart_ms,
        math.hypot(*noises),
        meeting=pair.meeting,
        apart_ms=pair.apart_ms,
    )


def _again(store: Store, timer: BlockTimer, pair: Pair) -> Pair:
    """The pair with both blocks timed anew; what disturbs a timing mostly makes it longer."""
    timed = []
    for old in (pair.producer, pair.consumer):
        assert old.block is not None
        new = timer.block(old.block)
        if new.latency_ms < old.latency_ms:
            store.add(new)
        timed.append(new)
    return replace(pair, producer=timed[0], consumer=timed[1])
