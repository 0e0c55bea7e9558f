"""Which of a file's nodes each node of ONNX Runtime's optimized graph stands for.

ONNX Runtime builds the names of the nodes and values that it makes from those that it replaces. So
a copy is optimized in which every node and every value between nodes has a name of its own that
says where it came from. The library `onnx` is imported on first use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

_MARK = re.compile(r"source(\d+)_(\d*)")
# They belong to the node that they follow, whatever reads them.
_FOLLOWERS = ("QuantizeLinear", "Relu", "Clip", "LeakyRelu")
_MOVING = ("Transpose", "ReorderInput", "ReorderOutput")


@final
@dataclass(frozen=True)
class MarkedModel:
    """A copy whose names say where they came from.

    Attributes:
        model: the copy (`onnx.ModelProto`); it computes the same.
        keys: per node of the file, its name, or its first output's where it has none.
        outputs: per node of the file, its outputs' names.
    """

    model: Any
    keys: tuple[str, ...]
    outputs: tuple[tuple[str, ...], ...]

    def original_name(self, name: str) -> str:
        """A name of the optimized graph as it would be without marks."""

        def unmark(match: re.Match[str]) -> str:
            node, output = int(match[1]), match[2]
            return self.outputs[node][int(output)] if output else self.keys[node]

        return _MARK.sub(unmark, name)


def mark(model: Any) -> MarkedModel:
    """A marked copy of a model; names of inputs and constants stay, outputs keep their order."""
    copy = type(model).FromString(model.SerializeToString())
    graph = copy.graph
    outputs = tuple(tuple(node.output) for node in graph.node)
    keys = tuple(node.name or next(iter(node.output), "") for node in graph.node)
    names = {
        name: f"source{place}_{index}"
        for place, found in enumerate(outputs)
        for index, name in enumerate(found)
        if name
    }
    for place, node in enumerate(graph.node):
        node.name = f"source{place}_"
    _rename(graph, names)
    return MarkedModel(copy, keys, outputs)


def origins(marked: MarkedModel, optimized: Sequence[Any]) -> list[tuple[str, ...]]:
    """For each optimized node, the keys of the file's nodes that it stands for.

    A node of the file whose mark is in no name was fused into the node that reads it, or else into
    the one that it reads.

    Args:
        marked: the file.
        optimized: nodes (`onnx.NodeProto`) of the optimized graph of its marked copy.
    """
    nodes = marked.model.graph.node
    makers = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    owners = _owners(nodes, optimized, makers)
    readers: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        for name in node.input:
            readers.setdefault(name, []).append(place)
    for place in reversed(range(len(nodes))):
        if place not in owners and nodes[place].op_type not in _FOLLOWERS:
            found = [reader for name in nodes[place].output for reader in readers.get(name, [])]
            _take_first(owners, place, found)
    for place, node in enumerate(nodes):
        if place not in owners:
            _take_first(owners, place, [makers[name] for name in node.input if name in makers])
    grouped = [set(_named(node.name)) for node in optimized]
    for source, owner in owners.items():
        grouped[owner].add(source)
    return [tuple(marked.keys[source] for source in sorted(group)) for group in grouped]


def _owners(
    nodes: Sequence[Any], optimized: Sequence[Any], makers: Mapping[str, int]
) -> dict[int, int]:
    """The optimized node for each of the file's nodes whose mark is in a name."""
    owners: dict[int, int] = {}
    # A node that kept its name comes before others that were named after it.
    for place, node in enumerate(optimized):
        if match := _MARK.fullmatch(node.name):
            owners.setdefault(int(match[1]), place)
    for place, node in enumerate(optimized):
        found = [int(match[1]) for match in _MARK.finditer(node.name)]
        made = [makers[name] for name in node.output if name in makers]
        # One that was put in to move values takes over the name of what it moves.
        if node.op_type in _MOVING:
            made = [source for source in made if nodes[source].op_type == node.op_type]
        for source in (*found, *made):
            owners.setdefault(source, place)
    return owners


def _named(name: str) -> list[int]:
    """The file's nodes whose own names, not those of their values, are part of a name."""
    return [int(match[1]) for match in _MARK.finditer(name) if not match[2]]


def _take_first(owners: dict[int, int], place: int, neighbours: Iterable[int]) -> None:
    for other in neighbours:
        if other in owners:
            owners[place] = owners[other]
            return


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename values in place, in subgraphs too, which read those of the outer graph."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, names)
    for item in (*graph.value_info, *graph.output):
        item.name = names.get(item.name, item.name)
