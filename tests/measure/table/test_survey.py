from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from residual_models import residual

from autocompress.errors import MeasurementError
from autocompress.measure.table.block import Block, TensorType
from autocompress.measure.table.cut import Cut, cut_model
from autocompress.measure.table.joint import Meeting, distinct_edges, meeting_of
from autocompress.measure.table.store import Entry, Store, overhead_key
from autocompress.measure.table.survey import (
    fill_blocks,
    fill_overheads,
    fill_pairs,
    missing_pairs,
    wanted_pairs,
)
from autocompress.measure.table.table import Table


class Clock:
    """A timer that knows how long everything takes, and what disturbs it when."""

    def __init__(self, disturbances: tuple[float, ...] = (), broken: str = "") -> None:
        self.timed: list[str] = []
        self._disturbances = list(disturbances)
        self._broken = broken

    def block(self, block: Block) -> Entry:
        if block.lead.operator == self._broken:
            raise MeasurementError("It crashed.")
        self.timed.append(block.key)
        late = self._disturbances.pop(0) if self._disturbances else 0.0
        heavy = sum(n.operator in ("Conv", "Gemm") for n in block.nodes)
        return Entry(block.key, 1.0 * heavy + 0.1 + late, 0.001, block)

    def overhead(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> Entry:
        return Entry(overhead_key(inputs, outputs), 0.5, 0.001)


@pytest.fixture
def cut() -> Cut:
    return cut_model(residual(), 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "table.jsonl")


def nothing() -> None:
    pass


def table_of(store: Store) -> Table:
    return Table(store.entries().values())


def test_a_second_network_measures_only_what_is_new(cut: Cut, store: Store) -> None:
    clock = Clock()
    first = fill_blocks(store, clock, cut.blocks, nothing)
    assert (first.measured, first.reused) == (5, 0)
    wider = cut_model(residual(16, 64), 1)
    second = fill_blocks(store, clock, wider.blocks, nothing)
    assert (second.measured, second.reused) == (2, 3)
    assert len(clock.timed) == len(set(clock.timed)) == 7


def test_an_interrupted_filling_goes_on_where_it_was(cut: Cut, store: Store) -> None:
    steps = iter([None, None])

    def interrupt() -> None:
        if next(steps, "end") == "end":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_blocks(store, Clock(), cut.blocks, interrupt)
    clock = Clock()
    filled = fill_blocks(store, clock, cut.blocks, nothing)
    assert (filled.measured, filled.reused) == (2, 3)


def test_a_block_that_fails_is_left_out_with_its_reason(cut: Cut, store: Store) -> None:
    filled = fill_blocks(store, Clock(broken="Gemm"), cut.blocks, nothing)
    assert filled.measured == 4 and filled.failures == ("Gemm: It crashed.",)
    fill_overheads(store, Clock(), [cut])
    with pytest.raises(MeasurementError, match="knows nothing like") as caught:
        table_of(store).predict_cut(cut)
    assert "head" in str(caught.value.given)


def test_predictions_are_sums_of_what_was_measured(cut: Cut, store: Store) -> None:
    clock = Clock()
    fill_overheads(store, clock, [cut])
    fill_blocks(store, clock, cut.blocks, nothing)
    pairs = wanted_pairs([cut], table_of(store))
    fill_pairs(store, clock, pairs, nothing)
    found = table_of(store).predict_cut(cut)
    # Four heavy operators, and 0.1 for each of five blocks; together two blocks save 0.1.
    edges = len(distinct_edges(cut))
    assert found.overhead_ms == 0.5 and found.meetings_ms == pytest.approx(-0.1 * edges)
    assert found.latency_ms == pytest.approx(0.5 + 4.5 - 0.1 * edges)
    assert (found.measured, found.interpolated) == (5, 0)
    assert missing_pairs(pairs, table_of(store)) == ()


def test_a_surprising_meeting_is_timed_once_more(cut: Cut, store: Store) -> None:
    fill_blocks(store, Clock(), cut.blocks, nothing)
    pairs = wanted_pairs([cut], table_of(store))[:1]
    clock = Clock(disturbances=(2.0,))
    fill_pairs(store, clock, pairs, nothing)
    # Once disturbed, then both blocks and the joint one in peace.
    assert len(clock.timed) == 4
    entry = table_of(store).meetings()[0]
    assert entry.latency_ms == pytest.approx(-0.1) and entry.miss < 0.1


def test_a_block_that_was_disturbed_is_corrected_by_its_meetings(cut: Cut, store: Store) -> None:
    fill_blocks(store, Clock(disturbances=(0.0, 5.0)), cut.blocks, nothing)
    assert table_of(store).lookup(cut.blocks[1]).latency_ms == pytest.approx(6.1)
    fill_pairs(store, Clock(), wanted_pairs([cut], table_of(store)), nothing)
    assert table_of(store).lookup(cut.blocks[1]).latency_ms == pytest.approx(1.1)


def meeting(cut: Cut, channels: int, cost: float, apart: float = 1.0, noise: float = 0.01) -> Entry:
    first = meeting_of(cut, cut.edges[0])
    tensor = replace(first.tensor, shape=(1, channels, 8, 8))
    found = Meeting(first.kind, tensor)
    return Entry(found.key, cost, noise, meeting=found, apart_ms=apart)


def test_costs_of_meeting_lie_between_those_measured_and_grow_with_the_tensor(cut: Cut) -> None:
    table = Table([meeting(cut, 8, 0.2), meeting(cut, 24, 0.4)])

    def cost(channels: int) -> float:
        wanted = meeting(cut, channels, 0).meeting
        assert wanted is not None
        return table.meeting(wanted).latency_ms

    assert [cost(c) for c in (8, 16, 24)] == pytest.approx([0.2, 0.3, 0.4])
    assert cost(4) == pytest.approx(0.2) and cost(48) == pytest.approx(0.8)


def test_costs_of_meeting_that_could_be_noise_are_none(cut: Cut) -> None:
    """Noise is what the entry says, and at least 2 % of what was timed."""
    for entry in (meeting(cut, 8, 0.2, noise=0.3), meeting(cut, 8, 0.2, apart=50.0)):
        assert entry.meeting is not None
        assert Table([entry]).meeting(entry.meeting).latency_ms == 0
    stranger = meeting_of(cut, cut.edges[-1])
    assert Table([meeting(cut, 8, 0.2)]).meeting(stranger).latency_ms == 0


def test_entries_of_every_kind_survive_the_file(cut: Cut, store: Store) -> None:
    entries = [
        Entry(cut.blocks[0].key, 1.0, 0.1, cut.blocks[0]),
        meeting(cut, 8, 0.2),
        Entry(overhead_key(cut.inputs, cut.outputs), 0.5, 0.1),
    ]
    for entry in entries:
        store.add(entry)
    assert list(store.entries().values()) == entries


def _add_many(path: Path, start: int) -> None:
    store = Store(path)
    for i in range(start, start + 30):
        store.add(Entry(f"key {i}", float(i), 0.0))


def test_two_processes_lose_nothing(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_add_many, args=(store.path, s)) for s in (0, 100)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    wanted = {f"key {i}" for s in (0, 100) for i in range(s, s + 30)}
    assert set(store.entries()) == wanted


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeasurementError, match="cannot be written"):
        Store(tmp_path / "file" / "table.jsonl").add(Entry("key", 1.0, 0.1))
