"""Two blocks as one, and what kind of meeting it is: where layouts differ, a runtime converts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from onnx import TensorProto

from autocompress.measure.table.block import READER, Block, BlockNode, TensorType
from autocompress.measure.table.canonical import QUANTIZERS, SCALE, ZERO_POINT
from autocompress.measure.table.cut import Cut, Edge

_INTEGERS = (TensorProto.UINT8, TensorProto.INT8)
_GRID = (SCALE, ZERO_POINT)


@final
@dataclass(frozen=True)
class Meeting:
    """A tensor between two kinds of blocks.

    Attributes:
        kind: what both blocks are to each other, whatever their channels; the same kind of meeting
            costs the same for the same tensor.
        tensor: what is handed over.
    """

    kind: str
    tensor: TensorType

    @staticmethod
    def between(end: str, begin: str, tensor: TensorType) -> Meeting:
        """A meeting of what `end_of` and `begin_of` say of two blocks."""
        element = TensorProto.DataType.Name(tensor.element).lower()
        return Meeting(f"{end} -> {element} -> {begin}", tensor)

    @property
    def key(self) -> str:
        """Under which its entry is kept."""
        return f"{self.kind} {self.tensor.text}"

    @property
    def place(self) -> str:
        """Kind and size of an image, without channels: meetings among which one may interpolate."""
        return f"{self.kind} {'x'.join(map(str, self.tensor.shape[2:]))}"


def meeting_of(cut: Cut, edge: Edge) -> Meeting:
    """What meets at an edge."""
    producer, consumer = cut.blocks[edge.producer], cut.blocks[edge.consumer]
    how = "" if edge.input in consumer.main_inputs else " beside"
    tensor = producer.output_types[edge.output]
    return Meeting.between(end_of(producer), f"{begin_of(consumer)}{how}", tensor)


def distinct_edges(cut: Cut) -> dict[tuple[int, int, str], Edge]:
    """Edges by producer, output and kind of meeting: a tensor is converted once for all readers."""
    found: dict[tuple[int, int, str], Edge] = {}
    for edge in cut.edges:
        found.setdefault((edge.producer, edge.output, meeting_of(cut, edge).kind), edge)
    return found


def begin_of(block: Block) -> str:
    """The operator that a block begins with, and whether it computes in integers."""
    makers, lead = block.makers(), block.lead
    sources = [makers.get(name) for name in lead.inputs[:2]]
    integer = len(sources) > 1 and all(s is not None and s.operator == READER for s in sources)
    return f"{'integer ' if integer else ''}{lead.operator}"


def end_of(block: Block) -> str:
    """What a block's result comes from: as `begin_of`, and whether what it adds is of that kind."""
    added = {
        block.inputs[i].element in _INTEGERS
        for i in set(range(len(block.inputs))) - block.main_inputs
    }
    begin = begin_of(block)
    integer = begin.startswith("integer ")
    mixed = " mixed" if added - {integer} else ""
    return f"{begin}{mixed}"


def join(producer: Block, output: int, consumer: Block, place: int) -> Block:
    """The block that two blocks are together.

    Args:
        output: which of the producer's outputs the consumer reads.
        place: as which of its inputs.
    """
    first = _Renamer(producer, 0, 0, {})
    handed = first.names[producer.outputs[output]]
    second = _Renamer(consumer, len(producer.inputs), len(producer.constants), {place: handed})
    nodes = [*first.nodes, *second.nodes]
    nodes = _same_grid(nodes, handed)
    versions = dict(producer.opsets) | dict(consumer.opsets)
    others = [o for i, o in enumerate(producer.outputs) if i != output]
    other_types = [t for i, t in enumerate(producer.output_types) if i != output]
    kept = [kind for i, kind in enumerate(consumer.inputs) if i != place]
    return Block(
        opsets=tuple(sorted(versions.items())),
        inputs=(*producer.inputs, *kept),
        constants=(*producer.constants, *consumer.constants),
        nodes=tuple(nodes),
        outputs=(*(first.names[o] for o in others), *(second.names[o] for o in consumer.outputs)),
        output_types=(*other_types, *consumer.output_types),
    )


@final
class _Renamer:
    """A block's nodes with names that are free in the joint block."""

    def __init__(self, block: Block, inputs: int, constants: int, given: dict[int, str]) -> None:
        self.names = {"": ""}
        for i in range(len(block.inputs)):
            self.names[f"i{i}"] = given.get(i, f"i{inputs}")
            inputs += i not in given
        self.names |= {f"c{i}": f"c{constants + i}" for i in range(len(block.constants))}
        prefix = "b" if given else "a"
        made = [name for node in block.nodes for name in node.outputs if name]
        self.names |= {name: f"{prefix}{name}" for name in made}
        self.nodes = [
            replace(
                node,
                inputs=tuple(self.names[name] for name in node.inputs),
                outputs=tuple(self.names[name] for name in node.outputs),
            )
            for node in block.nodes
        ]


def _same_grid(nodes: list[BlockNode], handed: str) -> list[BlockNode]:
    """Let who reads a quantized tensor use the scale and zero point of who made it."""
    maker = next((n for n in nodes if handed in n.outputs), None)
    if maker is None or maker.operator not in QUANTIZERS:
        return nodes
    result = []
    for node in nodes:
        if node.operator in QUANTIZERS and node.inputs[0] == handed:
            grid = list(node.inputs)
            for place in _GRID:
                if place < min(len(grid), len(maker.inputs)):
                    grid[place] = maker.inputs[place]
            node = replace(node, inputs=tuple(grid))
        result.append(node)
    return result
