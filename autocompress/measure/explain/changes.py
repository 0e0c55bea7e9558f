"""Each layer's time before and after: the layers of two files, matched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from autocompress.measure.explain.breakdown import Breakdown, LayerTime


@final
@dataclass(frozen=True)
class Change:
    """A layer of the baseline and what the candidate has in its place.

    Attributes:
        name: the baseline's layer's, or the candidate's for one that is new.
        before: None for a layer that is new.
        after: several where the layer was decomposed; none where it is gone.
    """

    name: str
    before: LayerTime | None
    after: tuple[LayerTime, ...]

    @property
    def before_ms(self) -> float:
        """The baseline's time; 0 for a layer that is new."""
        return self.before.milliseconds if self.before else 0.0

    @property
    def after_ms(self) -> float:
        """The candidate's time."""
        return sum(time.milliseconds for time in self.after)

    @property
    def gain_ms(self) -> float:
        """How much time the candidate saves here; negative if it takes more."""
        return self.before_ms - self.after_ms

    @property
    def narrowed(self) -> bool:
        """Whether the candidate has clearly fewer weights here."""
        if self.before is None or not self.before.layer.weights:
            return False
        return 0 < sum(t.layer.weights for t in self.after) < 0.95 * self.before.layer.weights


def match_layers(before: Breakdown, after: Breakdown) -> tuple[Change, ...]:
    """Match layers by name, by the name of their node, as parts of one (`conv` to `conv.0` and
    `conv.1`), and what is left by order where the numbers of each operator are equal.
    """
    partners: dict[str, list[LayerTime]] = {time.layer.name: [] for time in before.layers}
    keys = {key: time.layer.name for time in before.layers for key in time.layer.nodes[:1]}
    left: list[LayerTime] = []
    for time in after.layers:
        name = _partner(time, partners, keys)
        if name is None:
            left.append(time)
        else:
            partners[name].append(time)
    unmatched = [time for time in before.layers if not partners[time.layer.name]]
    if _kinds(unmatched) == _kinds(left):
        for kind in set(_kinds(left)):
            pairs = zip(_of_kind(unmatched, kind), _of_kind(left, kind), strict=True)
            for old, time in pairs:
                partners[old.layer.name].append(time)
        left = []
    changes = [Change(t.layer.name, t, tuple(partners[t.layer.name])) for t in before.layers]
    return (*changes, *(Change(time.layer.name, None, (time,)) for time in left))


def _partner(
    time: LayerTime, names: dict[str, list[LayerTime]], keys: dict[str, str]
) -> str | None:
    layer = time.layer
    if layer.name in names:
        return layer.name
    if layer.nodes[0] in keys:
        return keys[layer.nodes[0]]
    whole = [name for name in names if layer.name.startswith(f"{name}.")]
    return max(whole, key=len) if whole else None


def _kind(time: LayerTime) -> str:
    """What stays the same whatever a quantizer makes of the operator."""
    return "Conv" if "Conv" in time.layer.operator else "MatMul"


def _kinds(times: Sequence[LayerTime]) -> Counter[str]:
    return Counter(_kind(time) for time in times)


def _of_kind(times: Sequence[LayerTime], kind: str) -> list[LayerTime]:
    return [time for time in times if _kind(time) == kind]
