"""What runtimes other than ONNX Runtime must know of, or do to, an ONNX file before they load it.

The library `onnx` is imported on first use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import SEEK_CUR, SEEK_END
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

_FUNCTIONS_FIELD = 25
_VARINT, _BYTES = 0, 2
# Bytes of the wire types of fixed size.
_FIXED = {1: 8, 5: 4}
_CONTINUES = 0x80


def has_functions(path: Path) -> bool:
    """Whether an ONNX file defines functions of its own.

    Only the tags of the outermost message are read: parsing the file would hold its weights in
    memory that is then measured as the model's.
    """
    with path.open("rb") as file:
        return _FUNCTIONS_FIELD in _fields(file)


def has_operators(path: Path, operators: Collection[str]) -> bool:
    """Whether a file has a node of one of these operators, in its graph or in a function."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    return any(node.op_type in operators for node in nodes)


@contextmanager
def without_functions(path: Path) -> Iterator[Path]:
    """A file that computes the same without functions of its own; the file itself if it has none.

    Functions that read only constants, such as those that unpack stored weights, are computed;
    others are written out.
    """
    if not has_functions(path):
        yield path
        return
    import onnx

    with TemporaryDirectory(prefix="autocompress-onnx-") as folder:
        plain = Path(folder) / path.name
        onnx.save(expand_functions(onnx.load(path)), plain)
        yield plain


def expand_functions(model: Any) -> Any:
    """A model (`onnx.ModelProto`) without functions of its own; see `without_functions`."""
    from onnx import inliner, numpy_helper

    functions = {(f.domain, f.name): f for f in model.functions}
    constants = {i.name: i for i in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        function = functions.get((node.domain, node.op_type))
        if function is None or not all(name in constants for name in node.input):
            kept.append(node)
            continue
        values = [numpy_helper.to_array(constants[name]) for name in node.input]
        for name, value in _evaluate(function, functions, node, values).items():
            model.graph.initializer.append(numpy_helper.from_array(value, name))
            constants[name] = model.graph.initializer[-1]
    # A copy, for the nodes live in the list that is emptied.
    nodes = [type(node).FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unread(model.graph)
    return inliner.inline_local_functions(model)


def trivial_model() -> Any:
    """A model with a convolution and a matrix product, for bringing a runtime up.

    Its input `x` is float32 of shape (batch, 4, 4, 4).
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = {
        "kernel": np.ones((4, 4, 3, 3), np.float32),
        "matrix": np.ones((4, 4), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MatMul", ["r", "matrix"], ["y"]),
    ]
    shape: list[str | int | None] = ["batch", 4, 4, 4]
    graph = helper.make_graph(
        nodes,
        "trivial",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _evaluate(
    function: Any, functions: Mapping[Any, Any], node: Any, values: list[Any]
) -> dict[str, Any]:
    from onnx.reference import ReferenceEvaluator

    others = [other for other in functions.values() if other is not function]
    evaluator = ReferenceEvaluator(function, functions=others)
    feed = dict(zip(function.input, values, strict=False))
    outputs = evaluator.run(None, feed, attributes={a.name: a for a in node.attribute})
    return {name: value for name, value in zip(node.output, outputs, strict=False) if name}


def _drop_unread(graph: Any) -> None:
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def _fields(file: IO[bytes]) -> Iterator[int]:
    """The number of each field of a protobuf message, contents skipped; other bytes end the list.

    The encoding is that of protobuf.dev, "Encoding".
    """
    end = file.seek(0, SEEK_END)
    file.seek(0)
    while (tag := _varint(file)) is not None:
        kind = tag & 7
        yield tag >> 3
        if kind == _VARINT:
            _varint(file)
            continue
        length = _varint(file) if kind == _BYTES else _FIXED.get(kind)
        if length is None or length > end - file.tell():
            return
        file.seek(length, SEEK_CUR)


def _varint(file: IO[bytes]) -> int | None:
    value, shift = 0, 0
    while byte := file.read(1):
        value |= (byte[0] & ~_CONTINUES) << shift
        shift += 7
        if not byte[0] & _CONTINUES:
            return value
    return None
