"""A multiple-choice knapsack with shared choices and several budgets, as a linear program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from autocompress.errors import SearchError
from autocompress.search.costs.factored import FactoredSum
from autocompress.search.seeding.elimination import Eliminator

_Array = NDArray[np.float64]
_SPAN = 1e3  # of each sum's coefficients together; the solver's tolerances are about 1e-6
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2  # statuses of scipy.optimize.milp


@final
@dataclass(frozen=True, eq=False)
class _Table:
    """The entries of one table that may be in an optimal plan; `first` is its first variable."""

    first: int
    values: NDArray[np.intp]  # (entries, parameters of the scope)
    sums: _Array  # (sums, entries)


@final
@dataclass(frozen=True)
class Found:
    """A plan, with a value that no plan's objective is below."""

    indices: dict[str, int]
    bound: float
    proven: bool


@final
class Program:
    """The linear program but for the budgets: a variable per value or table entry, 0 or 1.

    The objective is the first sum, the others have budgets. Sinha and Zoltners (1979) for the
    knapsack; tables over several parameters have joint variables with equal marginals.

    Args:
        sums: over the same space.
        structure: made from `sums`.
        kept: which entries of the structure's tables may be used, shape (structure.size,).
    """

    def __init__(
        self, sums: Sequence[FactoredSum], structure: Eliminator, kept: NDArray[np.bool_]
    ) -> None:
        self._structure = structure
        self._constants = np.array([terms.constant for terms in sums])
        scopes, sizes = structure.scopes, structure.sizes
        uses = np.bincount([p for s in scopes for p in s], minlength=len(sizes))
        self._offset: dict[int, int] = {}  # of the parameters that several tables share
        count = 0
        for p in np.flatnonzero(uses > 1).tolist():
            self._offset[p] = count
            count += sizes[p]
        flats = np.stack([structure.flat(terms) for terms in sums])
        self._tables: list[_Table] = []
        for i in range(len(scopes)):
            self._tables.append(self._reduced(i, flats, kept, count))
            count += len(self._tables[-1].values)
        self._count = count
        self._matrix, self._right = self._equations()
        weights = self._weights(len(sums))
        spans = np.abs(weights).sum(axis=1)
        self._scale = np.where(spans > 0, spans / _SPAN, 1.0)
        self._weights_scaled = weights / self._scale[:, None]

    def prices(self, budgets: Sequence[float], time_limit_s: float) -> _Array | None:
        """What the objective saves per unit of each budget in the relaxed program; (budgets,).

        None if even that has no solution, or none in time.
        """
        limits, finite = self._limits(budgets)
        # The type stubs of `linprog` know no sparse matrices.
        rows: Any = sparse.csr_array(self._weights_scaled[1:][finite])
        equations: Any = self._matrix
        result = linprog(
            self._weights_scaled[0],
            A_ub=rows,
            b_ub=limits[finite],
            A_eq=equations,
            b_eq=self._right,
            bounds=(0, 1),
            options={"time_limit": time_limit_s},
        )
        if result.status != _OPTIMAL:
            return None
        found = np.zeros(len(limits))
        found[finite] = np.maximum(-result.ineqlin.marginals, 0.0)
        return np.asarray(found * self._scale[0] / self._scale[1:])

    def solve(
        self, budgets: Sequence[float], time_limit_s: float, objective: int = 0
    ) -> Found | None:
        """The plan with the least of one sum; None if the solver found none."""
        limits, finite = self._limits(budgets)
        constraints = [LinearConstraint(self._matrix, self._right, self._right)]
        if finite.any():
            rows = sparse.csr_array(self._weights_scaled[1:][finite])
            constraints.append(LinearConstraint(rows, -np.inf, limits[finite]))
        result = milp(
            self._weights_scaled[objective],
            integrality=np.ones(self._count, dtype=np.intp),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
        )
        if result.status not in (_OPTIMAL, _LIMIT, _INFEASIBLE):
            raise SearchError("The solver failed.", given=result.message)
        if result.x is None:
            return None
        bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
        lowest = bound * float(self._scale[objective]) + float(self._constants[objective])
        return Found(self._decoded(result.x), lowest, result.status == _OPTIMAL)

    def _limits(self, budgets: Sequence[float]) -> tuple[_Array, NDArray[np.bool_]]:
        """The budgets as right sides, and which of them are limits at all."""
        limits = (np.array(budgets, dtype=np.float64) - self._constants[1:]) / self._scale[1:]
        return limits, np.isfinite(limits)

    def _reduced(self, table: int, flats: _Array, kept: NDArray[np.bool_], first: int) -> _Table:
        """A table without entries that another one with the same shared values beats."""
        scope = self._structure.scopes[table]
        shared = [i for i, p in enumerate(scope) if p in self._offset]
        local = [i for i, p in enumerate(scope) if p not in self._offset]
        shape = [self._structure.sizes[p] for p in scope]
        settings = math.prod(shape[i] for i in shared)
        order = [*shared, *local]

        def ordered(flat: NDArray[Any]) -> NDArray[Any]:
            view: NDArray[Any] = self._structure.table(flat, table).transpose(order)
            return view.reshape(settings, -1)

        sums = np.stack([ordered(flat) for flat in flats])
        efficient = ordered(kept).copy()
        for row, usable in enumerate(efficient):
            usable[usable] = _efficient(sums[:, row, usable])
        entries = np.flatnonzero(efficient)
        values = np.empty((len(entries), len(scope)), dtype=np.intp)
        values[:, order] = np.stack(np.unravel_index(entries, [shape[i] for i in order]), axis=1)
        return _Table(first, values, sums.reshape(len(flats), -1)[:, entries])

    def _equations(self) -> tuple[sparse.csr_array, _Array]:
        """One value per parameter, and tables whose marginals are these; (equations, variables)."""
        rows: list[NDArray[np.intp]] = []
        columns: list[NDArray[np.intp]] = []
        signs: list[_Array] = []
        right: list[float] = []

        def add(variables: NDArray[np.intp], sign: float) -> None:
            rows.append(np.full(len(variables), len(right)))
            columns.append(variables)
            signs.append(np.full(len(variables), sign))

        for p, offset in self._offset.items():
            add(offset + np.arange(self._structure.sizes[p]), 1.0)
            right.append(1.0)
        for scope, table in zip(self._structure.scopes, self._tables, strict=True):
            variables = table.first + np.arange(len(table.values))
            axes = [i for i, p in enumerate(scope) if p in self._offset]
            if not axes:
                add(variables, 1.0)
                right.append(1.0)
            for i in axes:
                for value in range(self._structure.sizes[scope[i]]):
                    add(variables[table.values[:, i] == value], 1.0)
                    add(np.array([self._offset[scope[i]] + value]), -1.0)
                    right.append(0.0)
        entries = (np.concatenate(signs), (np.concatenate(rows), np.concatenate(columns)))
        shape = (len(right), self._count)
        return sparse.csr_array(sparse.coo_array(entries, shape=shape)), np.array(right)

    def _weights(self, sums: int) -> _Array:
        """The sums' coefficients, shape (sums, variables)."""
        weights = np.zeros((sums, self._count))
        for table in self._tables:
            weights[:, table.first : table.first + len(table.values)] = table.sums
        return weights

    def _decoded(self, x: _Array) -> dict[str, int]:
        values = [0] * len(self._structure.sizes)
        for scope, table in zip(self._structure.scopes, self._tables, strict=True):
            best = int(x[table.first : table.first + len(table.values)].argmax())
            for p, value in zip(scope, table.values[best].tolist(), strict=True):
                values[p] = value
        return self._structure.named(values)


def _efficient(sums: _Array) -> NDArray[np.bool_]:
    """Which of some entries, shape (sums, entries), no other one beats; of equal ones the first."""
    below = (sums[:, :, None] <= sums[:, None, :]).all(axis=0)  # [i, j]: i is as good as j
    earlier = np.tri(sums.shape[1], k=-1, dtype=np.bool_).T  # [i, j]: i before j
    beats = below & (~below.T | earlier)
    return np.asarray(~beats.any(axis=0))
