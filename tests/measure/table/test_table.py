from __future__ import annotations

import onnx
import pytest
from table_models import chain, int8, timer_profile

from autocompress.measure.client import Subject, Worker
from autocompress.measure.table.block import Block
from autocompress.measure.table.cut import blocks_of, cut_model
from autocompress.measure.table.store import Entry, Store, cache_path
from autocompress.measure.table.survey import fill_blocks, fill_overheads, missing_blocks
from autocompress.measure.table.table import Table
from autocompress.measure.table.timing import BlockTimer


def test_every_node_is_in_a_block_and_equal_layers_share_one_entry() -> None:
    model = chain([8, 16, 16, 16])
    blocks = blocks_of(model, 1)
    assert [block.lead.operator for block in blocks] == ["Conv", "Conv", "Conv"]
    assert blocks[1].key == blocks[2].key != blocks[0].key
    assert sum(len(b.nodes) for b in blocks) >= len(model.graph.node)


def test_keys_ignore_names_and_values_and_tell_shapes_and_batches_apart() -> None:
    one, other = chain([8, 16], seed=0), chain([8, 16], seed=1, prefix="other_")
    key = blocks_of(one, 1)[0].key
    assert blocks_of(other, 1)[0].key == key
    assert blocks_of(one, 2)[0].key != key
    assert blocks_of(chain([8, 24]), 1)[0].key != key
    assert blocks_of(int8(one), 1)[0].key != key


def test_a_block_survives_json() -> None:
    for model in (chain([8, 16, 8]), int8(chain([8, 16, 8]))):
        for block in blocks_of(model, 1):
            again = Block.from_json(block.to_json())
            assert again == block and again.key == block.key


def test_the_store_keeps_the_last_entry_and_survives_a_torn_line(tmp_path) -> None:
    store = Store(tmp_path / "deep" / "table.jsonl")
    assert store.entries() == {}
    block = blocks_of(chain([8, 16]), 1)[0]
    store.add(Entry(block.key, 1.0, 0.1, block))
    with store.path.open("ab") as file:
        file.write(b'{"format": 1, "key": "torn')
    store.add(Entry("run", 2.0, 0.1))
    store.add(Entry(block.key, 3.0, 0.1, block))
    found = store.entries()
    assert set(found) == {block.key, "run"}
    assert found[block.key].latency_ms == 3.0 and found[block.key].block == block


def test_the_cache_is_where_the_user_wants_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path("abc") == tmp_path / "autocompress" / "latency" / "abc.jsonl"


def test_a_block_that_was_not_measured_is_guessed_from_its_kin() -> None:
    """Times that are linear in the channels' product are found again in between and beyond."""

    def time(c_in: int, c_out: int) -> float:
        return 0.01 + 1e-4 * c_in * c_out

    sizes = [(a, b) for a in (16, 32, 64) for b in (16, 32, 64)]
    entries = []
    for c_in, c_out in sizes:
        block = blocks_of(chain([c_in, c_out]), 1)[0]
        entries.append(Entry(block.key, time(c_in, c_out), 1e-4, block))
    table = Table(entries)
    known = blocks_of(chain([32, 64]), 1)[0]
    entry = table.lookup(known)
    assert entry is not None and entry.latency_ms == time(32, 64)
    unknown = blocks_of(chain([48, 48]), 1)[0]
    assert table.lookup(unknown) is None
    guess = table.estimate(unknown)
    assert guess is not None
    assert guess.latency_ms == pytest.approx(time(48, 48), rel=0.1)
    stranger = blocks_of(chain([16, 16], kernel=5), 1)[0]
    assert Table(entries[:0]).estimate(stranger) is None


def test_a_real_network_is_measured_once_and_predicted(tmp_path) -> None:
    model = chain([8, 32, 32, 32, 16], size=14)
    cut = cut_model(model, 1)
    store = Store(tmp_path / "table.jsonl")
    with BlockTimer(timer_profile(), "onnxruntime", tmp_path) as timer:
        fill_overheads(store, timer, [cut])
        done: list[int] = []
        filled = fill_blocks(store, timer, cut.blocks, lambda: done.append(1))
        assert filled.failures == () and filled.measured == len({b.key for b in cut.blocks})
        again = fill_blocks(store, timer, cut.blocks, lambda: done.append(1))
    assert again.measured == 0 and again.reused == filled.measured
    table = Table(store.entries().values())
    assert missing_blocks(cut.blocks, table) == ()
    prediction = table.predict(model, 1)
    assert (prediction.measured, prediction.interpolated) == (4, 0)
    assert prediction.measurement("d").source == "estimated"
    path = tmp_path / "chain.onnx"
    onnx.save(model, path)
    with Worker(timer_profile(), tmp_path) as worker:
        from table_models import inputs_of

        subject = Subject(path, "onnxruntime")
        measured = worker.compare(subject, subject, inputs_of(model), seed=0).candidate_ms
    # Far apart only if something is wrong: this is no benchmark.
    assert measured / 3 < prediction.latency_ms < measured * 3
