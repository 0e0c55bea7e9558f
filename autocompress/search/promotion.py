"""Which of the judged plans is measured next: the one that is expected to add most to the front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.config import Objective
from autocompress.evaluation import Evaluation
from autocompress.pareto import hypervolume, non_dominated
from autocompress.search.front import MAXIMISE, metric_scale, objective_values
from autocompress.search.judge import Interval, Judgement, is_dominated
from autocompress.search.study import Proposal

# A share of the original's metric; what loses more is no use to anybody.
_WORST_METRIC = 0.25
_WORST_COST = 1.05
_TINY = 1e-12
# Further down than any point within the limits.
_OUTSIDE = 100.0


@final
@dataclass(frozen=True)
class Judged:
    """A proposal that may be measured."""

    proposal: Proposal
    judgement: Judgement


@final
class FrontGain:
    """How much hypervolume estimated points would add to a front.

    Of the metric's loss, as a share of a quarter of the original's metric, the root counts: the
    first half point matters as much as the next one and a half. Of costs the logarithm counts:
    twice as fast is worth the same wherever one starts.

    Args:
        original: the original network on the search split.
        excess: by how much estimates are expected to miss hard limits; 0 for those within them.
    """

    def __init__(
        self,
        measured: Sequence[Evaluation],
        original: Evaluation,
        objectives: Sequence[Objective],
        excess: Callable[[Mapping[Objective, Interval]], float] = lambda estimates: 0.0,
    ) -> None:
        self._excess = excess
        self._objectives = tuple(objectives)
        self._base = np.array(objective_values(original, objectives))
        self._scale = metric_scale(original, measured)
        values = [objective_values(e, objectives) for e in measured]
        costs = self._costs(np.array(values).reshape(-1, len(objectives)))
        keep = non_dominated(costs, maximise=[False] * len(objectives))
        self._front = costs[keep]
        self._volume = self._measure(self._front)

    def of(self, values: Sequence[float]) -> float:
        """The gain of a point in the objectives' own units; unknown values are the original's.

        Below zero for a point that adds nothing: by how much all its scaled values would have to
        fall for that (the additive epsilon indicator, Zitzler et al. 2003).
        """
        point = np.array(values, dtype=np.float64)
        cost = self._costs(np.where(np.isfinite(point), point, self._base)[None])
        gain = self._measure(np.concatenate([self._front, cost])) - self._volume
        if gain > 0 or not len(self._front):
            return gain
        return -float((cost - self._front).min(axis=1).max())

    def of_estimates(self, estimates: Mapping[Objective, Interval]) -> float:
        """The gain of a point that is estimated; see `of`.

        Points outside the hard limits come after all others, the nearest ones first.
        """
        excess = self._excess(estimates)
        if excess > 0:
            return -_OUTSIDE - excess
        names = self._objectives
        return self.of([estimates[n].value if n in estimates else math.nan for n in names])

    def _costs(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        columns = []
        for column, base, name in zip(values.T, self._base, self._objectives, strict=True):
            if MAXIMISE[name]:
                lost = (base - column) / (_WORST_METRIC * self._scale)
                columns.append(np.sign(lost) * np.sqrt(np.abs(lost)))
            else:
                columns.append(np.log(np.maximum(column, _TINY) / max(base, _TINY)))
        return np.stack(columns, axis=1)

    def _measure(self, costs: NDArray[np.float64]) -> float:
        reference = [1.0 if MAXIMISE[n] else math.log(_WORST_COST) for n in self._objectives]
        return hypervolume(costs, reference, maximise=[False] * len(self._objectives))


@final
class Pool:
    """Judged plans that wait; the least promising ones leave when it is full.

    Args:
        size: how many may wait.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: list[Judged] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Judged]:
        return iter(self._waiting)

    def add(self, judged: Judged) -> None:
        """Let a plan wait."""
        self._waiting.append(judged)

    def take(
        self,
        gain: FrontGain,
        measured: Sequence[Evaluation],
        objectives: Sequence[Objective],
        *,
        anything: bool,
    ) -> tuple[Judged | None, list[Judged]]:
        """The plan with the largest expected gain, and those that have no place any more.

        Those leave that are now dominated beyond doubt.

        Args:
            gain: of the present front.
            measured: points that must not dominate a plan.
            anything: take the first also if it promises no gain.
        """
        alive: list[Judged] = []
        gone: list[Judged] = []
        for judged in self._waiting:
            lost = is_dominated(judged.judgement.estimates, measured, objectives)
            (gone if lost else alive).append(judged)
        gains = [gain.of_estimates(judged.judgement.estimates) for judged in alive]
        order = sorted(range(len(alive)), key=lambda i: -gains[i])
        taken = alive[order[0]] if order and (anything or gains[order[0]] > 0) else None
        rest = [alive[i] for i in order if alive[i] is not taken]
        self._waiting, dropped = rest[: self._size], rest[self._size :]
        return taken, [*gone, *dropped]

    def clear(self) -> list[Judged]:
        """Let all go."""
        gone, self._waiting = self._waiting, []
        return gone
