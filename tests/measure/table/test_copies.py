"""Bench models, as ONNX Runtime optimizes them: copies must run as the block itself runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from residual_models import Builder, residual

from autocompress.measure.table.block import Block, TensorType
from autocompress.measure.table.copies import (
    Bench,
    bench,
    chained_input,
    empty_bench,
    mergeable,
    run_overhead,
)
from autocompress.measure.table.cut import cut_model
from autocompress.measure.table.fill import random_constants

FLOAT = TensorProto.FLOAT


def optimized(model: bytes, folder: Path) -> Counter[str]:
    """Operators of a model after all of ONNX Runtime's own optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def difference(built: Bench, folder: Path) -> dict[str, int]:
    one, many = optimized(built.one, folder), optimized(built.many, folder)
    return {name: many[name] - one[name] for name in one | many if many[name] != one[name]}


def blocks(*, int8: bool) -> dict[str, Block]:
    return {p.layer: p.block for p in cut_model(residual(int8=int8), 1).placed}


def test_more_copies_of_a_float_block_are_more_convolutions_and_nothing_else(tmp_path) -> None:
    built = bench(blocks(int8=False)["conv1"])
    assert difference(built, tmp_path) == {"Conv": built.copies}


def test_more_copies_of_an_int8_block_are_more_integer_kernels(tmp_path) -> None:
    built = bench(blocks(int8=True)["conv1"])
    assert difference(built, tmp_path) == {"QLinearConv": built.copies}


@pytest.mark.parametrize("int8", [False, True])
def test_residual_blocks_are_chained_by_what_they_add(int8: bool, tmp_path) -> None:
    block = blocks(int8=int8)["conv2"]
    chained = chained_input(block)
    assert chained is not None and chained not in block.main_inputs
    built = bench(block)
    more = {"QLinearConv": built.copies, "QLinearAdd": built.copies} if int8 else {}
    # In floats the addition is part of the convolution's kernel.
    assert difference(built, tmp_path) == (more or {"Conv": built.copies})


def test_copies_without_weights_are_kept_apart(tmp_path) -> None:
    """Else ONNX Runtime would merge them into one."""
    block = blocks(int8=False)["pooled"]
    assert mergeable(block) and not mergeable(blocks(int8=False)["conv1"])
    built = bench(block)
    assert difference(built, tmp_path)["ReduceMean"] == built.copies


def test_a_block_without_images_is_sampled_by_slices(tmp_path) -> None:
    built = bench(blocks(int8=False)["head"])
    assert difference(built, tmp_path)["Gemm"] == built.copies


@pytest.mark.parametrize("int8", [False, True])
def test_every_bench_model_runs_and_gives_finite_values(int8: bool) -> None:
    for block in blocks(int8=int8).values():
        built = bench(block, seed=1)
        shapes = []
        for model in (built.one, built.many):
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            feed = dict(zip([i.name for i in session.get_inputs()], built.inputs, strict=True))
            outputs = session.run(None, feed)
            assert all(np.isfinite(np.asarray(o, np.float64)).all() for o in outputs)
            shapes.append(sorted(o.size for o in outputs))
        if chained_input(block) is None and not mergeable(block):
            assert shapes[0] == shapes[1]


def test_the_same_seed_gives_the_same_models() -> None:
    block = blocks(int8=True)["conv2"]
    assert bench(block, 3).many == bench(block, 3).many != bench(block, 4).many


def test_bias_scales_are_the_products_that_runtimes_fuse() -> None:
    block = blocks(int8=True)["conv1"]
    values = random_constants(block, np.random.default_rng(0))
    makers = block.makers()
    data, weight, bias = (makers[name].inputs[1] for name in block.lead.inputs)
    np.testing.assert_allclose(values[bias], values[data] * values[weight], rtol=1e-6)


def test_large_weights_are_copied_less_often() -> None:
    def dense(width: int) -> Block:
        b = Builder()
        b.add("MatMul", ["x", b.keep("w", np.zeros((width, 1024)))], "y")
        return cut_model(b.model([1, width], [1, 1024]), 1).blocks[0]

    assert bench(dense(8)).copies > bench(dense(1024)).copies >= 3


def test_the_empty_model_has_the_inputs_and_outputs_of_the_whole() -> None:
    inputs = (TensorType(FLOAT, (2, 3)), TensorType(TensorProto.INT64, (2,)))
    outputs = (TensorType(FLOAT, (2, 5)), TensorType(TensorProto.INT64, (1,)))
    built = empty_bench(inputs, outputs)
    for model in (built.one, built.many):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        feed = dict(zip([i.name for i in session.get_inputs()], built.inputs, strict=True))
        found = session.run(None, feed)
        assert [o.shape for o in found] == [t.shape for t in outputs]
        dtypes = [helper.tensor_dtype_to_np_dtype(t.element) for t in outputs]
        assert [o.dtype for o in found] == dtypes


def test_the_overhead_leaves_out_what_the_empty_model_computes() -> None:
    """Ten for the run, one for the flat input, two for each copy: of 1 and of 5."""
    assert run_overhead(13.0, 21.0, 4) == pytest.approx(10.0)
