"""Layers that the file wants in integers and that ran in float, by the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from autocompress.measure.explain.breakdown import LayerTime
from autocompress.measure.explain.findings import Case, Finding, count, milliseconds, names
from autocompress.measure.explain.layers import Layer

_SIGNED: Final = ("int8",)
_WIDE: Final = ("int16", "uint16", "int32")
_NARROW: Final = ("int4", "uint4", "int2", "uint2", "float8e4m3fn", "float8e5m2")
# A matrix product of ONNX Runtime takes integers without its output being rounded.
_FREE_OUTPUT: Final = ("Gemm", "MatMul")


@final
@dataclass(frozen=True)
class Reason:
    """Why layers of a kind stay in float, and what to change."""

    why: str
    advice: str


_MIXED: Final = Reason(
    "The file's activations are signed (int8). ONNX Runtime makes them unsigned where one layer "
    "reads a tensor, and leaves them signed where several do (as residual branches do). Each of "
    "these layers has a signed and an unsigned side, for which there is no integer kernel.",
    "round activations to unsigned integers: `activation_type=QuantType.QUInt8` in ONNX Runtime's "
    "quantizer",
)
_SIGNED_SIDE: Final = Reason(
    "The file's activations are signed (int8); ONNX Runtime's CPU kernels and fusions are made "
    "for unsigned ones.",
    _MIXED.advice,
)
_WIDE_SIDE: Final = Reason(
    "The file rounds activations to more than 8 bits, for which the runtime has no integer "
    "kernel of these operators.",
    "round activations to 8 bits (uint8), or leave these layers in float",
)
_NARROW_WEIGHT: Final = Reason(
    "The weights have fewer than 8 bits, for which the runtime has no integer kernel here.",
    "store these weights in 8 bits where speed counts; fewer bits only make the file smaller",
)
_NO_ZERO_POINT: Final = Reason(
    "The weight's DequantizeLinear gives no zero point. ONNX Runtime turns a Gemm into its "
    "integer kernel only if there is one.",
    "give the weights zero points, all of them 0",
)
_WRONG_AXIS: Final = Reason(
    "The weights' scales lie along the summed axis of the matrix product; the integer kernel "
    "takes one scale per output channel or one in all.",
    "quantize these weights per output channel (the last axis of a MatMul's weight) or per tensor",
)
_DYNAMIC_RANGES: Final = Reason(
    "The file takes the ranges of their inputs anew at each run; this runtime has no integer "
    "kernel for that.",
    "take fixed ranges from calibration data (static)",
)
_UNKNOWN: Final = Reason(
    "The file has roundings around these layers, but the runtime did not fuse them into an "
    "integer kernel; the file does not show why.",
    "leave these layers in float, or write them as the runtime's own quantizer does",
)


def fell_back(case: Case) -> list[Finding]:
    """One finding per reason; none where every layer ran as the file means it."""
    grouped: dict[Reason, list[LayerTime]] = {}
    for time in fallen(case):
        grouped.setdefault(reason_of(case, time.layer), []).append(time)
    return [_finding(case, reason, times) for reason, times in grouped.items()]


def fallen(case: Case) -> list[LayerTime]:
    """Layers that are integers in the file and ran in float."""
    return [
        time
        for time in case.candidate.layers
        if time.layer.quantized and time.precision not in ("integers", "")
    ]


def reason_of(case: Case, layer: Layer) -> Reason:
    """Why a layer was not run in integers, as far as its file shows it."""
    ends = layer.rounding
    types = (ends.input_type, ends.output_type)
    if any(kind in _WIDE for kind in types):
        return _WIDE_SIDE
    if layer.weight_type in _NARROW:
        return _NARROW_WEIGHT
    if layer.scheme == "dynamic":
        return _DYNAMIC_RANGES
    if not case.onnxruntime:
        return _UNKNOWN
    if ends.output_type == "float" and layer.operator not in _FREE_OUTPUT:
        return _not_rounded(ends.after)
    if not ends.absorbed:
        return _not_absorbed(ends.after)
    if layer.operator == "Gemm" and not layer.zero_point:
        return _NO_ZERO_POINT
    if layer.operator == "MatMul" and layer.axis == 0:
        return _WRONG_AXIS
    if any(kind in _SIGNED for kind in types):
        return _MIXED if ends.input_shared != ends.output_shared else _SIGNED_SIDE
    return _UNKNOWN


def _not_rounded(readers: tuple[str, ...]) -> Reason:
    who = " and ".join(readers) or "the model's output"
    return Reason(
        f"Nothing rounds their output: {who} reads it in float. The runtime's integer convolution "
        "must know how to round what it writes.",
        "let the quantizer round these outputs too",
    )


def _not_absorbed(between: tuple[str, ...]) -> Reason:
    what = " and ".join(dict.fromkeys(between))
    if set(between) <= {"Relu", "Clip"}:
        return Reason(
            f"{what} stands between the layer and its rounding, and the rounding's range goes "
            "beyond what it lets through, so that it cannot be left out.",
            f"take the range of the rounding from the values after {what} (unsigned integers "
            "whose zero point is 0)",
        )
    return Reason(
        f"{what} stands between the layer and its rounding; the runtime's integer kernel has no "
        "such activation built in.",
        f"round before {what} as well, or use Relu or Clip, which the rounding absorbs",
    )


def _finding(case: Case, reason: Reason, times: list[LayerTime]) -> Finding:
    found = tuple(time.layer.name for time in times)
    spent = sum(time.milliseconds for time in times)
    weights = case.candidate.weight_conversions(found)
    unrounding = sum(node.milliseconds for node in weights)
    told = f" ({milliseconds(before)} in the original)" if (before := case.before_ms(found)) else ""
    seen = (
        f"Quantized in the file, run in {times[0].precision}: {count(len(found), 'layer')} "
        f"({names(found)}), {milliseconds(spent)}{told}."
    )
    if weights:
        seen += (
            f" Weights and biases turned back to float at every run: "
            f"{count(len(weights), 'node')}, {milliseconds(unrounding)}."
        )
    why = reason.why
    if weights and case.onnxruntime and _were_blocked(case, found):
        why += (
            " As their weights are made anew at every run, ONNX Runtime cannot use its blocked "
            "float kernels for them either."
        )
    return Finding("float_fallback", found, spent + unrounding, seen, why, reason.advice)


def _were_blocked(case: Case, found: tuple[str, ...]) -> bool:
    return any(
        change.before is not None and change.before.blocked
        for change in case.changes
        if any(time.layer.name in found and not time.blocked for time in change.after)
    )
