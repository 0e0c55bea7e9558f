"""Vector quantization: weights, or short vectors of weights, looked up in a codebook by k-means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.clustering import cluster_numbers, cluster_vectors, nearest_codeword
from autocompress.techniques.reconstruction import damped_moment
from autocompress.techniques.rounding import (
    Feedback,
    feedback_of,
    fitted_ratio,
    output_error,
    round_with_feedback,
)
from autocompress.techniques.technique import (
    CodebookWeight,
    LayerProblem,
    LayerTechnique,
    Stage,
    Variant,
    bias_of,
)

_SMALLEST_SCALE = 1e-12


@final
class Codebook(Decision):
    """Look a layer's weights up in a codebook of 2^code_bits entries.

    Attributes:
        kind: single weights (Han et al. 2016, Deep Compression, section 3) or vectors of
            neighbouring columns (Gong et al. 2014, product quantization).
        code_bits: of a code; 0 leaves the layer as it is.
        vector_length: columns per codeword of a product codebook.
    """

    technique: ClassVar[str] = "codebook"
    kind: Literal["scalar", "product"] = "scalar"
    code_bits: int = Field(ge=0, le=12)
    vector_length: Literal[2, 4, 8] = 4


@final
@dataclass(frozen=True)
class Size:
    """How large a codebook is.

    Attributes:
        codewords: K.
        width: columns of the unfolded weight per codeword.
    """

    codewords: int
    width: int

    @property
    def code_bits(self) -> int:
        """Bits of a stored code."""
        return next(bits for bits in (4, 8, 16) if self.codewords <= 2**bits)

    def stored_bytes(self, layer: Layer) -> int:
        """Bytes of packed codes, the codebook and a scale per row."""
        codes = layer.out_channels * layer.in_features // self.width
        return (
            -(-codes * self.code_bits // 8)
            + 4 * self.codewords * self.width
            + 4 * layer.out_channels
        )


def codebook_size(layer: Layer, bits: int, vector_length: int) -> Size:
    """The size of a codebook: never more codewords than there are vectors.

    Where rows of the layer, pruned or decomposed, hold no whole vectors, these are shorter.
    """
    width = math.gcd(layer.in_features, vector_length)
    return Size(min(2**bits, layer.out_channels * layer.in_features // width), width)


def pays(layer: Layer, size: Size) -> bool:
    """Whether the layer is stored smaller than in float."""
    return size.stored_bytes(layer) < 4 * layer.out_channels * layer.in_features


def _length(decision: Codebook) -> int:
    return 1 if decision.kind == "scalar" else decision.vector_length


def _size(layer: Layer, decision: Codebook) -> Size:
    return codebook_size(layer, decision.code_bits, _length(decision))


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Codebooks of whole vectors that make the layer smaller; of those of equal size the first."""
    distinct: dict[Size, Codebook] = {}
    for decision in offered:
        assert isinstance(decision, Codebook)
        size = _size(layer, decision)
        if decision.code_bits and size.width == _length(decision) and pays(layer, size):
            distinct.setdefault(size, decision)
    found = sorted(distinct.items(), key=lambda i: i[1].code_bits / i[0].width, reverse=True)
    return tuple(decision for _, decision in found)


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    """Codewords by k-means, then codes one column after another, each making up for the last.

    The clustering weighs a column by what an error of it costs in the end (the pivots of the
    moments). Weights that were pruned keep a codeword of zeros; of vectors those that are wholly
    zero. See `coded` for what is returned.
    """
    assert isinstance(decision, Codebook)
    if not decision.code_bits:
        return {}
    size = _size(problem.layer, decision)
    weight = problem.weight
    feedback = feedback_for(problem, size.width)
    frozen = problem.frozen.reshape(len(weight), -1, size.width).all(2)
    scale = row_scale(weight)
    vectors = (weight / scale).reshape(-1, size.width)
    cost = vector_cost(scale, feedback, size.width)
    alive = ~frozen.reshape(-1)
    free = size.codewords - int(not bool(alive.all()))
    cluster = cluster_numbers if size.width == 1 else cluster_vectors
    found = cluster(vectors[alive], cost[alive], max(1, free))
    codebook = torch.zeros(size.codewords, size.width)
    codebook[size.codewords - free :] = found[:free]
    codes = _assign(weight / scale, feedback, codebook, frozen)
    return coded(problem, feedback, Coded(codebook, codes, scale))


def feedback_for(problem: LayerProblem, width: int) -> Feedback:
    """The feedback of a layer; without statistics all columns count the same."""
    if problem.statistics is None:
        return feedback_of(torch.eye(problem.weight.shape[1], dtype=torch.float64), width)
    return feedback_of(damped_moment(problem.statistics, problem.free_bias), width)


def row_scale(weight: Tensor) -> Tensor:
    """The root mean square of each row's weights that are not zero, shape (out, 1)."""
    count = (weight != 0).sum(1, keepdim=True).clamp(min=1)
    return (weight.square().sum(1, keepdim=True) / count).sqrt().clamp(min=_SMALLEST_SCALE)


def vector_cost(scale: Tensor, feedback: Feedback, width: int) -> Tensor:
    """What a unit error of each vector, as a share of its row's scale, costs; (out * in / d,)."""
    columns = feedback.pivots.reshape(-1, width).mean(1)
    return (scale.square() * columns).reshape(-1)


def _assign(target: Tensor, feedback: Feedback, codebook: Tensor, frozen: Tensor) -> Tensor:
    """Codes, shape (out, in / d), of rows in units of their scales, with feedback."""
    width = codebook.shape[1]
    codes = torch.zeros_like(frozen, dtype=torch.int64)

    def rounder(part: slice, goal: Tensor, block: Tensor) -> Tensor:
        place = int(feedback.order[part.start]) // width
        found = nearest_codeword(goal @ block, codebook @ block)
        codes[:, place] = torch.where(frozen[:, place], 0, found)
        return codebook[codes[:, place]]

    round_with_feedback(target, feedback, rounder, width)
    return codes


@final
@dataclass(frozen=True)
class Coded:
    """A weight as in `CodebookWeight`: codebook (K, d), codes (out, in / d), scale (out, 1)."""

    codebook: Tensor
    codes: Tensor
    scale: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight that they stand for, shape (out, in)."""
        return self.scale * self.codebook[self.codes].reshape(len(self.codes), -1)


def coded(problem: LayerProblem, feedback: Feedback, found: Coded) -> Variant:
    """The tensors of `CodebookWeight`, the row scales fitted to the codes; and the lost mean."""
    ratio = fitted_ratio(problem.weight, found.weight, feedback)
    fitted = Coded(found.codebook, found.codes, found.scale * ratio)
    before = output_error(problem.weight - found.weight, feedback).sum()
    # An exact codebook stays exact: fitting would add the rounding of floats.
    if before <= output_error(problem.weight - fitted.weight, feedback).sum():
        fitted = found
    lost = problem.weight - fitted.weight
    shift = torch.zeros(len(lost))
    if problem.statistics is not None:
        shift = (lost.double() @ problem.statistics.mean).float()
    return {
        "codebook": fitted.codebook, "codes": fitted.codes, "scale": fitted.scale, "shift": shift,
    }  # fmt: skip


def install_codebook(module: nn.Module, variant: Variant) -> nn.Module:
    """Give a layer the weight that a codebook stands for, and the buffers of `CodebookWeight`."""
    found = Coded(variant["codebook"], variant["codes"], variant["scale"])
    weight, bias = cast(Tensor, module.weight), bias_of(module)
    with torch.no_grad():
        weight.copy_(found.weight.reshape(weight.shape))
        if bias is not None:
            bias.add_(variant["shift"])
    module.register_buffer("codebook", found.codebook.clone(), persistent=False)
    module.register_buffer("codes", found.codes.clone(), persistent=False)
    module.register_buffer("weight_scale", found.scale.clone(), persistent=False)
    size = Size(len(found.codebook), found.codebook.shape[1])
    module.codebook_weight = CodebookWeight(size.code_bits)  # type: ignore[assignment]
    return module


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    assert isinstance(decision, Codebook)
    return install_codebook(module, variant) if decision.code_bits else module


def _stored_bytes(layer: Layer, decision: Decision, multiple: int) -> int:
    assert isinstance(decision, Codebook)
    if not decision.code_bits:
        return 4 * layer.out_channels * layer.in_features
    return _size(layer, decision).stored_bytes(layer)


CODEBOOK = LayerTechnique(
    name=Codebook.technique,
    decision=Codebook,
    stage=Stage.QUANTIZE,
    identity=Codebook(code_bits=0),
    levels=(),
    choices=_choices,
    solve=_solve,
    install=_install,
    stored_bytes=_stored_bytes,
    kinds=("conv", "linear", "embedding"),
)
