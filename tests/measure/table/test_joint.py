from __future__ import annotations

import onnxruntime
import pytest
from residual_models import residual
from test_copies import difference

from autocompress.measure.table.block import READER, Block
from autocompress.measure.table.canonical import SCALE, ZERO_POINT
from autocompress.measure.table.copies import bench
from autocompress.measure.table.cut import Cut, cut_model
from autocompress.measure.table.joint import Meeting, distinct_edges, join, meeting_of


def joined(cut: Cut) -> list[Block]:
    return [
        join(cut.blocks[e.producer], e.output, cut.blocks[e.consumer], e.input) for e in cut.edges
    ]


@pytest.mark.parametrize("int8", [False, True])
def test_two_blocks_as_one_hold_the_nodes_of_both_and_run(int8: bool) -> None:
    cut = cut_model(residual(int8=int8), 1)
    for edge, block in zip(cut.edges, joined(cut), strict=True):
        producer, consumer = cut.blocks[edge.producer], cut.blocks[edge.consumer]
        assert len(block.nodes) == len(producer.nodes) + len(consumer.nodes)
        assert len(block.inputs) == len(producer.inputs) + len(consumer.inputs) - 1
        assert len(block.constants) == len(producer.constants) + len(consumer.constants)
        assert block.output_types[-1] == consumer.output_types[-1]
        built = bench(block)
        onnxruntime.InferenceSession(built.many, providers=["CPUExecutionProvider"])


def test_two_int8_blocks_as_one_run_as_two_kernels(tmp_path) -> None:
    cut = cut_model(residual(int8=True), 1)
    edge = next(e for e in cut.edges if cut.placed[e.consumer].layer == "conv1")
    block = join(cut.blocks[edge.producer], edge.output, cut.blocks[edge.consumer], edge.input)
    built = bench(block)
    assert difference(built, tmp_path) == {"QLinearConv": 2 * built.copies}


def test_who_reads_bytes_uses_the_grid_of_who_made_them() -> None:
    cut = cut_model(residual(int8=True), 1)
    for edge, block in zip(cut.edges, joined(cut), strict=True):
        made = f"a{cut.blocks[edge.producer].outputs[edge.output]}"
        maker = next(n for n in block.nodes if made in n.outputs)
        readers = [n for n in block.nodes if n.operator == READER and n.inputs[0] == made]
        if maker.operator == "QuantizeLinear":
            assert readers
            for place in (SCALE, ZERO_POINT):
                assert {r.inputs[place] for r in readers} == {maker.inputs[place]}


def test_meetings_say_who_meets_and_how() -> None:
    cut = cut_model(residual(), 1)
    keys = [meeting_of(cut, edge).key for edge in cut.edges]
    assert keys == [
        "Conv -> float -> Conv float[1,16,8,8]",
        "Conv -> float -> Conv float[1,32,8,8]",
        "Conv -> float -> Conv beside float[1,16,8,8]",
        "Conv -> float -> ReduceMean float[1,16,8,8]",
        "ReduceMean -> float -> Gemm float[1,16]",
    ]
    integer = cut_model(residual(int8=True), 1)
    assert "integer Conv -> uint8 -> integer Conv" in {
        meeting_of(integer, edge).kind for edge in integer.edges
    }


def test_places_leave_channels_out_only() -> None:
    small, large = (meeting_of(cut_model(residual(w), 1), edge_of(w)) for w in (16, 24))
    assert small.place == large.place and small.key != large.key


def edge_of(width: int):
    return cut_model(residual(width), 1).edges[0]


def test_a_tensor_is_converted_once_for_all_readers_of_a_kind() -> None:
    cut = cut_model(residual(), 1)
    # The stem's output goes into a convolution and beside another: two kinds.
    of_stem = [key for key in distinct_edges(cut) if key[0] == 0]
    assert len(of_stem) == 2
    kinds = {meeting_of(cut, edge).kind for edge in cut.edges if edge.producer == 0}
    assert {key[2] for key in of_stem} == kinds


def test_what_adds_another_kind_of_tensor_is_another_end() -> None:
    float_cut, int_cut = cut_model(residual(), 1), cut_model(residual(int8=True), 1)
    tensor = float_cut.inputs[0]
    assert Meeting.between("Conv mixed", "Gemm", tensor).kind == "Conv mixed -> float -> Gemm"
    for cut in (float_cut, int_cut):
        assert not any("mixed" in meeting_of(cut, edge).kind for edge in cut.edges)
