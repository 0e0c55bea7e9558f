"""The trials of a study as arrays, taken in as they finish: what was tried, and the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.pareto import non_dominated
from autocompress.search.samplers.context import Constraints
from autocompress.search.samplers.moves import Levels

Values = NDArray[np.float64]
Key = tuple[int, ...]


@final
@dataclass(frozen=True, eq=False)
class Members:
    """Trials on the front, by number.

    Attributes:
        numbers: the trials' numbers, shape (members,).
        levels: 0 to the highest of each parameter, shape (members, parameters).
        costs: objectives, all to be minimised, shape (members, objectives).
        violations: sum of what exceeds the limits, 0 if none does, shape (members,).
    """

    numbers: NDArray[np.int64]
    levels: Levels
    costs: Values
    violations: Values


@final
class Archive:
    """Trials of one study over one search space; each finished trial is read once.

    The front is that of the objectives and, as one more of them, the violation of the limits: no
    trial beyond a limit can so dominate one within, and within the limits it is the usual front.
    It doesn't depend on the order in which trials were taken in.

    Args:
        space: parameters in the order of the arrays' columns.
        directions: of the objectives.
        constraints: limits, see `SamplerContext`.
    """

    def __init__(
        self,
        space: Mapping[str, IntDistribution],
        directions: Sequence[StudyDirection],
        constraints: Constraints | None,
    ) -> None:
        self.space = dict(space)
        self.front = Members(
            np.zeros(0, np.int64),
            np.zeros((0, len(space)), np.int64),
            np.zeros((0, len(directions))),
            np.zeros(0),
        )
        self.completed = 0
        self._signs = np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions])
        self._constraints = constraints
        self._tried: set[Key] = set()
        self._running: set[Key] = set()
        self._finished: set[int] = set()
        # Every trial before this number is taken in.
        self._first_open = 0

    @property
    def tried(self) -> int:
        """How many different values of the parameters were tried or are being tried."""
        return len(self._tried) + len(self._running - self._tried)

    def is_known(self, levels: Levels) -> bool:
        """Whether a trial has these levels, however it ended; shape (parameters,)."""
        key = tuple(levels.tolist())
        return key in self._tried or key in self._running

    def take(self, trials: Sequence[FrozenTrial], current: int) -> None:
        """Take in what has finished since the last call.

        Args:
            trials: all of the study's, by number.
            current: number of the trial that is being drawn, which counts as untried.
        """
        first_open = trials[-1].number + 1 if trials else 0
        complete: list[FrozenTrial] = []
        self._running.clear()
        for trial in reversed(trials):
            if trial.number < self._first_open:
                break
            if not trial.state.is_finished():
                first_open = trial.number
                if trial.number != current and self._covers(trial):
                    self._running.add(self._key(trial))
            elif trial.number not in self._finished:
                self._finished.add(trial.number)
                if self._covers(trial):
                    self._tried.add(self._key(trial))
                    if trial.state == TrialState.COMPLETE:
                        complete.append(trial)
        self._first_open = first_open
        if complete:
            self.completed += len(complete)
            self._advance(complete)

    def _advance(self, complete: Sequence[FrozenTrial]) -> None:
        """The front of the old front and some more trials."""
        old = self.front
        numbers = np.append(old.numbers, [t.number for t in complete])
        levels = np.concatenate([old.levels, np.array([self._key(t) for t in complete])])
        fresh = self._signs * np.array([t.values for t in complete])
        costs = np.concatenate([old.costs, fresh])
        violations = np.append(old.violations, [self._violation(t) for t in complete])
        points = np.column_stack([costs, violations])
        kept = np.flatnonzero(non_dominated(points, maximise=[False] * points.shape[1]))
        kept = kept[np.argsort(numbers[kept])]
        self.front = Members(numbers[kept], levels[kept], costs[kept], violations[kept])

    def _violation(self, trial: FrozenTrial) -> float:
        if self._constraints is None:
            return 0.0
        return float(sum(max(0.0, excess) for excess in self._constraints(trial)))

    def _covers(self, trial: FrozenTrial) -> bool:
        """Whether a trial has all parameters; one that was killed while drawn may lack some."""
        return self.space.keys() <= trial.params.keys()

    def _key(self, trial: FrozenTrial) -> Key:
        values = trial.params
        # Values that were enqueued may lie outside.
        return tuple(
            (min(max(int(values[name]), d.low), d.high) - d.low) // d.step
            for name, d in self.space.items()
        )
