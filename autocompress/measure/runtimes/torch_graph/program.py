"""`Program`: a graph compiled for inputs of given shapes, ready to run step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.clock import Clock
from autocompress.measure.runtimes.torch_graph.graph import Graph, GraphNode, evaluate, rounded
from autocompress.measure.runtimes.torch_graph.node import Run
from autocompress.measure.runtimes.torch_graph.operators import OPERATORS

# What they give is decided by the shape of their input alone.
_OF_SHAPES = ("Shape", "Size")


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One node to run.

    Attributes:
        inputs: places of its inputs among the values; None for one left out.
        outputs: places of its outputs; None for one that nobody reads.
        dead: places that nobody reads later.
        description: types and shapes of inputs and outputs.
    """

    node: GraphNode
    run: Run
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    dead: tuple[int, ...]
    description: tuple[tuple[str, ...], tuple[str, ...]]


@final
class Program:
    """Steps over a list of values: the graph's inputs, its constants, then what is computed."""

    def __init__(
        self, steps: Sequence[Step], constants: Sequence[Tensor], outputs: Sequence[int], size: int
    ) -> None:
        self.steps = tuple(steps)
        self._constants = list(constants)
        self._outputs = tuple(outputs)
        self._size = size

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All outputs, on the device and perhaps not finished.

        Args:
            inputs: of the shapes that the program was compiled for, on the device, floating-point
                ones in the target's type.
        """
        values = self._values(inputs)
        for step in self.steps:
            _take(step, values)
        return self._results(values)

    def profile(self, inputs: Sequence[Tensor], clock: Clock) -> list[float]:
        """Milliseconds of each step in one run."""
        values = self._values(inputs)
        clock.start()
        for step in self.steps:
            _take(step, values)
            clock.tick()
        return clock.intervals_ms()

    def _values(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        values: list[Tensor | None] = [*inputs, *self._constants]
        values += [None] * (self._size - len(values))
        return values

    def _results(self, values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        results = tuple(values[place] for place in self._outputs)
        return tuple(result for result in results if result is not None)


def compile_program(graph: Graph, inputs: Sequence[Tensor]) -> Program:
    """Compile a graph for inputs of these shapes; shapes within the graph are computed here.

    The graph is run once on the inputs.

    Raises:
        MeasurementError: a node that PyTorch cannot run with inputs of these shapes.
    """
    values = {**graph.constants, **dict(zip(graph.input_names, inputs, strict=True))}
    constants = dict(graph.constants)
    found: list[tuple[GraphNode, Run, tuple[tuple[str, ...], tuple[str, ...]]]] = []
    for node in graph.nodes:
        example = node.with_examples(values, constants, graph.target)
        if all(example.constant) or node.key[1] in _OF_SHAPES:
            computed = evaluate(node, example)
            dtype = graph.target.dtype
            constants.update({name: rounded(value, dtype) for name, value in computed.items()})
            values.update({name: constants[name] for name in computed})
            continue
        run = OPERATORS[node.key](example)
        result = run(*example.inputs)
        made = (result,) if isinstance(result, Tensor) else result
        described = (
            tuple(describe(value) for value in example.inputs if value is not None),
            tuple(describe(value) for value in made),
        )
        found.append((node, run, described))
        values.update(dict(zip(node.outputs, made, strict=False)))
    return _link(graph, found, constants)


def describe(value: Tensor) -> str:
    """Type and shape, such as `float32[1,3,8,8]`."""
    return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"


def _link(
    graph: Graph,
    found: Sequence[tuple[GraphNode, Run, tuple[tuple[str, ...], tuple[str, ...]]]],
    constants: dict[str, Tensor],
) -> Program:
    read = {name for node, _, _ in found for name in node.inputs} | set(graph.output_names)
    kept = [name for name in constants if name in read]
    places = {name: place for place, name in enumerate([*graph.input_names, *kept])}
    first_computed = len(places)
    last: dict[int, int] = {}
    for index, (node, _, _) in enumerate(found):
        for name in (*node.inputs, *node.outputs):
            if name:
                last[places.setdefault(name, len(places))] = index
    alive = {places[name] for name in graph.output_names}
    steps = []
    for index, (node, run, described) in enumerate(found):
        dead = [p for p, i in last.items() if i == index and p >= first_computed and p not in alive]
        steps.append(
            Step(
                node,
                run,
                tuple(places[name] if name else None for name in node.inputs),
                tuple(places[name] if name in read else None for name in node.outputs),
                tuple(dead),
                described,
            )
        )
    outputs = [places[name] for name in graph.output_names]
    return Program(steps, [constants[name] for name in kept], outputs, len(places))


def _take(step: Step, values: list[Tensor | None]) -> None:
    arguments = [None if place is None else values[place] for place in step.inputs]
    result = step.run(*arguments)
    if isinstance(result, torch.Tensor):
        place = step.outputs[0]
        if place is not None:
            values[place] = result
    else:
        for place, value in zip(step.outputs, result, strict=False):
            if place is not None:
                values[place] = value
    for place in step.dead:
        values[place] = None
