"""Time that goes to something else than a layer's own work, and channel counts that waste it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from autocompress.measure.explain.breakdown import LayerTime
from autocompress.measure.explain.fallback import fallen
from autocompress.measure.explain.findings import (
    Case,
    Finding,
    count,
    milliseconds,
    names,
)
from autocompress.measure.explain.graph import FileGraph
from autocompress.measure.session import NodeTime

_ROUNDING: Final = ("QuantizeLinear", "DequantizeLinear")
_COPYING: Final = ("MemcpyFromHost", "MemcpyToHost")
# A lesser waste is not worth another plan.
_LEAST_WASTE: Final = 0.05
_LARGE_REST: Final = 0.25
_INPUTS_TOO: Final = " Float kernels round input channels up as well."


def overheads(case: Case) -> list[Finding]:
    """All findings about time outside layers and about channel counts."""
    found = [
        _conversions(case),
        _layouts(case),
        _missed_tile(case),
        _storage_only(case),
        _other_processor(case),
        _outside_layers(case),
    ]
    return [f for f in found if f is not None and f.stake_ms >= case.least_ms]


def _conversions(case: Case) -> Finding | None:
    weights = case.candidate.weight_conversions(time.layer.name for time in fallen(case))
    nodes = [n for n in case.candidate.conversions if n not in weights]
    inner = [n for n in nodes if not _at_border(case.candidate.graph, n)]
    if not inner or _total(nodes) <= _total(case.baseline.conversions):
        return None
    around = {key for time in fallen(case) for key in time.layer.rounding.nodes}
    beside = [n for n in nodes if around & set(n.origins)]
    between = _float_operators(case.candidate.graph, nodes)
    why = "Values are rounded to integers and turned back wherever float and integer nodes meet."
    advice = "leave fewer borders between float and integers; the first and the last are needed"
    if any(n.operator == "DynamicQuantizeLinear" for n in nodes):
        why += " Ranges that are taken anew at each run need a node before every layer."
        advice = "take fixed ranges from calibration data where accuracy allows it (static)"
    if beside:
        why += f" {len(beside)} of them stand around layers that fell back to float."
        advice = "mend first what keeps those layers in float; most of these nodes go with it"
    if between:
        told = ", ".join(f"{name} ({times})" for name, times in between.most_common(5))
        why += f" Operators that read or make float values between them: {told}."
    if between and not beside:
        advice = (
            "let the quantizer round these operators too where the runtime has integer kernels of "
            "them, or leave the layers around them in float"
        )
    return Finding(
        "conversions", (), _total(nodes),
        f"Roundings and casts that remained: {count(len(nodes), 'node')}, "
        f"{_share(case, _total(nodes))}.",
        why, advice,
    )  # fmt: skip


def _at_border(graph: FileGraph, node: NodeTime) -> bool:
    """Whether a conversion takes the model's input or gives its output."""
    found = [graph.node(key) for key in node.origins]
    return any(
        n is not None and (graph.maker(n.inputs[0]) is None or set(n.outputs) & set(graph.outputs))
        for n in found
    )


def _float_operators(graph: FileGraph, nodes: Sequence[NodeTime]) -> Counter[str]:
    """The file's operators, other than layers, beside roundings that remained."""
    found: dict[str, str] = {}
    for key in {key for node in nodes for key in node.origins}:
        rounding = graph.node(key)
        if rounding is None or rounding.operator not in _ROUNDING:
            continue
        makes = rounding.operator == "DequantizeLinear"
        near = graph.readers(rounding.outputs[0]) if makes else [graph.maker(rounding.inputs[0])]
        found |= {n.key: n.operator for n in near if n is not None}
    layers = {"Conv", "Gemm", "MatMul", "ConvTranspose", *_ROUNDING}
    return Counter(operator for operator in found.values() if operator not in layers)


def _layouts(case: Case) -> Finding | None:
    nodes = [n for n in case.candidate.layouts if n.operator not in _COPYING]
    extra = _total(nodes) - _total(case.baseline.layouts)
    if not nodes or extra <= 0:
        return None
    kinds = Counter(n.operator for n in nodes)
    told = ", ".join(f"{name} ({times})" for name, times in kinds.most_common())
    before = count(len(case.baseline.layouts), "node")
    return Finding(
        "layout_changes", (), extra,
        f"Values put in another order: {count(len(nodes), 'node')} that the file does not have "
        f"({told}), {_share(case, _total(nodes))}; {before} in the original.",
        "The runtime's fast kernels keep channels in another order than the file. At every border "
        "between them and other nodes it puts in a node that moves all values.",
        "have neighbouring layers run in the same kernels: all of them in integers or all in "
        f"float, with channel counts that are multiples of {case.tile}",
    )  # fmt: skip


def _missed_tile(case: Case) -> Finding | None:
    told, layers, stake = [], [], 0.0
    for change in case.changes:
        known = change.before.layer.out_channels if change.before is not None else 0
        for time in change.after:
            channels, tile = time.layer.out_channels, case.tile
            padded = -(-channels // tile) * tile
            if channels in (0, known, padded) or time.layer.groups > 1:
                continue
            # General matrix products have no steps of channels; `left_fast_kernels` tells these.
            if change.before and change.before.blocked and _in_general_kernel(time):
                continue
            waste = time.milliseconds * (1 - channels / padded)
            if waste > _LEAST_WASTE * time.milliseconds and waste >= case.least_ms / 2:
                layers.append(time.layer.name)
                told.append((waste, f"{time.layer.name} {channels} (as slow as {padded})"))
                stake += waste
    if not layers:
        return None
    ordered = [text for _, text in sorted(told, reverse=True)]
    return Finding(
        "missed_tile", tuple(layers), stake,
        f"Output channels between the kernels' steps of {case.tile}: {names(ordered)}.",
        f"The kernels compute {case.tile} channels at a time; the last step costs as much as a "
        "full one." + (_INPUTS_TOO if case.onnxruntime else ""),
        f"go down to a multiple of {case.tile} to be faster, or up to one for more accuracy in the "
        f"same time; under {case.tile} channels nothing more is saved (`channel_multiple` in the "
        "device profile)",
    )  # fmt: skip


def _in_general_kernel(time: LayerTime) -> bool:
    return time.precision.startswith("float") and not time.blocked


def _storage_only(case: Case) -> Finding | None:
    found = [t for t in case.candidate.layers if t.layer.scheme == "weights only"]
    found = [t for t in found if t.precision != "integers"]
    if not found:
        return None
    layers = [time.layer.name for time in found]
    spent = sum(time.milliseconds for time in found)
    types = ", ".join(dict.fromkeys(time.layer.weight_type for time in found))
    nodes = case.candidate.weight_conversions(layers)
    seen = (
        f"Weights stored as {types}, computed in {found[0].precision or 'float'}: "
        f"{count(len(layers), 'layer')} ({names(layers)}), {milliseconds(spent)}."
    )
    if nodes:
        seen += (
            f" They are unpacked at every run: {count(len(nodes), 'node')}, "
            f"{milliseconds(_total(nodes))}."
        )
    else:
        seen += " They are unpacked once, when the model is loaded."
    return Finding(
        "storage_only", tuple(layers), _total(nodes) or case.least_ms, seen,
        "Such weights make the file smaller. The layer's inputs are not rounded, so it multiplies "
        "float numbers as before.",
        "for speed, quantize activations as well (`activation_bits: 8`)",
    )  # fmt: skip


def _other_processor(case: Case) -> Finding | None:
    if not case.runtime.name.endswith(("cuda", "tensorrt")):
        return None
    nodes = [n for n in _all_nodes(case) if n.kernel.split(" ")[0] == "CPU"]
    copies = [n for n in case.candidate.layouts if n.operator in _COPYING]
    if not nodes and not copies:
        return None
    kinds = Counter(n.operator for n in nodes)
    told = ", ".join(f"{name} ({times})" for name, times in kinds.most_common(5))
    spent = _total([*nodes, *copies])
    return Finding(
        "other_processor", (), spent,
        f"Run on the CPU instead of the GPU: {count(len(nodes), 'node')} ({told}), and "
        f"{count(len(copies), 'copy of values')} between them: {_share(case, spent)}.",
        "The GPU's provider has no kernel of these operators for these types, and every change of "
        "processor waits for the other one.",
        "avoid these operators or types for this runtime; int8 layers belong to TensorRT there",
    )  # fmt: skip


def _outside_layers(case: Case) -> Finding | None:
    model = case.candidate
    rest = model.latency_ms - model.layers_ms
    if not model.layers or rest < _LARGE_REST * model.latency_ms:
        return None
    slowest: Counter[str] = Counter()
    for node in model.others:
        slowest[node.operator] += round(1e6 * node.milliseconds)
    told = ", ".join(f"{name} {milliseconds(t / 1e6)}" for name, t in slowest.most_common(3))
    seen = f"Outside of layers: {_share(case, rest)}" + (
        f"; other operators: {told}" if told else ""
    )
    return Finding(
        "outside_layers", (), rest,
        f"{seen}.",
        f"Even if layers took no time, the run would take {milliseconds(rest)}: at most "
        f"{case.baseline.latency_ms / rest:.1f} x the original's speed in this runtime.",
        "smaller layers gain little from here on; look at the operators between them, at the "
        "conversions and at the runtime",
    )  # fmt: skip


def _all_nodes(case: Case) -> list[NodeTime]:
    model = case.candidate
    return [*(n for time in model.layers for n in time.nodes), *model.conversions, *model.others]


def _share(case: Case, spent: float) -> str:
    return f"{milliseconds(spent)}, {spent / case.candidate.latency_ms:.0%} of the run"


def _total(nodes: Sequence[NodeTime]) -> float:
    return sum(node.milliseconds for node in nodes)
