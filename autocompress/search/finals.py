"""The last judgement: the front's members measured again, on data the search never saw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress.config import Objective
from autocompress.evaluate import Evaluation
from autocompress.pareto import hypervolume
from autocompress.search.front import MAXIMISE, front_mask, objective_values

# Points that lose more than this share of the original's metric are ruined, not compressed.
_LARGEST_LOSS = 0.10
_MARGIN = 1.05


def choose_finalists(
    evaluations: Sequence[Evaluation],
    original: Evaluation,
    objectives: Sequence[Objective],
    count: int,
) -> list[Evaluation]:
    """The members of the front that cover it best, the most important first.

    Greedy: each adds the most hypervolume to those before it (Guerreiro et al. 2016: at least
    1 - 1/e of the best subset). The reference point is the original network, 10 % of its metric
    below and a little worse in the rest, so ruined points are left out while there are others.
    """
    mask = front_mask(evaluations, objectives)
    members = [e for e, on in zip(evaluations, mask, strict=True) if on]
    if len(members) <= 1:
        return members
    values = np.array([objective_values(e, objectives) for e in members])
    base = objective_values(original, objectives)
    reference = [
        value - _LARGEST_LOSS * abs(value) if MAXIMISE[name] else value * _MARGIN
        for name, value in zip(objectives, base, strict=True)
    ]
    maximise = [MAXIMISE[name] for name in objectives]
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < min(count, len(members)):
        gains = {
            i: hypervolume(values[[*chosen, i]], np.array(reference), maximise=maximise)
            for i in range(len(members))
            if i not in chosen
        }
        index = max(gains, key=lambda i: gains[i])
        if chosen and gains[index] <= best:
            break
        best = gains[index]
        chosen.append(index)
    return [members[i] for i in chosen]
