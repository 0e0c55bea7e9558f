"""Exact minimisation of a sum of small tables by eliminating one parameter after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import ConfigError
from autocompress.search.costs.factored import Factor, FactoredSum

LARGEST_TABLE = 2**21  # entries; 16 MiB of float64

_Array = NDArray[np.float64]
_Scope = tuple[int, ...]


@final
@dataclass(frozen=True)
class _Step:
    """Minimises the sum of `inputs` (table, shape that broadcasts) over `parameter`.

    Every table has its axes in the reverse order of elimination, so that the parameter is always
    the last axis, and no table is ever transposed.
    """

    parameter: int
    scope: _Scope
    inputs: tuple[tuple[int, tuple[int, ...]], ...]


@final
class Eliminator:
    """Minimises any sum that has the parameters of the given sums; made once, used often.

    Nonserial dynamic programming (Bertele and Brioschi, 1972): the parameter whose elimination
    makes the smallest table goes first, so those that are in one table only (local ones) cost
    nothing. Terms whose parameters are among those of another term share that one's table.

    Where every table left would exceed `largest_table` entries, the parameters that are left are
    set by iterated conditional modes (Besag, 1986) from two starts, all zeros and a greedy one;
    the others are still exact for them. `exact` says whether that is never needed.

    Attributes:
        parameters: names, in order of first appearance.
        sizes: how many values each parameter has.
        scopes: positions in `parameters` of every table's axes.
        starts: where each table begins in a flat vector of all of them.
        size: the length of such a vector.
        exact: whether `minimise` finds a true minimum.
    """

    def __init__(self, sums: Sequence[FactoredSum], largest_table: int = LARGEST_TABLE) -> None:
        sizes: dict[str, int] = {}
        for factor in (f for terms in sums for f in terms.factors):
            _check(factor, sizes)
        self.parameters = tuple(sizes)
        self.sizes = tuple(sizes.values())
        self._position = {name: i for i, name in enumerate(sizes)}
        found = {frozenset(f.parameters): None for terms in sums for f in terms.factors}
        hosts, self._host_of = _hosts([s for s in found if s])
        raw = [frozenset(self._position[name] for name in host) for host in hosts]
        order = _elimination_order(raw, self.sizes, largest_table)
        rank = {p: i for i, p in enumerate(order)}
        self._key = [-rank.get(p, len(self.sizes)) for p in range(len(self.sizes))]
        self.scopes = tuple(self._sorted(scope) for scope in raw)
        self.starts = tuple(np.cumsum([0, *map(self._entries, self.scopes)]).tolist())
        self.size = int(self.starts[-1])
        self._steps, self._left = self._plan(order)
        self._core = [p for p in range(len(self.sizes)) if p not in rank]
        self.exact = not self._core

    def flat(self, terms: FactoredSum) -> _Array:
        """A sum's terms (its constant aside) on the tables, one after another; shape (size,)."""
        flat = np.zeros(self.size)
        for factor in terms.factors:
            if not factor.parameters:
                continue
            table = self._host_of[frozenset(factor.parameters)]
            positions = [self._position[name] for name in factor.parameters]
            scope = self.scopes[table]
            axes = [positions.index(p) for p in scope if p in positions]
            shape = [self.sizes[p] if p in positions else 1 for p in scope]
            self.table(flat, table)[...] += factor.values.transpose(axes).reshape(shape)
        return flat

    def table(self, flat: _Array, table: int) -> _Array:
        """The view of one table in a flat vector, one axis per parameter of its scope."""
        view = flat[self.starts[table] : self.starts[table + 1]]
        return view.reshape([self.sizes[p] for p in self.scopes[table]])

    def minimise(self, flat: _Array) -> list[int]:
        """The value of every parameter at the minimum; of equal ones always the same."""
        tables = [self.table(flat, i) for i in range(len(self.scopes))]
        choices = []
        for step in self._steps:
            joint = _joint(step, tables)
            choices.append(np.asarray(joint.argmin(-1)))
            tables.append(np.asarray(joint.min(-1)))
        values = [0] * len(self.sizes)
        if self._core:
            _conditional_modes([(scope, tables[i]) for i, scope in self._left], self._core, values)
        for step, choice in zip(reversed(self._steps), reversed(choices), strict=True):
            values[step.parameter] = int(choice[tuple(values[p] for p in step.scope)])
        return values

    def marginals(self, flat: _Array) -> _Array:
        """For every entry of every table the least sum of a plan that has it; shape (size,).

        Only where elimination is `exact`. Messages go up and down the tree of eliminations
        (Dechter, 1999), so that it takes about three times as long as `minimise`.
        """
        tables = [self.table(flat, i) for i in range(len(self.scopes))]
        joints = []
        for step in self._steps:
            joints.append(_joint(step, tables))
            tables.append(np.asarray(joints[-1].min(-1)))
        least = sum(float(tables[i]) for i, _ in self._left)
        marginals: dict[int, _Array] = {i: np.asarray(least) for i, _ in self._left}
        for k in reversed(range(len(self._steps))):
            message = len(self.scopes) + k
            whole = joints[k] + (marginals[message] - tables[message])[..., None]
            for i, shape in self._steps[k].inputs:
                others = tuple(axis for axis, size in enumerate(shape) if size == 1)
                marginals[i] = np.asarray(whole.min(axis=others)).reshape(tables[i].shape)
        parts = [marginals[i].ravel() for i in range(len(self.scopes))]
        return np.concatenate(parts) if parts else np.zeros(0)

    def named(self, values: Sequence[int]) -> dict[str, int]:
        """Values in the order of `parameters`, by name."""
        return dict(zip(self.parameters, values, strict=True))

    def _sorted(self, scope: frozenset[int]) -> _Scope:
        return tuple(sorted(scope, key=lambda p: (self._key[p], p)))

    def _entries(self, scope: _Scope) -> int:
        return math.prod(self.sizes[p] for p in scope)

    def _plan(self, order: Sequence[int]) -> tuple[list[_Step], list[tuple[int, _Scope]]]:
        """The steps, and the tables (with scopes) that are left after them."""
        alive = dict(enumerate(self.scopes))
        steps = []
        for count, parameter in enumerate(order):
            used = [i for i, scope in alive.items() if parameter in scope]
            joint = self._sorted(frozenset().union(*(alive[i] for i in used)))
            inputs = [
                (i, tuple(self.sizes[p] if p in alive[i] else 1 for p in joint)) for i in used
            ]
            steps.append(_Step(parameter, joint[:-1], tuple(inputs)))
            for i in used:
                del alive[i]
            alive[len(self.scopes) + count] = joint[:-1]
        return steps, list(alive.items())


def _joint(step: _Step, tables: Sequence[_Array]) -> _Array:
    """The sum of a step's tables; the eliminated parameter is the last axis."""
    (first, shape), *rest = step.inputs
    joint = tables[first].reshape(shape)
    for table, shape in rest:
        joint = joint + tables[table].reshape(shape)
    return joint


def _check(factor: Factor, sizes: dict[str, int]) -> None:
    """Enters a factor's parameters with their sizes; complains where they contradict others."""
    shape = factor.values.shape
    repeated = len(set(factor.parameters)) < len(factor.parameters)
    if repeated or len(shape) != len(factor.parameters) or 0 in shape:
        raise ConfigError(
            f"The table of '{factor.name}' does not fit its parameters.",
            given=f"shape {shape} for {factor.parameters}",
            allowed="one axis of at least one entry for every parameter, each named once",
        )
    for name, size in zip(factor.parameters, shape, strict=True):
        if sizes.setdefault(name, size) != size:
            raise ConfigError(
                f"Two tables disagree about how many values '{name}' has.",
                given=f"{size} in '{factor.name}', {sizes[name]} elsewhere",
                advice="make all tables from the same search space",
            )
    if not np.isfinite(factor.values).all():
        raise ConfigError(
            f"The table of '{factor.name}' has entries that are no finite numbers.",
            advice="leave out the values of a parameter that cannot be used",
        )


def _hosts(
    scopes: Sequence[frozenset[str]],
) -> tuple[list[frozenset[str]], dict[frozenset[str], int]]:
    """The scopes that are within no other, and for each scope the host that it is within."""
    hosts: list[frozenset[str]] = []
    host_of: dict[frozenset[str], int] = {}
    for scope in sorted(scopes, key=len, reverse=True):
        host = next((i for i, other in enumerate(hosts) if scope <= other), len(hosts))
        if host == len(hosts):
            hosts.append(scope)
        host_of[scope] = host
    return hosts, host_of


def _elimination_order(
    scopes: Sequence[frozenset[int]], sizes: Sequence[int], largest: int
) -> list[int]:
    """Smallest table first; ends before the first table that would be above `largest` entries."""
    near: list[set[int]] = [{p} for p in range(len(sizes))]
    for scope in scopes:
        for p in scope:
            near[p] |= scope
    entries = {p: math.prod(sizes[q] for q in near[p]) for p in range(len(sizes))}
    order = []
    while entries:
        chosen = min(entries, key=lambda p: (entries[p], p))
        if entries.pop(chosen) > largest:
            break
        order.append(chosen)
        joined = near[chosen] - {chosen}
        for p in joined:
            near[p] = (near[p] | joined) - {chosen}
            entries[p] = math.prod(sizes[q] for q in near[p])
    return order


def _conditional_modes(
    tables: Sequence[tuple[_Scope, _Array]], core: Sequence[int], values: list[int]
) -> None:
    """Sets the core's values to the better of two local minima, in place."""
    of = {p: [(scope, t) for scope, t in tables if p in scope] for p in core}
    greedy: dict[int, int] = {}
    for p in core:  # optimistic about those that are not set yet
        greedy[p] = int(_profile(of[p], p, greedy).argmin())
    found = []
    for start in (dict.fromkeys(core, 0), greedy):
        at, changed = dict(start), True
        while changed:
            changed = False
            for p in core:
                total = _profile(of[p], p, at)
                if total.min() < total[at[p]]:
                    at[p], changed = int(total.argmin()), True
        found.append((sum(float(t[tuple(at[p] for p in s)]) for s, t in tables), at))
    for p, value in min(found, key=lambda pair: pair[0])[1].items():
        values[p] = value


def _profile(tables: Sequence[tuple[_Scope, _Array]], parameter: int, at: dict[int, int]) -> _Array:
    """The tables' sum along one parameter: the others where they are set, else at their best."""
    parts = []
    for scope, table in tables:
        index = tuple(slice(None) if p == parameter or p not in at else at[p] for p in scope)
        free = [p for p in scope if p == parameter or p not in at]
        others = tuple(i for i, p in enumerate(free) if p != parameter)
        parts.append(table[index].min(axis=others))
    return np.asarray(np.sum(parts, axis=0))
