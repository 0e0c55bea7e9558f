from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from explain_models import CHANNELS, ONNXRUNTIME, OPENVINO, Rounded, case_of, chain, node

from autocompress.device import RuntimeSettings
from autocompress.measure.explain.fallback import fell_back
from autocompress.measure.explain.findings import Case
from autocompress.measure.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from autocompress.measure.runtimes.openvino import OpenVino
from autocompress.measure.session import NodeTime, Placement, Runtime

ORIGINAL = chain((CHANNELS, CHANNELS)), [node("Conv", 1.0, ["conv0"], kernel="CPU nchwc")]
# Layers that ONNX Runtime leaves in float, and what its reason must name.
LEFT_IN_FLOAT = [
    pytest.param(Rounded(read_by="Tanh"), "Tanh reads it in float", id="output not rounded"),
    pytest.param(Rounded(between="Sigmoid"), "no such activation", id="Sigmoid between"),
    pytest.param(Rounded(between="LeakyRelu"), "no such activation", id="LeakyRelu between"),
    pytest.param(Rounded(between="Relu", zero_point=9), "range goes beyond", id="Relu, zero 9"),
    pytest.param(
        Rounded(input_type=np.int16, output_type=np.int16), "more than 8 bits", id="16 bits"
    ),
    pytest.param(
        Rounded(operator="Gemm", weight_zero_point=False), "no zero point", id="Gemm, no zeros"
    ),
    pytest.param(Rounded(operator="MatMul", axis=0), "summed axis", id="MatMul, other axis"),
    pytest.param(
        Rounded(input_type=np.int8, output_type=np.int8, shared=True),
        "signed and an unsigned side",
        id="signed, shared input",
    ),
]
# The same layers without what keeps them in float.
IN_INTEGERS = [
    pytest.param(Rounded(), id="plain"),
    pytest.param(Rounded(between="Relu"), id="Relu, zero 0"),
    pytest.param(Rounded(operator="Gemm"), id="Gemm"),
    pytest.param(Rounded(operator="Gemm", read_by="Tanh"), id="Gemm, output not rounded"),
    pytest.param(Rounded(operator="MatMul", axis=1), id="MatMul"),
    pytest.param(Rounded(operator="MatMul", axis=1, read_by="Tanh"), id="MatMul, not rounded"),
    pytest.param(Rounded(input_type=np.int8, output_type=np.int8), id="signed"),
    pytest.param(Rounded(shared=True), id="unsigned, shared input"),
]


def profiled(
    rounded: Rounded, folder: Path, runtime: Runtime, settings: RuntimeSettings
) -> tuple[NodeTime, ...]:
    path = folder / "model.onnx"
    onnx.save(rounded.model(), path)
    return runtime.profile(path, settings, Placement(1), rounded.inputs(), 2)


def case(rounded: Rounded, nodes: tuple[NodeTime, ...], settings: RuntimeSettings) -> Case:
    return case_of(ORIGINAL, (rounded.model(), nodes), runtime=settings)


@pytest.mark.parametrize(("rounded", "reason"), LEFT_IN_FLOAT)
def test_onnxruntime_leaves_these_layers_in_float_and_the_reason_is_told(
    rounded: Rounded, reason: str, tmp_path: Path
) -> None:
    nodes = profiled(rounded, tmp_path, OnnxRuntimeCpu(), ONNXRUNTIME)
    (finding,) = fell_back(case(rounded, nodes, ONNXRUNTIME))
    assert finding.layers == ("l",)
    assert reason in finding.why
    assert finding.advice and "float32" in finding.seen


@pytest.mark.parametrize("rounded", IN_INTEGERS)
def test_onnxruntime_runs_these_layers_in_integers_and_there_is_no_finding(
    rounded: Rounded, tmp_path: Path
) -> None:
    nodes = profiled(rounded, tmp_path, OnnxRuntimeCpu(), ONNXRUNTIME)
    found = case(rounded, nodes, ONNXRUNTIME)
    assert found.candidate.layers[0].precision == "integers"
    assert fell_back(found) == []


def test_openvino_runs_in_integers_what_onnxruntime_does_not(tmp_path: Path) -> None:
    rounded = Rounded(input_type=np.int8, output_type=np.int8, shared=True)
    nodes = profiled(rounded, tmp_path, OpenVino(), OPENVINO)
    assert fell_back(case(rounded, nodes, OPENVINO)) == []


def test_the_stake_is_the_layers_time_with_its_weights_being_made_float() -> None:
    nodes = (
        node("DequantizeLinear", 0.2, ["l_dq"], kind="int8", output="float32"),
        node("Conv", 1.1, ["layer"]),
        node("QuantizeLinear", 0.3, ["z_q"], output="int8"),
    )
    rounded = Rounded(input_type=np.int8, output_type=np.int8)
    (finding,) = fell_back(case(rounded, nodes, ONNXRUNTIME))
    assert finding.stake_ms == pytest.approx(1.3)
    assert "1.10 ms (1.00 ms in the original)" in finding.seen
    assert "1 node, 0.20 ms" in finding.seen
    assert "blocked float kernels" in finding.why


def test_layers_with_one_reason_are_one_finding() -> None:
    nodes = (node("Conv", 1.0, ["layer"]),)
    signed = Rounded(input_type=np.int8, output_type=np.int8).model()
    found = case_of(ORIGINAL, (signed, nodes))
    assert len(fell_back(found)) == 1
    assert "made for unsigned" in fell_back(found)[0].why


def test_a_runtime_that_does_not_tell_precision_gives_no_finding() -> None:
    silent = (NodeTime("n", "Conv", "", 1.0, origins=("layer",)),)
    assert fell_back(case(Rounded(), silent, ONNXRUNTIME)) == []


def test_an_unknown_reason_is_said_to_be_unknown() -> None:
    nodes = (node("Conv", 1.0, ["layer"]),)
    (finding,) = fell_back(case(Rounded(), nodes, ONNXRUNTIME))
    assert "does not show why" in finding.why
