"""Integers whose order means something: magnitudes and signs in the contexts of the past."""

from __future__ import annotations

from typing import final

import numpy as np

from autocompress.export.coding.contexts import (
    DETAIL_CONTEXTS,
    MAGNITUDE_CONTEXTS,
    SIGN_CONTEXTS,
    Past,
)
from autocompress.export.coding.layout import Layout
from autocompress.export.coding.mixing import Mixer
from autocompress.export.coding.ranges import Coder, Ints
from autocompress.export.coding.steps import StepTree, code_even, step_tree

_WEIGHT_SETS = 12


def code_ordered(
    coder: Coder, wanted: Ints | None, layout: Layout, step: int, largest: int
) -> Ints:
    """Code a tensor of integers.

    Args:
        wanted: the integers, flat, magnitudes up to `largest`; None where they are read.
        step: a typical magnitude, see `steps.step_size`.

    Returns:
        The integers, flat.
    """
    result = np.zeros((layout.rows, layout.columns), np.int64)
    given = None if wanted is None else layout.matrix(wanted)
    past = Past(layout, step)
    values = _Values(step_tree(step, largest))
    for first, last in layout.row_groups():
        past.start_group(last - first)
        for phase in range(layout.phases):
            for start, stop in layout.spans(phase):
                columns = slice(start * layout.phases + phase, None, layout.phases)
                columns = slice(columns.start, (stop - 1) * layout.phases + phase + 1, columns.step)
                contexts = past.contexts(phase, start, stop)
                block = None if given is None else given[first:last, columns].reshape(-1)
                found = values.code(coder, block, *contexts).reshape(last - first, stop - start)
                result[first:last, columns] = found
                past.add(phase, start, found)
        past.end_group()
    return layout.tensor(result)


@final
class _Values:
    def __init__(self, tree: StepTree) -> None:
        self._tree = tree
        # What a step is divided into depends little on the surroundings: few contexts, for speed.
        self._steps = Mixer(MAGNITUDE_CONTEXTS, tree.chain, _WEIGHT_SETS)
        few = MAGNITUDE_CONTEXTS[:DETAIL_CONTEXTS]
        self._details = Mixer(few, tree.questions - tree.chain, _WEIGHT_SETS)
        self._signs = Mixer(SIGN_CONTEXTS, 2, 1)

    def code(self, coder: Coder, wanted: Ints | None, sizes: Ints, signs: Ints) -> Ints:
        """Code values (n,) with their contexts of magnitude (7, n) and sign (4, n)."""
        magnitudes = self._magnitudes(coder, None if wanted is None else abs(wanted), sizes)
        active = np.flatnonzero(magnitudes)
        if active.size:
            negative = None if wanted is None else wanted[active] < 0
            kinds = np.minimum(magnitudes[active], 2) - 1
            bits = self._signs.code(coder, negative, signs[:, active], kinds, 0)
            magnitudes[active] *= 1 - 2 * bits
        return magnitudes

    def _magnitudes(self, coder: Coder, wanted: Ints | None, contexts: Ints) -> Ints:
        tree = self._tree
        nodes = np.zeros(contexts.shape[1], np.int64)
        if tree.chain:
            self._descend(coder, wanted, nodes, (self._steps, contexts, 0, tree.chain))
        if tree.questions > tree.chain:
            rough = contexts[:DETAIL_CONTEXTS]
            part = (self._details, rough, tree.chain, tree.questions)
            self._descend(coder, wanted, nodes, part)
        leaves = nodes - tree.questions
        bases = tree.bases[leaves]
        rest = None if wanted is None else wanted - bases
        return bases + code_even(coder, rest, tree.even_bits[leaves])

    def _descend(
        self, coder: Coder, wanted: Ints | None, nodes: Ints, part: tuple[Mixer, Ints, int, int]
    ) -> None:
        """Answer all questions from `first` to before `stop`; changes `nodes`, (n,)."""
        tree = self._tree
        mixer, contexts, first, stop = part
        active = np.flatnonzero((nodes >= first) & (nodes < stop))
        depth = 0
        while active.size:
            asked = nodes[active]
            known = None if wanted is None else wanted[active] >= tree.thresholds[asked]
            whose = min(depth, _WEIGHT_SETS - 1)
            bits = mixer.code(coder, known, contexts[:, active], asked - first, whose)
            nodes[active] = tree.children[asked, bits]
            active = active[(nodes[active] >= first) & (nodes[active] < stop)]
            depth += 1
