"""The plans that every study begins with: each technique at one strength all over the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autocompress.search.space import Parameter, Space
from autocompress.techniques.technique import GroupTechnique, Stage

Indices = dict[str, int]

_FEW_GROUPS = 12


def uniform_seeds(space: Space) -> list[Indices]:
    """Parameter values of the starting plans, the most telling first; none twice.

    With the strongest quantization: pruning and decomposition at every level all over the network,
    pruning also of uncoupled groups only, which costs less accuracy for the same speed, and, where
    there are few groups, of each group alone at its mildest. Without it: pruning at every level.
    """
    quantized = _at_level(_of_stage(space, Stage.QUANTIZE), 99)
    pruned = _of_stage(space, Stage.PRUNE)
    inner = [p for p in pruned if isinstance(p.technique, GroupTechnique) and "+" not in p.target]
    alone = [{p.name: 1} for p in pruned] if len(pruned) <= _FEW_GROUPS else []
    shapes: list[Indices] = _interleave(
        list(_levels(inner)),
        list(_levels(pruned)),
        list(_levels(_of_stage(space, Stage.DECOMPOSE))),
        alone,
    )
    if not quantized:
        return _distinct(shapes)
    return _distinct([{**shape, **quantized} for shape in ({}, *shapes)] + list(_levels(pruned)))


def _of_stage(space: Space, stage: Stage) -> list[Parameter]:
    return [p for p in space.parameters if p.technique.stage is stage]


def _levels(parameters: Sequence[Parameter]) -> Iterator[Indices]:
    highest = max((p.highest for p in parameters), default=0)
    for level in range(1, highest + 1):
        yield _at_level(parameters, level)


def _at_level(parameters: Sequence[Parameter], level: int) -> Indices:
    return {p.name: min(level, p.highest) for p in parameters}


def _distinct(seeds: Sequence[Indices]) -> list[Indices]:
    return [seed for i, seed in enumerate(seeds) if seed not in seeds[:i]]


def _interleave(*lists: list[Indices]) -> list[Indices]:
    longest = max(map(len, lists))
    return [each[i] for i in range(longest) for each in lists if i < len(each)]
