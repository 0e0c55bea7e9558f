"""The unpruned network in every precision that a search space offers, cut into blocks.

Weights are only rounded: what a level costs in time does not depend on their values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, final

import onnx
from torch import Tensor

from autocompress.device import DeviceProfile
from autocompress.export.exporter import Exporter, FloatModel
from autocompress.export.quantize import quantize
from autocompress.graph import NetworkGraph
from autocompress.measure.table.cut import Cut, cut_model, layer_label
from autocompress.search.space import Space
from autocompress.techniques.precision import PRECISION, Precision
from autocompress.techniques.technique import LayerProblem, Stage, unfolded
from autocompress.workload import Workload

_RANGE_SAMPLES = 64


@final
@dataclass(frozen=True)
class Variant:
    """The network with every layer that offers it at one precision.

    Attributes:
        precision: None for the float network.
        quantized: names of the layers that are at that precision.
        layers: for each block of the cut the name of its layer; empty for a block without one.
    """

    precision: Precision | None
    quantized: frozenset[str]
    cut: Cut
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Such as `fp32` or `w8 a8`."""
        if self.precision is None:
            return "fp32"
        return f"w{self.precision.weight_bits} a{self.precision.activation_bits}"


def find_variants(
    workload: Workload,
    graph: NetworkGraph,
    exporter: Exporter,
    space: Space,
    profile: DeviceProfile,
) -> tuple[Variant, ...]:
    """The float network first, then one variant for every precision on offer.

    Precisions that share one scale for a whole weight are left out: they run as those with a scale
    per channel.

    Raises:
        ExportError: a variant cannot be exported.
        MeasurementError: it cannot be cut into blocks.
    """
    offered: dict[Precision, set[str]] = {}
    for parameter in space.parameters:
        for decision in parameter.decisions:
            if (
                parameter.stage is Stage.QUANTIZE
                and isinstance(decision, Precision)
                and decision.granularity != "tensor"
            ):
                offered.setdefault(decision, set()).update(parameter.targets)
    floating = exporter.export(workload.network)
    found = [_variant(None, frozenset(), floating, floating.graph.model, profile)]
    inputs = [x[:_RANGE_SAMPLES].numpy() for x in workload.calibration.inputs]
    for decision, layers in offered.items():
        network = copy.deepcopy(workload.network)
        for name in layers:
            module = network.get_submodule(name)
            bias = cast("Tensor | None", module.bias)
            problem = LayerProblem(
                graph.layer(name), unfolded(module), bias, None, False, profile.channel_multiple
            )
            solved = PRECISION.solve(problem, decision)
            PRECISION.install(module, solved, decision, profile.channel_multiple)
        rounded = exporter.export(network)
        model = quantize(rounded, inputs, profile).model
        found.append(_variant(decision, frozenset(layers), rounded, model, profile))
    return tuple(found)


def _variant(
    precision: Precision | None,
    quantized: frozenset[str],
    floating: FloatModel,
    model: onnx.ModelProto,
    profile: DeviceProfile,
) -> Variant:
    cut = cut_model(model, profile.batch_size)
    layers: Mapping[str, str] = {
        layer_label(site.initializer): name for name, site in floating.graph.sites.items()
    }
    return Variant(precision, quantized, cut, tuple(layers.get(p.layer, "") for p in cut.placed))
