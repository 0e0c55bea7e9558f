"""How the next trial is chosen: Optuna's samplers, and one of our own."""

from __future__ import annotations

import warnings
from typing import Literal

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)

from autocompress.errors import ConfigError
from autocompress.search.samplers.context import SamplerContext
from autocompress.search.samplers.mutation import MutationSampler

SamplerName = Literal["tpe", "nsga2", "nsga3", "gp", "random", "mutation"]

__all__ = ["MutationSampler", "SamplerContext", "SamplerName", "make_sampler"]

# Seeds are there before the first draw, so that models need few uniform draws.
_STARTUP_TRIALS = 8


def make_sampler(name: SamplerName, seed: int, context: SamplerContext) -> BaseSampler:
    """A sampler for integer parameters and one or more objectives.

    "random" knows no constraints. "mutation" alone uses the predicted cost; it reads each trial
    once, so one object should serve a whole study, and its draws agree after a resume by
    themselves. The others carry a random state: give a new one a new seed.

    Args:
        seed: 0 to 2**32 - 1.

    Raises:
        ConfigError: there is no such sampler.
    """
    limits = context.constraints
    with warnings.catch_warnings():
        # Optuna 5.0 has deprecated `constraints_func`; 4.6 has nothing else.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "tpe":
            return TPESampler(
                seed=seed,
                n_startup_trials=_STARTUP_TRIALS,
                multivariate=True,
                constraints_func=limits,
            )
        if name == "nsga2":
            return NSGAIISampler(seed=seed, constraints_func=limits)
        if name == "nsga3":
            return NSGAIIISampler(seed=seed, constraints_func=limits)
        if name == "gp":
            return GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS, constraints_func=limits)
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "mutation":
        return MutationSampler(seed, context)
    raise ConfigError(
        "There is no such sampler.", given=name, allowed="tpe, nsga2, nsga3, gp, random, mutation"
    )
