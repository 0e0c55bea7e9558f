"""Layers that are no faster than before although they are smaller or in integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from autocompress.measure.explain.changes import Change
from autocompress.measure.explain.fallback import fallen
from autocompress.measure.explain.findings import Case, Finding, Kind, count, milliseconds, names

# A layer counts as slower, or no faster, beyond what profiles repeat to.
_SLOWER: Final = 1.05
_NO_FASTER: Final = 0.95


def slower_layers(case: Case) -> list[Finding]:
    """Findings about layers one by one; each layer is in the first that fits it."""
    told = {time.layer.name for time in fallen(case)}
    rest = [
        change for change in case.changes
        if change.before is not None and change.after
        and not any(time.layer.name in told for time in change.after)
    ]  # fmt: skip
    findings = []
    for test, make in _TESTS:
        found = [change for change in rest if test(case, change)]
        rest = [change for change in rest if change not in found]
        if found:
            findings.append(make(case, found))
    return [finding for finding in findings if finding.stake_ms >= case.least_ms]


def _slower(change: Change) -> bool:
    return change.after_ms > _SLOWER * change.before_ms


def _is_dynamic_convolution(case: Case, change: Change) -> bool:
    return _slower(change) and any(t.layer.operator == "ConvInteger" for t in change.after)


def _is_slower_in_integers(case: Case, change: Change) -> bool:
    before = change.before
    integers = all(time.precision == "integers" for time in change.after)
    return _slower(change) and integers and before is not None and before.precision != "integers"


def _left_fast_kernels(case: Case, change: Change) -> bool:
    if change.before is None or not change.before.blocked:
        return False
    floats = [time for time in change.after if time.precision.startswith("float")]
    lost = change.after_ms > _NO_FASTER * _expected_ms(change)
    return lost and any(not time.blocked for time in floats)


def _expected_ms(change: Change) -> float:
    """The time that would go with the layer's share of weights."""
    before = change.before.layer.weights if change.before else 0
    weights = sum(time.layer.weights for time in change.after)
    return change.before_ms * (weights / before if before and weights else 1.0)


def _parts_cost_more(case: Case, change: Change) -> bool:
    return len(change.after) > 1 and change.after_ms > _NO_FASTER * change.before_ms


def _is_no_faster(case: Case, change: Change) -> bool:
    return change.narrowed and change.after_ms > _NO_FASTER * change.before_ms


def _dynamic_convolution(case: Case, found: Sequence[Change]) -> Finding:
    return _finding(
        "dynamic_convolution", found, "Convolutions that take their ranges anew at each run",
        "ONNX Runtime's ConvInteger has no tuned kernel, least of all for signed weights, and its "
        "result is made float again by separate nodes.",
        "quantize convolutions with fixed ranges (static, from calibration data); keep dynamic "
        "ranges for matrix products",
    )  # fmt: skip


def _slower_in_integers(case: Case, found: Sequence[Change]) -> Finding:
    grouped = any(time.layer.groups > 1 for change in found for time in change.after)
    narrow = "depthwise or grouped" if grouped else "narrow or small"
    return _finding(
        "slower_in_integers", found, "Run in integers, and slower than in float before",
        f"For {narrow} layers rounding and packing cost more than integer products save.",
        "leave these layers in float (`exclude` them from `precision`), unless their neighbours "
        "then need conversions that cost more",
    )  # fmt: skip


def _left_kernels(case: Case, found: Sequence[Change]) -> Finding:
    widths = sorted({t.layer.in_channels for c in found for t in c.after if not t.blocked})
    return _finding(
        "left_fast_kernels", found,
        f"Outside ONNX Runtime's blocked float kernels (input channels: "
        f"{', '.join(map(str, widths))})",
        "These kernels need input channels that are a multiple of 4; other layers go through "
        "a general matrix product and values are put in another order before and after.",
        f"keep channel counts at multiples of 4, better of {case.tile} "
        "(`channel_multiple` in the device profile)",
    )  # fmt: skip


def _parts(case: Case, found: Sequence[Change]) -> Finding:
    return _finding(
        "parts_cost_more", found, "Decomposed, and the parts together are no faster",
        "Each part reads and writes all its values, and narrow parts leave the kernels "
        "half empty.",
        "take a lower rank for these layers or leave them whole",
    )  # fmt: skip


def _no_faster(case: Case, found: Sequence[Change]) -> Finding:
    return _finding(
        "no_faster", found, "Fewer weights, and no faster",
        f"Channels are computed {case.tile} at a time and rounded up, and a small layer's time "
        "is mostly spent on moving values.",
        f"prune these layers to a multiple of {case.tile} channels, or give them their channels "
        "back",
    )  # fmt: skip


_TESTS: Final[
    tuple[tuple[Callable[[Case, Change], bool], Callable[[Case, Sequence[Change]], Finding]], ...]
] = (
    (_is_dynamic_convolution, _dynamic_convolution),
    (_is_slower_in_integers, _slower_in_integers),
    (_left_fast_kernels, _left_kernels),
    (_parts_cost_more, _parts),
    (_is_no_faster, _no_faster),
)


def _finding(kind: Kind, found: Sequence[Change], what: str, why: str, advice: str) -> Finding:
    ordered = sorted(found, key=lambda change: change.gain_ms)
    layers = tuple(change.name for change in ordered)
    after = sum(change.after_ms for change in found)
    before = sum(change.before_ms for change in found)
    stake = after - sum(min(_expected_ms(change), change.before_ms) for change in found)
    seen = (
        f"{what}: {count(len(layers), 'layer')} ({names(layers)}), {milliseconds(before)} before, "
        f"{milliseconds(after)} now."
    )
    return Finding(kind, layers, max(stake, 0.0), seen, why, advice)
