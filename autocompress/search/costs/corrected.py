"""A predicted cost that learns from measured plans which of its terms are too high or too low."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

from autocompress.errors import MeasurementError
from autocompress.search.costs.factored import FactoredSum, Indices

_Array = NDArray[np.float64]
_EXACT_ROWS = 256  # up to here each observation has its own leverage
_ROUNDS = 4  # of error and posterior in turn; they change by less than a percent after three
_PRIOR_ROWS = 4.0  # how many observations the error that was given counts for


@final
@dataclass(frozen=True)
class CorrectionSettings:
    """What is believed of a predicted cost before anything is measured.

    Attributes:
        scale_sd: standard deviation of each term's own scale, around 1.
        common_sd: standard deviation of a scale that all terms share, added to their own.
        constant_sd: of the constant, in the cost's unit; None: a quarter of the constant and 2 %
            of the unchanged plan's cost.
        noise: standard deviation of a measured value, as a share of it.
        least_error: share of a value that a prediction is never surer than.
        least_scale: corrected scales are not below it.
    """

    scale_sd: float = 0.25
    common_sd: float = 0.1
    constant_sd: float | None = None
    noise: float = 0.01
    least_error: float = 0.01
    least_scale: float = 0.1


@final
@dataclass(frozen=True, eq=False)
class _Posterior:
    """Of the whitened coefficients; `factor` is the precision's Cholesky factor, lower."""

    mean: _Array
    factor: _Array
    error: float  # noise and model error together, as a share of a value


@final
class CorrectedCost:
    """Bayesian linear regression of measured costs on the terms of a predicted one.

    value(plan) = constant + sum of scale_f * prior_f(plan), with independent normal priors of the
    constant, of the scales and of a common part of these (Bishop, 2006, section 3.3). A measured
    value misses this by noise and model error, a share of the value whose size is estimated from
    leave-one-out residuals. The order of observations does not matter but for rounding.

    An observation updates sufficient statistics, in O(terms²); the first prediction after it
    takes O(terms³), however many observations there are.
    """

    def __init__(
        self, prior: FactoredSum, settings: CorrectionSettings = CorrectionSettings()
    ) -> None:
        self._prior = prior
        self._settings = settings
        sd = settings.constant_sd
        if sd is None:
            sd = 0.25 * abs(prior.constant) + 0.02 * abs(prior.value({}))
        self._constant_sd = sd
        size = len(prior.factors) + 2
        self._gram = np.zeros((size, size))
        self._moment = np.zeros(size)
        self._square = 0.0
        self._count = 0
        self._rows: list[_Array] = []
        self._targets: list[float] = []
        self._posterior: _Posterior | None = None

    @property
    def observations(self) -> int:
        """How many values were observed."""
        return self._count

    @property
    def error(self) -> float:
        """Noise and model error together as a share of a value, as estimated so far."""
        return self._fitted().error

    def observe(self, indices: Indices, value: float) -> None:
        """Learns from a plan's measured value, in the cost's unit.

        Raises:
            MeasurementError: a value that is not positive and finite.
        """
        if not (math.isfinite(value) and value > 0):
            raise MeasurementError(
                "A measured cost cannot be learnt from.", given=value, allowed="a positive number"
            )
        predicted, features = self._features(indices)
        row, target = features / value, 1.0 - predicted / value
        self._gram += np.outer(row, row)
        self._moment += row * target
        self._square += target * target
        self._count += 1
        if self._count <= _EXACT_ROWS:
            self._rows.append(row)
            self._targets.append(target)
        self._posterior = None

    def predict(self, indices: Indices) -> tuple[float, float]:
        """The mean and standard deviation of a plan's next measured value."""
        posterior = self._fitted()
        predicted, features = self._features(indices)
        mean = predicted + float(features @ posterior.mean)
        spread = solve_triangular(posterior.factor, features, lower=True)
        return mean, math.hypot(float(np.linalg.norm(spread)), posterior.error * mean)

    def corrected(self) -> FactoredSum:
        """The prior with the posterior mean's scales and constant, kept positive."""
        mean = self._fitted().mean
        settings = self._settings
        scales = 1.0 + settings.common_sd * mean[1] + settings.scale_sd * mean[2:]
        constant = self._prior.constant + self._constant_sd * float(mean[0])
        if self._prior.constant >= 0:
            constant = max(constant, 0.0)
        return self._prior.scaled(np.maximum(scales, settings.least_scale).tolist(), constant)

    def _features(self, indices: Indices) -> tuple[float, _Array]:
        """The prior's value, and the slopes along coefficients with standard normal priors."""
        terms = self._prior.terms(indices)
        total = float(terms.sum())
        head = [self._constant_sd, self._settings.common_sd * total]
        return self._prior.constant + total, np.append(head, self._settings.scale_sd * terms)

    def _fitted(self) -> _Posterior:
        if self._posterior is None:
            least = max(self._settings.noise, self._settings.least_error)
            posterior = self._given_error(least)
            for _ in range(_ROUNDS if self._count else 0):
                squares = self._unseen_squares(posterior)
                total = _PRIOR_ROWS * least**2 + squares
                error = math.sqrt(total / (_PRIOR_ROWS + self._count))
                posterior = self._given_error(max(error, least))
            self._posterior = posterior
        return self._posterior

    def _given_error(self, error: float) -> _Posterior:
        precision = np.eye(len(self._moment)) + self._gram / error**2
        factor = cholesky(precision, lower=True)
        mean = cho_solve((factor, True), self._moment / error**2)
        return _Posterior(np.asarray(mean), np.asarray(factor), error)

    def _unseen_squares(self, posterior: _Posterior) -> float:
        """The sum of squared errors that unseen values would have, noise and model error alone.

        The residual of observation i when it is left out is e_i / (1 - h_i), with residual e_i
        and leverage h_i; its variance is error² / (1 - h_i) (Cook and Weisberg, 1982, section
        2.2). So e_i² / (1 - h_i) estimates error². Many observations share the mean leverage, as
        in generalized cross-validation (Golub, Heath and Wahba, 1979).
        """
        mean, variance = posterior.mean, posterior.error**2
        if self._count <= _EXACT_ROWS:
            rows = np.array(self._rows)
            residuals = np.array(self._targets) - rows @ mean
            spread = solve_triangular(posterior.factor, rows.T, lower=True)
            leverages = (spread**2).sum(axis=0) / variance
            return float((residuals**2 / (1.0 - leverages)).sum())
        squares = self._square - 2.0 * mean @ self._moment + mean @ self._gram @ mean
        inverse = solve_triangular(posterior.factor, np.eye(len(mean)), lower=True)
        used = len(mean) - float((inverse**2).sum())
        return max(float(squares), 0.0) / (1.0 - used / self._count)
