"""What an explanation consists of: findings, each with figures, a reason and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, final

from autocompress.device import RuntimeSettings
from autocompress.measure.explain.breakdown import Breakdown
from autocompress.measure.explain.changes import Change

Kind = Literal[
    "float_fallback",
    "dynamic_convolution",
    "slower_in_integers",
    "left_fast_kernels",
    "parts_cost_more",
    "no_faster",
    "missed_tile",
    "conversions",
    "layout_changes",
    "storage_only",
    "other_processor",
    "outside_layers",
]
# Findings about less than this share of the candidate's time are left out.
LEAST_SHARE = 0.01
_NAMED = 4


@final
@dataclass(frozen=True)
class Finding:
    """One thing that keeps the candidate from being faster.

    Attributes:
        kind: of a fixed list, for programs.
        layers: names of the layers that it is about; may be empty.
        stake_ms: time of the candidate that it is about; more cannot be gained by the change.
        seen: what was seen, with figures.
        why: why it costs time.
        advice: what to change.
    """

    kind: Kind
    layers: tuple[str, ...]
    stake_ms: float
    seen: str
    why: str
    advice: str


@final
@dataclass(frozen=True)
class Case:
    """What the findings are drawn from.

    Attributes:
        baseline: in the same runtime as the candidate.
        changes: the layers of both, matched.
        tile: how many channels the device's kernels work on at a time.
    """

    runtime: RuntimeSettings
    baseline: Breakdown
    candidate: Breakdown
    changes: tuple[Change, ...]
    tile: int

    @property
    def least_ms(self) -> float:
        """Time under which nothing is worth telling."""
        return LEAST_SHARE * self.candidate.latency_ms

    @property
    def onnxruntime(self) -> bool:
        """Whether ONNX Runtime ran both."""
        return self.runtime.name.startswith("onnxruntime")

    def before_ms(self, names: Iterable[str]) -> float:
        """The baseline's time for some of the candidate's layers."""
        wanted = set(names)
        return sum(
            change.before_ms
            for change in self.changes
            if any(time.layer.name in wanted for time in change.after)
        )


def milliseconds(value: float) -> str:
    """A time with three significant digits."""
    digits = 3 if value < 0.1 else 2 if value < 10 else 1
    return f"{value:.{digits}f} ms"


def count(number: int, noun: str) -> str:
    """`1 layer`, `3 layers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def names(found: Sequence[str], most: int = _NAMED) -> str:
    """The first few of some names, and how many there are besides."""
    shown = ", ".join(found[:most])
    return f"{shown} and {len(found) - most} more" if len(found) > most else shown
