"""PyTorch's ONNX exporter: called quietly, its graph made slim and free of channel counts."""

from __future__ import annotations

import inspect
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxscript import ir
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter.onnx_fusions import fuse
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autocompress.errors import ExportError
from autocompress.export.edit import TABLE_OPERATOR, drop_initializers
from autocompress.export.function_table import kept_function_table
from autocompress.onnx_sizes import note_sizes
from autocompress.workload import Axes, axis_sizes
from autocompress.workload.inputs import BATCH_AXIS


def export_graph(
    network: nn.Module, example_inputs: tuple[Tensor, ...], axes: Sequence[Axes] = ()
) -> onnx.ModelProto:
    """Export a network in evaluation mode with a free batch dimension.

    Args:
        axes: further open axes; see `Workload`.

    Raises:
        ExportError: PyTorch's exporter cannot handle the network.
    """
    # A batch of one would be taken for a constant.
    inputs = tuple(x if len(x) > 1 else torch.cat([x, x]) for x in example_inputs)
    try:
        try:
            model = _export(network, inputs, axes)
        except Exception:
            # A fused attention kernel may leave a memory layout that the exporter takes for fixed.
            with sdpa_kernel(SDPBackend.MATH):
                model = _export(network, inputs, axes)
    except Exception as cause:
        raise ExportError(
            f"The network cannot be exported to ONNX: {_root_reason(cause)}",
            given=type(network).__name__,
            allowed="a network that torch.onnx.export(dynamo=True) takes with a free batch size"
            + (" and its dynamic_axes open" if axes else ""),
            advice="see --debug for the exporter's own report",
        ) from cause
    free_reshaped_channels(model)
    slim(model)
    note_sizes(model, axis_sizes(example_inputs, axes))
    return model


def _export(
    network: nn.Module, inputs: tuple[Tensor, ...], axes: Sequence[Axes]
) -> onnx.ModelProto:
    with _quiet(), kept_function_table():
        program = torch.onnx.export(
            network, inputs, dynamo=True, verbose=False,
            dynamic_shapes=_free_axes(network, len(inputs), axes), optimize=False,
        )  # fmt: skip
        assert program is not None
        tables = _tables(network)
        optimize_ir(program.model, should_fold=lambda node: _may_fold(node, tables))
        fuse(program.model)
    model: onnx.ModelProto = program.model_proto
    return model


def _tables(network: nn.Module) -> frozenset[str]:
    """Names of the weights from which rows are gathered."""
    named = network.named_modules(remove_duplicate=False)
    return frozenset(f"{name}.weight" for name, m in named if isinstance(m, nn.Embedding))


def _may_fold(node: ir.Node, tables: frozenset[str]) -> bool | None:
    """What constants may not swallow: rows of tables, whose weights candidates bring.

    A runtime folds them when it loads the file.
    """
    first = node.inputs[0] if node.inputs else None
    gathers = node.op_type == TABLE_OPERATOR and first is not None and first.name in tables
    return False if gathers else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from printing graphs and warnings; its errors say what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root_reason(error: BaseException) -> str:
    """The first line of the error that began a chain; the exporter's own tells nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _free_axes(network: nn.Module, inputs: int, axes: Sequence[Axes]) -> tuple[object, ...]:
    """The open axes of every input, nested as the forward function takes them."""
    # Of axes with a name only, the exporter finds out what sizes they may have.
    batch = BATCH_AXIS if axes else torch.export.Dim(BATCH_AXIS)
    named = (*axes, *({} for _ in range(inputs - len(axes))))
    shapes = tuple({0: batch, **each} for each in named)
    for place, parameter in enumerate(inspect.signature(network.forward).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*shapes[:place], shapes[place:])
    return shapes


def free_reshaped_channels(model: onnx.ModelProto) -> None:
    """Let reshapes take any number of channels, in place.

    The exporter writes `[-1, features]` for a flatten, and `[-1, length, heads, width]` where heads
    are split; `[0, -1]` and `[0, 0, -1, width]` mean the same and fit pruned networks too.
    """
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.value_info)
    }
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        wanted = numpy_helper.to_array(constants[node.input[1]]).tolist()
        free = _free_shape(shapes.get(node.input[0], []), wanted)
        if free is not None:
            name = f"{node.output[0]}_shape"
            model.graph.initializer.append(numpy_helper.from_array(np.array(free), name))
            node.input[1] = name
            set_attribute(node, "allowzero", 0)
    used = {name for node in model.graph.node for name in node.input}
    drop_initializers(model.graph, {i.name for i in model.graph.initializer} - used)


def _free_shape(source: Sequence[str | int], wanted: Sequence[int]) -> list[int] | None:
    """A shape that keeps the batch and takes the first size that changes from the others.

    None where it is not known that the batch stays.
    """
    sizes = [size for size in source[1:] if isinstance(size, int)]
    kept = bool(source) and isinstance(source[0], str) and len(sizes) == len(source) - 1
    if not kept or not wanted or wanted[0] != -1 or math.prod(sizes) != math.prod(wanted[1:]):
        return None
    pairs = enumerate(zip(sizes, wanted[1:], strict=False), 1)
    first = next((place for place, (a, b) in pairs if a != b), min(len(source), len(wanted) - 1))
    return [0] * first + [-1] + list(wanted[first + 1 :])


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without intermediate shapes and exporter notes; names and weights stay."""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    for item in (*model.graph.node, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
    return model


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    """Give a node's integer attribute a value, in place."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
