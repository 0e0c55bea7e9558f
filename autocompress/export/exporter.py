"""A stitched network as a checked float ONNX model, from the skeleton where that is possible."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export.observe import run_float
from autocompress.export.skeleton import Graph, Skeleton, export_afresh
from autocompress.graph import NetworkGraph
from autocompress.graph.blocks import drop_blocks, dropped_blocks, is_within
from autocompress.graph.layers import flatten_outputs
from autocompress.graph.norms import fold_batch_norms
from autocompress.techniques.technique import CodebookWeight, IntegerWeight
from autocompress.workload import Axes, other_sizes

# Float logits may differ by this share of their largest magnitude: kernels sum in another order.
PARITY_TOLERANCE = 1e-3
# Of the changes that the graph must follow, as shares of a layer's mean weight.
_NOISE, _LEAST_NOISE = 0.1, 0.1
# Graphs without some blocks, each without the weights, that are kept at a time.
_MOST_SKELETONS = 8
_INTEGERS, _CODEBOOK = "integer_weight", "codebook_weight"


@final
@dataclass(frozen=True)
class StoredIntegers:
    """A layer's weight and inputs as integers.

    Attributes:
        how: bits, granularity and calibration.
        scale: shape (out, groups), as in `IntegerWeight`; batch norms are folded into it.
        input_range: trained scale and zero point of the inputs; None to find them by calibration.
    """

    how: IntegerWeight
    scale: NDArray[np.float32]
    input_range: tuple[float, int] | None


@final
@dataclass(frozen=True)
class StoredCodebook:
    """A layer's weight as codewords: `scale * codebook[codes].reshape(out, in)`.

    Attributes:
        how: bits per code.
        codebook: shape (K, d).
        codes: shape (out, in / d), int64.
        scale: shape (out, 1); batch norms are folded into it.
    """

    how: CodebookWeight
    codebook: NDArray[np.float32]
    codes: NDArray[np.int64]
    scale: NDArray[np.float32]


@final
@dataclass(frozen=True)
class FloatModel:
    """A candidate's float ONNX model that was checked against its PyTorch network.

    Attributes:
        graph: the model and where each layer's weight stands.
        integers: by initializer name, the layers whose weights or inputs are to be integers.
        codebooks: by initializer name, the layers whose weights are made of codewords.
        parity: largest logit difference against PyTorch, as a share of the largest logit.
        fresh: whether the skeleton did not fit and the network was exported afresh.
    """

    graph: Graph
    integers: Mapping[str, StoredIntegers]
    codebooks: Mapping[str, StoredCodebook]
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
        axes: those that are open besides the batch, compared at another size too.

    Attributes:
        faults: by a layer's name why its weight cannot be changed in the ONNX graph.

    Raises:
        ExportError: the original network cannot be exported.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: NetworkGraph,
        example_inputs: tuple[Tensor, ...],
        parity_inputs: tuple[Tensor, ...],
        axes: Sequence[Axes] = (),
    ) -> None:
        self._network, self._blocks = network, graph.blocks
        self._norms = graph.norms
        self._layers = tuple(layer.name for layer in graph.layers)
        self._example_inputs = example_inputs
        self._axes = tuple(axes)
        other = other_sizes(network, parity_inputs, axes)
        self._parity_inputs = (parity_inputs, *([] if other is None else [other]))
        folded = fold_batch_norms(network, self._norms)
        self._skeleton = Skeleton(folded, example_inputs, self._layers, self._axes)
        self._without: OrderedDict[tuple[str, ...], Skeleton] = OrderedDict()
        plain = [layer.name for layer in graph.layers if layer.compressible]
        self.faults = {
            name: self._skeleton.faults[name] for name in plain if name in self._skeleton.faults
        }
        self.faults |= self._unfollowed(folded, [n for n in plain if n not in self.faults])

    def export(self, network: nn.Module) -> FloatModel:
        """The float model of a stitched network, checked.

        Raises:
            ExportError: the model is invalid, or its outputs differ from the network's by more
                than `PARITY_TOLERANCE`.
        """
        folded = fold_batch_norms(network, self._norms)
        with torch.no_grad():
            expected = [flatten_outputs(network(*inputs)) for inputs in self._parity_inputs]
        gone = dropped_blocks(network)
        try:
            graph, fresh = self._skeleton_without(gone).fill(folded), False
            parity = self._check(graph, expected)
        except ExportError:
            # A channel count that the graph holds as a constant: only a new export knows it.
            example, layers = self._example_inputs, self._layers_without(gone)
            graph, fresh = export_afresh(folded, example, layers, self._axes), True
            parity = self._check(graph, expected)
        return FloatModel(graph, *_stored_weights(folded, graph), parity, fresh)

    def _layers_without(self, gone: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in self._layers if not is_within(name, gone))

    def _skeleton_without(self, gone: tuple[str, ...]) -> Skeleton:
        """The graph without some blocks, made on first use; the last few are kept."""
        if not gone:
            return self._skeleton
        # Taken out and put back: another thread may be looking for one too.
        found = self._without.pop(gone, None)
        if found is None:
            network = copy.deepcopy(self._network)
            drop_blocks(network, [block for block in self._blocks if block.name in gone])
            folded = fold_batch_norms(network, self._norms)
            layers = self._layers_without(gone)
            found = Skeleton(folded, self._example_inputs, layers, self._axes)
        self._without[gone] = found
        while len(self._without) > _MOST_SKELETONS:
            self._without.popitem(last=False)
        return found

    def _unfollowed(self, folded: nn.Module, layers: Sequence[str]) -> dict[str, str]:
        """Layers whose changes do not reach the graph, as where it holds a copy of the weight."""
        if self._follows(folded, layers) or not self._follows(folded, ()):
            return {}
        wrong = [name for name in layers if not self._follows(folded, (name,))]
        return dict.fromkeys(wrong, "a change of its weight does not reach the ONNX graph")

    def _follows(self, folded: nn.Module, layers: Sequence[str]) -> bool:
        """Whether the skeleton computes what the network does after small changes of layers."""
        changed = shaken(folded, layers)
        with torch.no_grad():
            expected = [flatten_outputs(changed(*inputs)) for inputs in self._parity_inputs]
        try:
            self._check(self._skeleton.fill(changed), expected)
        except ExportError:
            return False
        return True

    def _check(self, graph: Graph, expected: Sequence[Sequence[Tensor]]) -> float:
        try:
            onnx.checker.check_model(graph.model)
        except onnx.checker.ValidationError as cause:
            raise ExportError(f"The ONNX file is invalid: {cause}") from cause
        worst = 0.0
        for inputs, wanted in zip(self._parity_inputs, expected, strict=True):
            outputs = run_float(graph.model, [x.numpy() for x in inputs], ())
            # Not Python's max, which would drop a NaN.
            worst = float(np.maximum(worst, _difference(outputs, wanted)))
        if not worst <= PARITY_TOLERANCE:
            raise ExportError(
                "The ONNX file does not compute what the network computes.",
                given=f"outputs that differ by {worst:.2g} of their largest value",
                allowed=f"at most {PARITY_TOLERANCE:g}",
            )
        return worst


def _difference(outputs: Sequence[NDArray[np.float32]], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the output's largest magnitude; may be NaN.

    Raises:
        ExportError: an output has another shape.
    """
    worst = 0.0
    for name, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        reference = wanted.detach().numpy()
        if found.shape != reference.shape:
            raise ExportError(
                f"Output {name} has another shape in ONNX.",
                given=found.shape, allowed=reference.shape,
            )  # fmt: skip
        # Masks and numbers of classes are outputs too, which cannot be subtracted as they are.
        apart = np.abs(found.astype(np.float64) - reference).max(initial=0)
        scale = float(np.abs(reference).max(initial=0)) or 1.0
        worst = float(np.maximum(worst, apart / scale))
    return worst


def shaken(network: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A copy of a network with noise on the weights and biases of some layers."""
    changed = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in layers:
            for parameter in changed.get_submodule(name).parameters():
                size = _NOISE * (float(parameter.abs().mean()) or _LEAST_NOISE)
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return changed


def _stored_weights(
    folded: nn.Module, graph: Graph
) -> tuple[dict[str, StoredIntegers], dict[str, StoredCodebook]]:
    integers: dict[str, StoredIntegers] = {}
    codebooks: dict[str, StoredCodebook] = {}
    for name, module in folded.named_modules():
        integer, codebook = (getattr(module, a, None) for a in (_INTEGERS, _CODEBOOK))
        if integer is None and codebook is None:
            continue
        if name not in graph.sites:
            raise ExportError(
                "The weight of a layer to be quantized cannot be found in the ONNX graph.",
                given=name,
                advice="leave the layer out with `exclude` in the search space",
            )
        site = graph.sites[name].initializer
        values = {key: buffer.numpy() for key, buffer in module.named_buffers(recurse=False)}
        if integer is not None:
            found = values.get("input_scale")
            trained = None
            if found is not None:
                trained = (float(found), int(values["input_zero_point"]))
            integers[site] = StoredIntegers(integer, values["weight_scale"], trained)
        else:
            assert codebook is not None
            codebooks[site] = StoredCodebook(
                codebook, values["codebook"], values["codes"], values["weight_scale"]
            )
    return integers, codebooks
