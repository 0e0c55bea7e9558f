"""Candidates and their files, for the export tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from networks import as_run_here, assemble, bank_of, graph_of, make_case, make_device
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.plan import Decision, Plan, Step
from autocompress.techniques.decomposed import Kind
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LOW_RANK, LowRank
from autocompress.techniques.precision import Precision

INT8 = as_run_here(Precision(weight_bits=8, activation_bits=8))


def all_pruned(name: str, ratio: float = 0.4) -> tuple[Step, ...]:
    groups = [g for g in graph_of(name).groups if g.prunable]
    return tuple(Step(g.name, FilterPrune(pruning_ratio=ratio)) for g in groups)


def all_decomposed(name: str, ratio: float = 0.4, kind: Kind = "svd") -> tuple[Step, ...]:
    decision = LowRank(rank_ratio=ratio, kind=kind)
    layers = graph_of(name).layers
    return tuple(
        Step(x.name, decision) for x in layers if LOW_RANK.choices(x, [decision], make_device())
    )


def all_int8(name: str, *without: str) -> tuple[Step, ...]:
    return tuple(Step(x.name, INT8) for x in graph_of(name).layers if x.name not in without)


def candidate(name: str, *steps: Step) -> nn.Module:
    return assemble(bank_of(name), Plan(steps)).network


def one(target: str, decision: Decision) -> Step:
    return Step(target, decision)


def arrays(inputs: tuple[Tensor, ...]) -> list[NDArray[Any]]:
    return [x.numpy() for x in inputs]


def calibration(name: str) -> list[NDArray[Any]]:
    return arrays(make_case(name).inputs)


def run_onnx(model: onnx.ModelProto, inputs: list[NDArray[Any]]) -> list[NDArray[np.float32]]:
    session = ort.InferenceSession(model.SerializeToString(), _options())
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as ONNX Runtime runs it."""
    options = _options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options)
    return onnx.load(folder / "optimized.onnx")


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def values(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def assert_tidy(model: onnx.ModelProto) -> None:
    """Unique names, no unused initializer, no node that nobody reads."""
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    for names in (
        [n.name for n in graph.node],
        [o for n in graph.node for o in n.output],
        [i.name for i in graph.initializer],
    ):
        assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    assert [i.name for i in graph.initializer if i.name not in read] == []
    assert [n.name for n in graph.node if not set(n.output) & read] == []


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Root mean square difference as a share of the wanted values' deviation."""
    return float(np.sqrt(np.square(found - wanted).mean()) / wanted.std())
