"""The plans that every study begins with: each technique at one strength all over the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autocompress.search.space import Parameter, Space
from autocompress.techniques.technique import GroupTechnique, Stage

Indices = dict[str, int]


def uniform_seeds(space: Space) -> list[Indices]:
    """Parameter values of the starting plans, the most telling first; none twice.

    Pruning and decomposition at every level, with and without the strongest quantization; pruning
    also of uncoupled groups only, which costs less accuracy for the same speed.
    """
    quantized = _at_level(_of_stage(space, Stage.QUANTIZE), 99)
    pruned = _of_stage(space, Stage.PRUNE)
    inner = [p for p in pruned if isinstance(p.technique, GroupTechnique) and "+" not in p.target]
    shapes: list[Indices] = [{}]
    shapes += _interleave(
        list(_levels(inner)),
        list(_levels(pruned)),
        list(_levels(_of_stage(space, Stage.DECOMPOSE))),
    )
    seeds: list[Indices] = []
    for integers in [quantized, {}] if quantized else [{}]:
        for shape in shapes:
            seed = {**shape, **integers}
            if seed and seed not in seeds:
                seeds.append(seed)
    return seeds


def _of_stage(space: Space, stage: Stage) -> list[Parameter]:
    return [p for p in space.parameters if p.technique.stage is stage]


def _levels(parameters: Sequence[Parameter]) -> Iterator[Indices]:
    highest = max((p.highest for p in parameters), default=0)
    for level in range(1, highest + 1):
        yield _at_level(parameters, level)


def _at_level(parameters: Sequence[Parameter], level: int) -> Indices:
    return {p.name: min(level, p.highest) for p in parameters}


def _interleave(*lists: list[Indices]) -> list[Indices]:
    longest = max(map(len, lists))
    return [each[i] for i in range(longest) for each in lists if i < len(each)]
