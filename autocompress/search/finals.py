"""The last judgement: which of the front's members are measured again, on data never seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autocompress.config import Objective
from autocompress.evaluation import Evaluation
from autocompress.pareto import hypervolume
from autocompress.search.front import MAXIMISE, front_mask, metric_scale, objective_values
from autocompress.search.steadied import steadied

# Shares of the original's metric: most users stop at the first; past the second nothing is left.
_USEFUL_LOSS = 0.05
_LARGEST_LOSS = 0.20
_MARGIN = 1.05


def choose_finalists(
    evaluations: Sequence[Evaluation],
    original: Evaluation,
    objectives: Sequence[Objective],
    count: int,
    rival: Evaluation | None = None,
) -> list[Evaluation]:
    """The members of the front that cover its useful part best, the most important first.

    The metrics that choose are steadied (see `steadied`): on few samples a front is mostly luck.
    Greedy: each adds the most hypervolume to those before it (Guerreiro et al. 2016: at least
    1 - 1/e of the best subset), with the reference point 5 % below the original's metric and a
    little worse in the rest. Up to a quarter of the places goes to points off the front that beat
    the rival in every objective, the best metric first: the front keeps the luckiest of nearly
    equal points, and on new data another of them may be the one that really beats the rival.

    Places that are left go to points in the useful part that would be on the front if their metric
    were a standard error higher, then to the members with the best metric, down to 20 % below the
    original's. If every member has lost more, the best one is judged alone.

    Args:
        original: the original network on the search split.
        rival: the stock tool's point on the search split, if there is one.
    """
    measured = {e.candidate: e for e in evaluations}
    every = steadied([*evaluations, *([rival] if rival else [])], original)
    points = every[: len(evaluations)]
    rival = every[-1] if rival else None
    mask = front_mask(points, objectives)
    members = [e for e, on in zip(points, mask, strict=True) if on]
    members.sort(key=lambda e: -e.metric.value)
    level = original.metric.value
    scale = metric_scale(original, points)
    alive = [e for e in members if e.metric.value >= level - _LARGEST_LOSS * scale]
    off = [e for e, on in zip(points, mask, strict=True) if not on]
    contenders = _better_than(rival, off, objectives)[: count // 4] if rival else []
    least = level - _USEFUL_LOSS * scale
    goal = _reference(original, objectives, least), objectives
    found = _greedy_cover(alive, goal, count - len(contenders))
    found += contenders
    useful = [e for e in off if e.metric.value >= least]
    others = [e for e in useful if e not in found and _may_be_better(e, members, objectives)]
    found += _greedy_cover(others, goal, count - len(found))
    found += [e for e in (*others, *alive) if e not in found][: count - len(found)]
    return [measured[e.candidate] for e in found or members[:1]]


def _may_be_better(
    evaluation: Evaluation, front: Sequence[Evaluation], objectives: Sequence[Objective]
) -> bool:
    """Whether a point would be on the front with a metric that is a standard error higher."""
    metric = evaluation.metric
    if not metric.standard_error > 0:
        return False
    higher = replace(metric, value=metric.value + metric.standard_error)
    lucky = replace(evaluation, metric=higher)
    return bool(front_mask([*front, lucky], objectives)[-1])


def _better_than(
    rival: Evaluation, evaluations: Sequence[Evaluation], objectives: Sequence[Objective]
) -> list[Evaluation]:
    """Those that are no worse in any objective and better in one, by metric."""
    sign = np.array([1.0 if MAXIMISE[name] else -1.0 for name in objectives])
    level = sign * np.array(objective_values(rival, objectives))

    def beats(evaluation: Evaluation) -> bool:
        gain = sign * np.array(objective_values(evaluation, objectives)) - level
        return bool((gain >= 0).all() and (gain > 0).any())

    return sorted(filter(beats, evaluations), key=lambda e: -e.metric.value)


def _reference(
    original: Evaluation, objectives: Sequence[Objective], least: float
) -> NDArray[np.float64]:
    """The reference point of hypervolumes, whose metric is the least useful one."""
    pairs = zip(objectives, objective_values(original, objectives), strict=True)
    return np.array([least if MAXIMISE[name] else value * _MARGIN for name, value in pairs])


def _greedy_cover(
    members: Sequence[Evaluation],
    goal: tuple[NDArray[np.float64], Sequence[Objective]],
    count: int,
) -> list[Evaluation]:
    reference, objectives = goal
    maximise = [MAXIMISE[name] for name in objectives]
    values = [objective_values(e, objectives) for e in members]
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < min(count, len(members)):
        gains = {
            i: hypervolume(
                np.array([values[j] for j in (*chosen, i)]), reference, maximise=maximise
            )
            for i in range(len(members))
            if i not in chosen
        }
        index = max(gains, key=lambda i: gains[i])
        if gains[index] <= best:
            break
        best = gains[index]
        chosen.append(index)
    return [members[i] for i in chosen]
