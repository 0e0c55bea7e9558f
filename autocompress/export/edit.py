"""Small changes to ONNX graphs, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx

from autocompress.errors import ExportError

MICROSOFT = "com.microsoft"
LAYER_OPERATORS = ("Conv", "Gemm", "MatMul")
TABLE_OPERATOR = "Gather"


def layers_of(graph: onnx.GraphProto, weight: str, *, tables: bool = False) -> list[onnx.NodeProto]:
    """The convolutions and matrix products that read a weight.

    Args:
        tables: whether it may be an embedding's table as well, from which rows are gathered.

    Raises:
        ExportError: there is none, or something else reads the weight too.
    """
    readers = [node for node in graph.node if weight in node.input]
    places = dict.fromkeys(LAYER_OPERATORS, 1) | ({TABLE_OPERATOR: 0} if tables else {})
    wrong = [
        node.op_type for node in readers
        if node.op_type not in places or node.input[places[node.op_type]] != weight
    ]  # fmt: skip
    if wrong or not readers:
        raise ExportError(
            "A weight to be quantized is not read by convolutions and matrix products alone.",
            given=f"{weight}, read by {', '.join(sorted(wrong)) or 'nothing'}",
            allowed=", ".join(LAYER_OPERATORS),
            advice="leave the layer out with `exclude` in the search space",
        )
    return readers


def constant_tensors(graph: onnx.GraphProto) -> set[str]:
    """What initializers alone determine; a runtime computes it when it loads the file."""
    found = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if all(name in found for name in node.input if name):
            found.update(node.output)
    return found


def plain_product(node: onnx.NodeProto) -> str:
    """The bias of a matrix product `x W + b`; empty if it has none.

    Raises:
        ExportError: a Gemm that scales its terms or transposes its input.
    """
    values = {a.name: a.f if a.name in ("alpha", "beta") else a.i for a in node.attribute}
    if values.get("alpha", 1) != 1 or values.get("beta", 1) != 1 or values.get("transA", 0) != 0:
        raise ExportError(
            "A Gemm that is no plain linear layer cannot be quantized.",
            given=f"{node.name} with {values}",
            allowed="alpha 1, beta 1, transA 0",
        )
    return str(node.input[2]) if len(node.input) > 2 else ""


def replace_nodes(
    graph: onnx.GraphProto, replacements: Mapping[str, Sequence[onnx.NodeProto]]
) -> None:
    """Put other nodes in the place of those that write the given tensors."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        key = node.output[0] if node.output else ""
        nodes += replacements.get(key, [node])
    del graph.node[:]
    graph.node.extend(nodes)


def put_first(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Put nodes that read constants only before all others."""
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def swap_initializers(
    graph: onnx.GraphProto, dropped: Collection[str], added: Sequence[onnx.TensorProto]
) -> None:
    """Replace initializers by others, once per name, and drop those that nothing reads."""
    used = {name for node in graph.node for name in node.input}
    used |= {output.name for output in graph.output}
    fresh = {i.name: i for i in added}
    held = {i.name for i in graph.initializer} - set(dropped)
    drop_initializers(graph, {i.name for i in graph.initializer} - (held & used))
    for place, initializer in enumerate(graph.initializer):
        if initializer.name in fresh:
            graph.initializer[place].CopyFrom(fresh[initializer.name])
    graph.initializer.extend([i for n, i in fresh.items() if n in used and n not in held])


def drop_initializers(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Drop some initializers, in place; the others are not copied, which may be most of memory."""
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name in names:
            del graph.initializer[place]


def emptied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model without its initializers, which are taken from the model too.

    Protobuf keeps the memory of what is deleted from a message for as long as the message, or any
    part of it, is referred to: of a large network that would be all its weights.
    """
    del model.graph.initializer[:]
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    return bare


def copied(initializer: onnx.TensorProto) -> onnx.TensorProto:
    """A copy of an initializer that does not keep its graph in memory."""
    copy = onnx.TensorProto()
    copy.CopyFrom(initializer)
    return copy


def use_domain(model: onnx.ModelProto, domain: str) -> None:
    """Import version 1 of an operator domain."""
    if all(entry.domain != domain for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
