"""The plans that every study begins with: each technique at one strength all over the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autocompress.plan import Decision
from autocompress.search.space import Parameter, Space
from autocompress.techniques import NETWORK
from autocompress.techniques.technique import Stage

Indices = dict[str, int]

_FEW_GROUPS = 12


def uniform_seeds(space: Space) -> list[Indices]:
    """Parameter values of the starting plans, the most telling first; none twice.

    No blocks are taken out: without all of them there is no network left to look at.

    With the fastest quantization of the first technique that the space names: pruning,
    decomposition and sparsity at every level all over the network, pruning also of uncoupled groups
    only, which costs less accuracy for the same speed, and, where there are few groups, of each
    group alone at its mildest. Without it: pruning at every level. Every other way to quantize, and
    every choice for the network as a whole, alone.
    """
    quantized = _everywhere(_of_stage(space, Stage.QUANTIZE))
    first = _fastest_of_first_technique(quantized)
    pruned = _of_stage(space, Stage.PRUNE)
    inner = [p for p in pruned if not any("+" in target for target in p.targets)]
    alone = [{p.name: 1} for p in pruned] if len(pruned) <= _FEW_GROUPS else []
    shapes: list[Indices] = _interleave(
        list(_levels(inner)),
        list(_levels(pruned)),
        list(_levels(_of_stage(space, Stage.DECOMPOSE))),
        list(_levels(_of_stage(space, Stage.SPARSIFY))),
        alone,
    )
    whole = [{p.name: i} for p in _network(space) for i in range(1, p.highest + 1)]
    others = [indices for decision, indices in quantized.items() if indices != first]
    if not first:
        return _distinct([*shapes, *whole])
    quantized_shapes = [{**shape, **first} for shape in ({}, *shapes)]
    return _distinct([*quantized_shapes, *others, *_levels(pruned), *whole])


def _of_stage(space: Space, stage: Stage) -> list[Parameter]:
    own = [p for p in space.parameters if p.stage is stage and p.target != NETWORK]
    return [p for p in own if not p.drops]


def _network(space: Space) -> list[Parameter]:
    # What trains or prepares does nothing useful alone.
    return [p for p in space.parameters if p.target == NETWORK and p.stage is Stage.QUANTIZE]


def _everywhere(parameters: Sequence[Parameter]) -> dict[Decision, Indices]:
    """For every decision on offer: the values that take it wherever it may be taken."""
    found: dict[Decision, Indices] = {}
    for parameter in parameters:
        for index, decision in enumerate(parameter.decisions, 1):
            found.setdefault(decision, {})[parameter.name] = index
    return found


def _fastest_of_first_technique(found: dict[Decision, Indices]) -> Indices:
    """Of the decisions with the narrowest inputs, which decide the kernel, the mildest."""
    first = [d for d in found if d.technique == next(iter(found)).technique]
    if not first:
        return {}
    return found[min(first, key=lambda d: int(d.model_dump().get("activation_bits", 0)))]


def _levels(parameters: Sequence[Parameter]) -> Iterator[Indices]:
    highest = max((p.highest for p in parameters), default=0)
    for level in range(1, highest + 1):
        yield {p.name: min(level, p.highest) for p in parameters}


def _distinct(seeds: Sequence[Indices]) -> list[Indices]:
    return [seed for i, seed in enumerate(seeds) if seed and seed not in seeds[:i]]


def _interleave(*lists: list[Indices]) -> list[Indices]:
    longest = max(map(len, lists))
    return [each[i] for i in range(longest) for each in lists if i < len(each)]
