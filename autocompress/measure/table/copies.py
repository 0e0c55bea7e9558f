"""Models that hold one copy of a block or many: their difference is the block's time.

Copies have weights of their own, so that nothing is merged and weights come from where they come
from in a network. A block that adds a tensor of its output's type to its result is chained through
that tensor, as residual networks chain it. Others stand side by side, and each output is sampled by
a pooling of single values, which costs next to nothing and, unlike a slice or an output of the
model, leaves alone the layout in which kernels work. Both models have as many samples, and as many
of the small convolutions that stand for earlier layers where a block needs one before it, so that
their time cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from onnx import helper, numpy_helper

from autocompress.measure.session import Array
from autocompress.measure.table.block import Block, TensorType
from autocompress.measure.table.fill import random_constants, random_input
from autocompress.measure.table.scaffold import Scaffold, finished_model

MOST_COPIES = 4
_FEWEST_COPIES = 3
# More weights than a core's own cache holds, as in a network; not so many that pages run out too.
_WEIGHT_BYTES = 4 << 20


@final
@dataclass(frozen=True)
class Bench:
    """Two models whose difference in time is that of `copies` copies of a block.

    Attributes:
        inputs: one array per input of either model, with one row that is the block's own input.
    """

    one: bytes
    many: bytes
    copies: int
    inputs: tuple[Array, ...]


def bench(block: Block, seed: int = 0) -> Bench:
    """The models that time a block.

    Args:
        seed: of the random weights and inputs.
    """
    room = _WEIGHT_BYTES // max(block.weight_bytes, 1)
    copies = int(np.clip(room, _FEWEST_COPIES, MOST_COPIES))
    generator = np.random.default_rng(seed)
    inputs = tuple(random_input(kind, generator)[None] for kind in block.inputs)
    chained = chained_input(block)
    models = []
    for count in (1, copies + 1):
        builder = _Builder(block, np.random.default_rng((seed, count)))
        if chained is not None:
            builder.chain(count, chained)
        elif mergeable(block):
            builder.apart(count, copies + 1)
        else:
            builder.side_by_side(count, copies + 1)
        models.append(builder.scaffold.model(block.inputs, block.opsets))
    return Bench(models[0], models[1], copies, inputs)


def empty_bench(inputs: Sequence[TensorType], outputs: Sequence[TensorType]) -> Bench:
    """Models that do next to nothing between the given inputs and outputs, once and many times.

    Every output is a constant plus some values of the first input, so nothing is computed in
    advance. What is left of a run without these additions is `run_overhead`.
    """
    models = [
        _empty_model(inputs, outputs, 1),
        _empty_model(inputs, outputs, MOST_COPIES + 1),
    ]
    generator = np.random.default_rng(0)
    arrays = tuple(random_input(kind, generator)[None] for kind in inputs)
    return Bench(models[0], models[1], MOST_COPIES, arrays)


def run_overhead(one_ms: float, many_ms: float, copies: int) -> float:
    """What a run takes by itself, from the times of both models of an `empty_bench`."""
    # Besides two or three small nodes per copy, one more in all makes the input flat.
    return one_ms - 1.5 * (many_ms - one_ms) / copies


def _empty_model(inputs: Sequence[TensorType], outputs: Sequence[TensorType], copies: int) -> bytes:
    constants = [numpy_helper.from_array(np.array([-1], np.int64), "flat")]
    nodes = [helper.make_node("Reshape", ["i0", "flat"], ["values"])]
    for copy in range(copies):
        place = np.array([copy % max(inputs[0].elements, 1)], np.int64)
        constants.append(numpy_helper.from_array(place, f"place{copy}"))
        nodes.append(helper.make_node("Gather", ["values", f"place{copy}"], [f"value{copy}"]))
    for i, kind in enumerate(outputs):
        value = np.zeros(kind.shape, helper.tensor_dtype_to_np_dtype(kind.element))
        constants.append(numpy_helper.from_array(value, f"o{i}_sum0"))
        for copy in range(copies):
            cast, before = f"o{i}_value{copy}", f"o{i}_sum{copy}"
            after = f"o{i}" if copy == copies - 1 else f"o{i}_sum{copy + 1}"
            nodes.append(helper.make_node("Cast", [f"value{copy}"], [cast], to=kind.element))
            nodes.append(helper.make_node("Add", [before, cast], [after]))
    return finished_model(nodes, constants, inputs, outputs, ())


def chained_input(block: Block) -> int | None:
    """Which input takes the output of the copy before; None if copies stand side by side.

    It is never one that the lead reads: copies of a block that only those could chain take the
    same time side by side.
    """
    if len(block.outputs) != 1:
        return None
    for i, kind in enumerate(block.inputs):
        if i not in block.main_inputs and kind == block.output_types[0]:
            return i
    return None


def mergeable(block: Block) -> bool:
    """Whether copies that read the same tensors would be merged, wholly or in part.

    They are where a node has nothing of its own: no weight, scale or other random constant.
    """
    own = {f"c{i}" for i, constant in enumerate(block.constants) if constant.values is None}
    for node in block.nodes:
        if not own & set(node.inputs):
            return True
        own |= set(node.outputs)
    return False


@final
class _Builder:
    """Puts copies of a block into one model."""

    def __init__(self, block: Block, generator: np.random.Generator) -> None:
        self._block = block
        self._generator = generator
        self.scaffold = Scaffold(generator)

    def side_by_side(self, copies: int, samples: int) -> None:
        """Copies that read the same tensors; in all, `samples` samples of each output."""
        inputs = self._inputs()
        for number in range(samples):
            if number < copies:
                outputs = self._copy(number, inputs)
            self._sample(outputs, self._block.output_types, number)

    def apart(self, copies: int, samples: int) -> None:
        """Copies that read tensors of their own; tensors that no copy reads are sampled."""
        for number in range(samples):
            inputs = [
                self.scaffold.earlier_layer(f"i{i}", f"i{i}_made{number}", kind)
                for i, kind in enumerate(self._block.inputs)
            ]
            if number < copies:
                self._sample(self._copy(number, inputs), self._block.output_types, number)
            else:
                self._sample(inputs, self._block.inputs, number)

    def chain(self, copies: int, chained: int) -> None:
        """Copies whose input `chained` is the output of the copy before."""
        inputs = self._inputs()
        for copy in range(copies):
            inputs[chained] = self._copy(copy, inputs)[0]
        self._sample([inputs[chained]], self._block.output_types, 0)

    def _inputs(self) -> list[str]:
        """Names of what the copies read; what their lead does not read was made before."""
        main = self._block.main_inputs
        return [
            f"i{i}" if i in main else self.scaffold.earlier_layer(f"i{i}", f"i{i}_made", kind)
            for i, kind in enumerate(self._block.inputs)
        ]

    def _sample(self, names: Sequence[str], kinds: Sequence[TensorType], number: int) -> None:
        for name, kind in zip(names, kinds, strict=True):
            self.scaffold.sample(name, kind, number)

    def _copy(self, copy: int, inputs: Sequence[str]) -> list[str]:
        """Add a copy; the names of its outputs."""
        names = {f"i{i}": name for i, name in enumerate(inputs)} | {"": ""}
        for name, value in random_constants(self._block, self._generator).items():
            names[name] = self.scaffold.keep(f"copy{copy}_{name}", value)
        for number, node in enumerate(self._block.nodes):
            names |= {made: f"copy{copy}_{made}" for made in node.outputs if made}
            proto = helper.make_node(
                node.operator,
                [names[name] for name in node.inputs],
                [names[name] for name in node.outputs],
                f"copy{copy}_{number}",
                domain=node.domain,
            )
            proto.attribute.extend(node.protos())
            self.scaffold.nodes.append(proto)
        return [names[name] for name in self._block.outputs]
