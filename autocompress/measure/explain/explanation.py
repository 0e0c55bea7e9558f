"""`Explanation`: a candidate's speed against the original's, layer by layer, with its causes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from autocompress.device import RuntimeSettings
from autocompress.measure.explain.breakdown import Breakdown, break_down
from autocompress.measure.explain.changes import Change, match_layers
from autocompress.measure.explain.fallback import fell_back
from autocompress.measure.explain.findings import (
    LEAST_SHARE,
    Case,
    Finding,
    count,
    milliseconds,
    names,
)
from autocompress.measure.explain.graph import FileGraph
from autocompress.measure.explain.overheads import overheads
from autocompress.measure.explain.slower import slower_layers
from autocompress.measure.session import NodeTime

_TOP_GAINS: Final = 3
# Lanes of one register, for the widest float instruction set that a CPU has.
_LANES: Final = (("avx512f", 16), ("avx2", 8), ("avx", 8))


@final
@dataclass(frozen=True)
class Speed:
    """A paired measurement of a candidate against the original in the profile's first runtime.

    Attributes:
        low: lower end of the speed-up's 95 % interval.
        reason: why the figures cannot be trusted; empty if they can.
    """

    baseline_ms: float
    candidate_ms: float
    speedup: float
    low: float
    high: float
    reason: str = ""


@final
@dataclass(frozen=True)
class Profiled:
    """A file, its profile, and its latency without a profile."""

    graph: FileGraph
    nodes: tuple[NodeTime, ...]
    latency_ms: float


@final
@dataclass(frozen=True)
class Explanation:
    """Why a candidate is, or is not, faster.

    Attributes:
        candidate: its name.
        runtime: full name of the runtime that it ran in; the layers' times are both from there.
        speed: the paired measurement; `verdict` is drawn from it, not from profiles.
        runtime_speedup: the original's in the candidate's runtime over the original in the first
            one; 1 where they are the same.
        findings: what costs time, the largest stake first.
        notes: how the figures were taken, and what they do not say.
    """

    candidate: str
    runtime: str
    speed: Speed
    runtime_speedup: float
    verdict: str
    baseline: Breakdown
    after: Breakdown
    changes: tuple[Change, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; times in milliseconds."""
        return {
            "candidate": self.candidate,
            "runtime": self.runtime,
            "verdict": self.verdict,
            "speed": asdict(self.speed),
            "runtime_speedup": self.runtime_speedup,
            "time_ms": {"original": spent_on(self.baseline), "candidate": spent_on(self.after)},
            "layers": [change_row(change) for change in self.changes],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }


def explain_profiles(
    candidate: str,
    runtime: RuntimeSettings,
    before: Profiled,
    after: Profiled,
    speed: Speed,
    tile: int,
) -> Explanation:
    """Explain a candidate's speed.

    Args:
        candidate: its name.
        runtime: that both profiles were taken in.
        before: the original.
        after: the candidate.
        speed: the paired measurement.
        tile: see `kernel_tile`.
    """
    old = break_down(before.graph, before.nodes, before.latency_ms)
    new = break_down(after.graph, after.nodes, after.latency_ms)
    changes = match_layers(old, new)
    case = Case(runtime, old, new, changes, tile)
    found = [*fell_back(case), *slower_layers(case), *overheads(case)]
    findings = tuple(sorted(found, key=lambda f: (f.kind == "outside_layers", -f.stake_ms)))
    return Explanation(
        candidate=candidate,
        runtime=runtime.full_name,
        speed=speed,
        runtime_speedup=speed.baseline_ms / before.latency_ms,
        verdict=_verdict(speed, speed.baseline_ms / before.latency_ms, changes, findings),
        baseline=old,
        after=new,
        changes=changes,
        findings=findings,
        notes=tuple(_notes(case, speed)),
    )


def kernel_tile(channel_multiple: int, instruction_sets: Sequence[str]) -> int:
    """How many channels a device's kernels work on at a time.

    Args:
        channel_multiple: the device profile's.
        instruction_sets: of the CPU; empty for a GPU.
    """
    lanes = next((lanes for name, lanes in _LANES if name in instruction_sets), 1)
    return max(channel_multiple, lanes)


def spent_on(model: Breakdown) -> dict[str, float]:
    """A model's milliseconds by what they were spent on; they add up to its latency."""
    return {
        "layers": model.layers_ms,
        "conversions": sum(n.milliseconds for n in model.conversions),
        "layout changes": sum(n.milliseconds for n in model.layouts),
        "other operators": sum(n.milliseconds for n in model.others),
        "between nodes": model.between_ms,
    }


def change_row(change: Change) -> dict[str, Any]:
    """A layer before and after, as plain values."""
    before = change.before
    return {
        "layer": change.name,
        "before": before.layer.label if before else None,
        "before_ms": change.before_ms if before else None,
        "before_precision": before.precision if before else None,
        "after": [time.layer.label for time in change.after],
        "after_ms": change.after_ms,
        "after_precision": [time.precision for time in change.after],
        "after_operators": [name for time in change.after for name in time.operators],
        "wanted": [time.layer.scheme for time in change.after],
    }


def _verdict(
    speed: Speed, runtime_speedup: float, changes: Sequence[Change], findings: Sequence[Finding]
) -> str:
    """The verdict in a few sentences; whether it is faster is read from the interval."""
    interval = f"{speed.speedup:.2f} x the original's speed [{speed.low:.2f}, {speed.high:.2f}]"
    times = f"{milliseconds(speed.baseline_ms)} to {milliseconds(speed.candidate_ms)}"
    if speed.low > 1:
        text = f"Faster: {interval}, {times}."
    elif speed.high < 1:
        text = f"Slower: {interval}, {times}."
    else:
        text = f"No faster: {interval}, {times}; the interval includes 1."
    if abs(runtime_speedup - 1) > 0.005:
        text += f" The runtime alone makes the original {runtime_speedup:.2f} x as fast."
    causes = [finding for finding in findings if finding.kind != "outside_layers"]
    if speed.low > 1:
        least = LEAST_SHARE * speed.candidate_ms
        gains = sorted(changes, key=lambda change: -change.gain_ms)[:_TOP_GAINS]
        told = [f"{c.name} ({milliseconds(c.gain_ms)})" for c in gains if c.gain_ms > least]
        text += f" Most is gained by {names(told)}." if told else ""
        return text + (f" Most is held back by: {_head(causes[0])}" if causes else "")
    if causes:
        return text + f" Main cause: {_head(causes[0])} {causes[0].why}"
    return text + " The profiles show no single cause; see the layers."


def _head(finding: Finding) -> str:
    """The first sentence of what was seen."""
    return finding.seen.split(". ")[0].rstrip(".") + "."


def _notes(case: Case, speed: Speed) -> list[str]:
    notes = []
    if speed.reason:
        notes.append(f"The measurement is not to be trusted: {speed.reason}.")
    slowed = [m.profile_ms / m.latency_ms - 1 for m in (case.baseline, case.candidate)]
    if max(slowed) > 0:
        notes.append(
            "Times of nodes come from the runtime's profile, which takes time itself: its sums are "
            f"{slowed[0]:+.0%} (original) and {slowed[1]:+.0%} (candidate) off the measured "
            "latencies. An equal part was taken off every node; what was still too much was scaled."
        )
    missing = [layer.name for layer in case.candidate.missing]
    if missing:
        kinds = Counter(node.operator for node in case.candidate.others)
        notes.append(
            f"The runtime's profile has no node for {count(len(missing), 'layer')} of the "
            f"candidate ({names(missing)}); what it calls its nodes: "
            f"{names([name for name, _ in kinds.most_common()])}."
        )
    new = [change.name for change in case.changes if change.before is None]
    if new:
        notes.append(f"Layers with no counterpart in the original: {names(new)}.")
    return notes
