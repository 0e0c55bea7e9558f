"""Better plans for one budget by a search over the weights of the losses that are summed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import SearchError
from autocompress.search.costs.factored import FactoredSum
from autocompress.search.seeding.lagrangian import Lagrangian

PlanKey = tuple[tuple[str, int], ...]


def plan_key(indices: Mapping[str, int]) -> PlanKey:
    """The parameters that are not 0, by name: equal for equal plans."""
    return tuple(sorted((name, int(index)) for name, index in indices.items() if index))


@final
@dataclass(frozen=True)
class RefineSettings:
    """How long and how widely to search.

    Attributes:
        tries: how many vectors of coefficients, the one of all ones included.
        first_share: share of the coefficients that the first try draws anew; it falls
            geometrically to a single one at the last try.
        widest: coefficients are drawn log-uniformly between 1 / widest and widest.
        seed: of the generator.
    """

    tries: int = 200
    first_share: float = 0.5
    widest: float = 10.0
    seed: int = 0


@final
@dataclass(frozen=True, eq=False)
class Refined:
    """The best plan of a search.

    Attributes:
        indices: the value of every parameter.
        score: its score.
        scores: the score of every try's plan, in order.
        coefficients: the weights of the loss factors that gave the plan; shape (factors,).
    """

    indices: dict[str, int]
    score: float
    scores: tuple[float, ...]
    coefficients: NDArray[np.float64]


@final
@dataclass(frozen=True, eq=False)
class Scorer:
    """What plans are really worth.

    Attributes:
        score: the loss of a plan; dear, never called twice for one plan.
        known: scores so far, by `plan_key`; new ones are added as soon as they are known, so that
            a mapping that is kept on disk lets an interrupted search go on.
        stop: whether to stop now; asked before every call of `score` but a search's first.
    """

    score: Callable[[Mapping[str, int]], float]
    known: MutableMapping[PlanKey, float]
    stop: Callable[[], bool] = lambda: False


def refine(
    loss: FactoredSum, cost: FactoredSum, budget: float, scorer: Scorer, settings: RefineSettings
) -> Refined:
    """Searches the coefficients of the loss factors whose plan for a budget scores best.

    Summed losses miss how layers act together. As SPDY does (Frantar and Alistarh, 2022, section
    3.2), each loss factor gets a coefficient, the sum's best plan within the budget is found for
    some coefficients, and its real score decides whether they are kept: a local random search
    that starts at ones and draws fewer coefficients anew from try to try. Instead of the paper's
    first 100 uniform draws, the early tries draw a large share.

    The same seed gives the same search, bit for bit, wherever it was interrupted, if `known` is
    kept: scores that it holds are not computed again.

    Raises:
        SearchError: no plan is within the budget.
        ConfigError: tables that contradict each other or are not finite.
    """
    generator = np.random.default_rng(settings.seed)
    plain = Lagrangian(loss, cost)
    first = plain.solve(budget)
    if not first.feasible:
        raise SearchError(
            "No plan is within the budget.",
            given=f"{budget:.6g}",
            allowed=f"at least {first.cost:.6g}, the cheapest plan's cost",
            advice="raise the budget, or add stronger choices to the search space",
        )
    coefficients = np.ones(len(loss.factors))
    best = Refined(first.indices, _scored(first.indices, scorer), (), coefficients)
    scores = [best.score]
    for attempt in range(1, settings.tries):
        drawn = _redrawn(best.coefficients, attempt, settings, generator)
        indices = plain.reweighted(drawn.tolist()).solve(budget).indices
        if plan_key(indices) not in scorer.known and scorer.stop():
            break
        scores.append(_scored(indices, scorer))
        if scores[-1] < best.score:
            best = Refined(indices, scores[-1], (), drawn)
    return Refined(best.indices, best.score, tuple(scores), best.coefficients)


def _scored(indices: dict[str, int], scorer: Scorer) -> float:
    key = plan_key(indices)
    if key not in scorer.known:
        scorer.known[key] = float(scorer.score(indices))
    return scorer.known[key]


def _redrawn(
    coefficients: NDArray[np.float64],
    attempt: int,
    settings: RefineSettings,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Some coefficients drawn anew, the fewer the later the attempt (from 1 on)."""
    count = len(coefficients)
    most = max(1.0, settings.first_share * count)
    done = (attempt - 1) / max(1, settings.tries - 2)
    which = generator.choice(count, size=round(most ** (1 - done)), replace=False)
    reach = math.log(settings.widest)
    drawn: NDArray[np.float64] = coefficients.copy()
    drawn[which] = np.exp(generator.uniform(-reach, reach, size=len(which)))
    return drawn
