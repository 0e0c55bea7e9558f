"""Picking one model from a front: by limits or by the knee."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, final

import numpy as np
import pandas as pd

from autocompress import pareto
from autocompress.errors import ConfigError, NoFitError
from autocompress.report import figures
from autocompress.report.columns import REFERENCES, front_rows, typed_front
from autocompress.report.tables import NAMES

_NEAREST: Final = 3

Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Limits:
    """What a picked model must keep; None is no limit.

    Args:
        max_latency_ms: quiet latency on the device, in milliseconds.
        min_speedup: times faster than the original network.
        max_drop: lost on the test split, in percentage points or a user's metric's own unit.
        max_bytes: size of the model file, in bytes.
        max_download_bytes: size of its coded container, in bytes.

    Raises:
        ConfigError: a limit that nothing could meet (not above zero) or that is no number.
    """

    max_latency_ms: float | None = None
    min_speedup: float | None = None
    max_drop: float | None = None
    max_bytes: int | None = None
    max_download_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or (name != "max_drop" and value <= 0):
                raise ConfigError(
                    "A limit cannot be used.",
                    given=f"--{name.replace('_', '-')} {value}",
                    allowed="a number" if name == "max_drop" else "a number above zero",
                )

    @property
    def given(self) -> bool:
        """Whether there is any limit."""
        return self != Limits()


@final
@dataclass(frozen=True)
class Choice:
    """A picked row (as `front_rows` gives it) and why it was picked, in a sentence or two."""

    row: Row
    reason: str


@final
@dataclass(frozen=True)
class _Rule:
    """One limit: how far a value may go, and how that is said."""

    label: str
    column: str
    limit: float
    sign: int
    text: Callable[[float], str]

    def miss(self, row: Row) -> float:
        """By how much the row misses, in the limit's unit; 0 if it does not, inf if unknown."""
        value = row[self.column]
        return math.inf if value is None else max(self.sign * (value - self.limit), 0.0)

    def say(self, row: Row) -> str:
        """The miss in words."""
        value, miss = row[self.column], self.miss(row)
        if value is None:
            return f"{self.label} not measured"
        direction = "over" if self.sign > 0 else "short"
        return f"{self.label} {self.text(value)}, {self.text(miss)} {direction}"


def pick(frame: pd.DataFrame, limits: Limits, *, knee: bool = False) -> Choice:
    """One finalist of a front, by what was measured on the test split and the device.

    With `max_drop` and no latency or speed-up limit the fastest within the limits, with any other
    limits the most accurate one. A reference is taken only where it is within the limits and no
    finalist is, or where it dominates the pick in metric and latency. Limits hold for the measured
    values; where the interval reaches beyond, the reason says so.

    Args:
        frame: the columns of `front.csv`.
        limits: what must hold.
        knee: take the knee of test metric against latency, of what is within the limits.

    Raises:
        ConfigError: neither a limit nor `knee`.
        NoFitError: no finalist has been judged yet, or nothing is within the limits; the nearest
            points are named with what they miss.
    """
    if not (limits.given or knee):
        raise ConfigError(
            "There are many models on a front; picking one needs a wish.",
            allowed="--max-latency-ms, --min-speedup, --max-drop, --max-bytes, "
            "--max-download-bytes or --knee",
            advice="for a good compromise give --knee",
        )
    rows = front_rows(frame)
    judged = [row for row in rows if row["metric_test"] is not None and row["latency_ms"]]
    finalists = [row for row in judged if row["role"] == "finalist"]
    if not finalists:
        raise NoFitError(
            "The run has no finalist that was judged on the test split.",
            given=f"{len(rows)} rows",
            advice="run `autocompress search` with the same run folder until it ends",
        )
    rules = _rules(limits, share=figures.is_share(typed_front(frame)))
    fits = [row for row in finalists if _within(row, rules)]
    spare = [row for row in judged if row["role"] in REFERENCES and _within(row, rules)]
    if fits:
        chosen, reason = _best(fits, limits, knee)
        better = [row for row in spare if _dominates(row, chosen)]
        if better:
            chosen, _ = _best(better, limits, False)
            reason = "no finalist within the limits beats it in accuracy and latency"
    elif spare:
        chosen, _ = _best(spare, limits, False)
        reason = "no finalist is within the limits, but this is"
    else:
        raise _no_fit(judged, rules)
    return Choice(chosen, _sentence(chosen, reason, limits))


def _rules(limits: Limits, *, share: bool) -> list[_Rule]:
    points = " points" if share else ""
    wanted = (
        ("latency", "latency_ms", limits.max_latency_ms, 1, figures.milliseconds),
        ("speed-up", "speedup", limits.min_speedup, -1, lambda value: f"{value:.3g}x"),
        ("drop", "drop_test_pp", limits.max_drop, 1, lambda v: f"{v:.3g}{points}"),
        ("file", "file_bytes", limits.max_bytes, 1, figures.byte_size),
        ("download", "download_bytes", limits.max_download_bytes, 1, figures.byte_size),
    )
    return [
        _Rule(label, column, limit, sign, text)
        for label, column, limit, sign, text in wanted
        if limit is not None
    ]


def _within(row: Row, rules: Sequence[_Rule]) -> bool:
    return all(rule.miss(row) == 0 for rule in rules)


def _dominates(row: Row, other: Row) -> bool:
    pair = [(-r["metric_test"], r["latency_ms"]) for r in (row, other)]
    mask = pareto.non_dominated(pair, maximise=(False, False))
    return bool(mask[0] and not mask[1])


def _best(rows: Sequence[Row], limits: Limits, knee: bool) -> tuple[Row, str]:
    """The row that the rule takes and why; ties go to the other objective, then to fewer bytes."""
    if knee:
        values = np.array([(row["metric_test"], row["latency_ms"]) for row in rows])
        chosen = rows[pareto.knee(values, maximise=(True, False))]
        return chosen, "the knee of accuracy on the test split against latency"
    size = [row["file_bytes"] or math.inf for row in rows]
    accurate = [(-row["metric_test"], row["latency_ms"]) for row in rows]
    speed_limit = limits.max_latency_ms is not None or limits.min_speedup is not None
    if limits.max_drop is not None and not speed_limit:
        best = min(range(len(rows)), key=lambda i: (accurate[i][::-1], size[i]))
        return rows[best], "the fastest finalist within the limits"
    best = min(range(len(rows)), key=lambda i: (accurate[i], size[i]))
    return rows[best], "the most accurate finalist within the limits"


def _sentence(row: Row, reason: str, limits: Limits) -> str:
    name = NAMES.get(row["role"], row["candidate"])
    text = f"{name}: {reason}."
    low = row["speedup_low"]
    if limits.min_speedup is not None and low is not None and low < limits.min_speedup:
        text += f" Its speed-up's interval reaches down to {low:.3g}x, below the limit."
    if not row["trusted"]:
        text += " Its timing is marked untrusted: the interval stayed too wide."
    return text


def _no_fit(rows: Sequence[Row], rules: Sequence[_Rule]) -> NoFitError:
    """The error that names the nearest points; near is the sum of misses relative to the limits."""

    def distance(row: Row) -> tuple[float, float]:
        misses = [rule.miss(row) / max(abs(rule.limit), 0.1) for rule in rules]
        return sum(math.isinf(miss) for miss in misses), sum(m for m in misses if m < math.inf)

    lines = []
    for row in sorted(rows, key=distance)[:_NEAREST]:
        said = "; ".join(rule.say(row) for rule in rules if rule.miss(row) > 0)
        lines.append(f"{NAMES.get(row['role'], row['candidate'])}: {said}")
    return NoFitError(
        "No model of this front is within the limits. Nearest:\n    " + "\n    ".join(lines),
        given=", ".join(f"{rule.label} {rule.text(rule.limit)}" for rule in rules),
        advice="relax a limit by as much, or search longer",
    )
