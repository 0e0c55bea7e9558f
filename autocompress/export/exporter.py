"""A stitched network as a checked float ONNX model, from the skeleton where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export.fold import fold_batch_norms
from autocompress.export.observe import run_float
from autocompress.export.skeleton import Graph, Skeleton, export_afresh
from autocompress.graph import NetworkGraph
from autocompress.graph.layers import flatten_outputs

# Float logits may differ by this share of their largest magnitude: kernels sum in another order.
PARITY_TOLERANCE = 1e-3


@final
@dataclass(frozen=True)
class FloatModel:
    """A candidate's float ONNX model that was checked against its PyTorch network.

    Attributes:
        graph: the model and where each layer's weight stands.
        scales: weight scales by initializer name for the layers that are to run in int8.
        parity: largest logit difference against PyTorch, as a share of the largest logit.
        fresh: whether the skeleton did not fit and the network was exported afresh.
    """

    graph: Graph
    scales: Mapping[str, NDArray[np.float32]]
    parity: float
    fresh: bool


@final
class Exporter:
    """Exports candidates of one network.

    Args:
        network: the original, in evaluation mode.
        graph: its structure.
        example_inputs: batch in dimension 0.
        parity_inputs: a few calibration inputs on which PyTorch and ONNX are compared.

    Raises:
        ExportError: the original network cannot be exported.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: NetworkGraph,
        example_inputs: tuple[Tensor, ...],
        parity_inputs: tuple[Tensor, ...],
    ) -> None:
        self._norms = graph.norms
        self._layers = tuple(layer.name for layer in graph.layers)
        self._example_inputs = example_inputs
        self._parity_inputs = parity_inputs
        folded = fold_batch_norms(network, self._norms)
        self._skeleton = Skeleton(folded, example_inputs, self._layers)

    def export(self, network: nn.Module) -> FloatModel:
        """The float model of a stitched network, checked.

        Raises:
            ExportError: the model is invalid, or its outputs differ from the network's by more
                than `PARITY_TOLERANCE`.
        """
        folded = fold_batch_norms(network, self._norms)
        with torch.no_grad():
            expected = flatten_outputs(network(*self._parity_inputs))
        try:
            graph, fresh = self._skeleton.fill(folded), False
            parity = self._check(graph, expected)
        except ExportError:
            # A channel count that the graph holds as a constant: only a new export knows it.
            graph, fresh = export_afresh(folded, self._example_inputs, self._layers), True
            parity = self._check(graph, expected)
        return FloatModel(graph, _weight_scales(folded, graph), parity, fresh)

    def _check(self, graph: Graph, expected: Sequence[Tensor]) -> float:
        try:
            onnx.checker.check_model(graph.model)
        except onnx.checker.ValidationError as cause:
            raise ExportError(f"The ONNX file is invalid: {cause}") from cause
        inputs = [x.numpy() for x in self._parity_inputs]
        outputs = run_float(graph.model, inputs, ())
        worst = 0.0
        for name, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
            reference = wanted.detach().numpy()
            if found.shape != reference.shape:
                raise ExportError(
                    f"Output {name} has another shape in ONNX.",
                    given=found.shape, allowed=reference.shape,
                )  # fmt: skip
            scale = float(np.abs(reference).max()) or 1.0
            # Not Python's max, which would drop a NaN.
            worst = float(np.maximum(worst, np.abs(found - reference).max() / scale))
        if not worst <= PARITY_TOLERANCE:
            raise ExportError(
                "The ONNX file does not compute what the network computes.",
                given=f"outputs that differ by {worst:.2g} of their largest value",
                allowed=f"at most {PARITY_TOLERANCE:g}",
            )
        return worst


def _weight_scales(folded: nn.Module, graph: Graph) -> dict[str, NDArray[np.float32]]:
    scales = {}
    for name, site in graph.sites.items():
        scale = getattr(folded.get_submodule(name), "weight_scale", None)
        if isinstance(scale, Tensor):
            scales[site.initializer] = scale.numpy()
    wanted = {n for n, m in folded.named_modules() if hasattr(m, "weight_scale")}
    missing = sorted(wanted - set(graph.sites))
    if missing:
        raise ExportError(
            "The weight of a layer to be quantized cannot be found in the ONNX graph.",
            given=", ".join(missing),
            advice="leave the layer out with `exclude` in the search space",
        )
    return scales
