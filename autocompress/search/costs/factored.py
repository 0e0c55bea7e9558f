"""Functions of a plan that are sums of terms, each of which depends on few parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Indices = Mapping[str, int]


@final
@dataclass(frozen=True, eq=False)
class Factor:
    """One term: a table over some parameters of a search space.

    Attributes:
        name: what the term stands for, such as a layer.
        parameters: names of parameters, each once.
        values: one axis per parameter, of its `highest + 1` entries; float64, in the sum's unit.
    """

    name: str
    parameters: tuple[str, ...]
    values: NDArray[np.float64]

    def at(self, indices: Indices) -> float:
        """The term for some values of the parameters; those that are not named are 0."""
        return float(self.values[tuple(indices.get(name, 0) for name in self.parameters)])


@final
@dataclass(frozen=True, eq=False)
class FactoredSum:
    """A constant and some terms, such as what a run takes before it computes and its layers."""

    constant: float
    factors: tuple[Factor, ...]

    def value(self, indices: Indices) -> float:
        """The sum for some values of the parameters; those that are not named are 0."""
        return self.constant + sum(factor.at(indices) for factor in self.factors)

    def terms(self, indices: Indices) -> NDArray[np.float64]:
        """The terms without the constant, shape (factors,)."""
        return np.array([factor.at(indices) for factor in self.factors])

    def scaled(self, scales: Sequence[float], constant: float) -> FactoredSum:
        """Every term times its scale, and another constant."""
        factors = [
            Factor(f.name, f.parameters, f.values * scale)
            for f, scale in zip(self.factors, scales, strict=True)
        ]
        return FactoredSum(constant, tuple(factors))
