"""A sampler that changes a few parameters of a member of the front and keeps its cost."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, final

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial

from autocompress.search.samplers.archive import Archive
from autocompress.search.samplers.context import SamplerContext
from autocompress.search.samplers.moves import graded, uniform
from autocompress.search.samplers.offspring import Offspring
from autocompress.search.samplers.parents import Parents

# Times that a known plan is drawn again, as it was and then uniformly.
_REDRAWS = 16
# A front of fewer trials is no place to start from; seeds are mostly more.
_STARTUP_TRIALS = 8


@final
class MutationSampler(BaseSampler):
    """An evolutionary search in small steps along the Pareto front.

    A draw takes a member of the front of the finished trials (see `Parents`) and changes one to
    three parameters, or switches levels between as many pairs; 30 in 100 draws cross two
    neighbours on the front, 5 in 100 are graded: all levels below or above a random share. With a
    predicted cost, switches are led back to within 3 % of the parent's cost, and crosses to that
    of the parents' range; small changes are not, so that the search moves along the front. What
    was tried is redrawn. The first draw is uniform, the others up to eight completed trials are
    graded. Parameters that are no integers are drawn uniformly.

    Source: Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via
    Evolutionary Search", arXiv:2410.14649, 2024, section 3; made multi-objective here.

    A draw depends only on the seed and on the trials, as a set of values and figures: a trial
    that was interrupted and tried again later makes no difference, nor does a new sampler. One
    sampler serves one study, from one thread at a time; each trial is read once.

    Args:
        seed: 0 or more.
        context: hard limits, predicted cost and unordered parameters.
    """

    def __init__(self, seed: int, context: SamplerContext) -> None:
        self._seed = seed
        self._context = context
        self._search_space = IntersectionSearchSpace()
        self._archive: Archive | None = None
        self._parents: Parents | None = None
        # Number of a trial, and how many different values others had when it was drawn.
        self._counted: tuple[int, int] | None = None

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The integer parameters that all completed trials have, but for those of one value."""
        return {
            name: distribution
            for name, distribution in self._search_space.calculate(study).items()
            if isinstance(distribution, IntDistribution) and not distribution.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of all parameters of the search space, or nothing if it is empty."""
        space = {n: d for n, d in search_space.items() if isinstance(d, IntDistribution)}
        if not space:
            return {}
        archive = self._up_to_date(study, trial, space)
        if not archive.completed:
            return {}
        if self._parents is None or self._parents.front is not archive.front:
            self._parents = Parents(archive.front)
        rng = np.random.default_rng([self._seed, archive.tried, archive.completed])
        return self._new(archive, self._parents, rng)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A uniform value."""
        if self._counted is None or self._counted[0] != trial.number:
            others = study.get_trials(deepcopy=False)
            tried = {frozenset(t.params.items()) for t in others if t.number != trial.number}
            self._counted = trial.number, len(tried - {frozenset()})
        entropy = [self._seed, self._counted[1], zlib.crc32(param_name.encode())]
        state = np.random.SeedSequence(entropy).generate_state(1)
        return RandomSampler(seed=int(state[0])).sample_independent(
            study, trial, param_name, param_distribution
        )

    def reseed_rng(self) -> None:
        """Take a seed from the system, so that copies of the sampler draw differently."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])

    def _up_to_date(
        self, study: Study, trial: FrozenTrial, space: Mapping[str, IntDistribution]
    ) -> Archive:
        if self._archive is None or self._archive.space != space:
            self._archive = Archive(space, study.directions, self._context.constraints)
        self._archive.take(study.get_trials(deepcopy=False), trial.number)
        return self._archive

    def _new(self, archive: Archive, parents: Parents, rng: np.random.Generator) -> dict[str, int]:
        """Values that no trial has, unless next to nothing is left to try."""
        offspring = Offspring(archive.space, self._context)
        few = archive.completed < _STARTUP_TRIALS
        for attempt in range(2 * _REDRAWS):
            if attempt >= _REDRAWS:
                levels = uniform(offspring.ranges, rng)
            else:
                levels = graded(offspring.ranges, rng) if few else offspring.draw(parents, rng)
            if not archive.is_known(levels):
                break
        return offspring.values(levels)
