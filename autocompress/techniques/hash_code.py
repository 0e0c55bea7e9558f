"""Hash coding: vectors of weights share codewords by a hash function, without any clustering.

Chen et al. 2015 (HashedNets) hash a weight's place, since their networks are trained with it. For
a trained network the hash is taken of the weights themselves and is locality sensitive: signs of
random planes (Charikar 2002), shifted off the origin so that lengths count too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.codebook import (
    Coded,
    Size,
    coded,
    feedback_for,
    install_codebook,
    pays,
    row_scale,
    vector_cost,
)
from autocompress.techniques.technique import LayerProblem, LayerTechnique, Stage, Variant

_SEED = 0


@final
class HashCode(Decision):
    """Hash a layer's weight vectors to codewords, each the mean of its bucket.

    Attributes:
        hash_bits: planes that are drawn, so there are 2^hash_bits buckets; 0 leaves the layer as
            it is.
        vector_length: neighbouring columns of the unfolded weight that make a vector.
    """

    technique: ClassVar[str] = "hash_code"
    hash_bits: int = Field(ge=0, le=12)
    vector_length: Literal[1, 2, 4, 8] = 2


def hash_vectors(vectors: Tensor, bits: int) -> Tensor:
    """The bucket of each vector, shape (n,), int64 below 2^bits; vectors (n, d), of unit power."""
    generator = torch.Generator().manual_seed(_SEED)
    width = vectors.shape[1]
    planes = torch.randn(width, bits, generator=generator)
    planes = planes / planes.norm(dim=0)
    offsets = torch.randn(bits, generator=generator)
    signs = (vectors @ planes > offsets).long()
    buckets: Tensor = (signs << torch.arange(bits)).sum(1)
    return buckets


def _size(layer: Layer, decision: HashCode) -> Size:
    """Like that of a codebook, but all buckets are kept."""
    width = math.gcd(layer.in_features, decision.vector_length)
    return Size(2**decision.hash_bits, width)


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Hashes of whole vectors that make the layer smaller; no more buckets than vectors."""
    weights = layer.out_channels * layer.in_features
    found: list[HashCode] = []
    for decision in offered:
        assert isinstance(decision, HashCode)
        size = _size(layer, decision)
        whole = size.width == decision.vector_length
        few = size.codewords * size.width <= weights
        if decision.hash_bits and whole and few and pays(layer, size):
            found.append(decision)
    return tuple(sorted(found, key=lambda d: d.hash_bits / d.vector_length, reverse=True))


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    """Codewords are the weighted means of their buckets; see `codebook.coded`."""
    assert isinstance(decision, HashCode)
    if not decision.hash_bits:
        return {}
    size = _size(problem.layer, decision)
    feedback = feedback_for(problem, size.width)
    scale = row_scale(problem.weight)
    vectors = (problem.weight / scale).reshape(-1, size.width)
    cost = vector_cost(scale, feedback, size.width)
    codes = hash_vectors(vectors, decision.hash_bits)
    mass = torch.zeros(size.codewords).index_add_(0, codes, cost)
    sums = torch.zeros(size.codewords, size.width).index_add_(0, codes, vectors * cost[:, None])
    codebook = sums / mass.clamp(min=1e-30)[:, None]
    return coded(problem, feedback, Coded(codebook, codes.reshape(len(scale), -1), scale))


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    assert isinstance(decision, HashCode)
    return install_codebook(module, variant) if decision.hash_bits else module


def _stored_bytes(layer: Layer, decision: Decision, multiple: int) -> int:
    assert isinstance(decision, HashCode)
    if not decision.hash_bits:
        return 4 * layer.out_channels * layer.in_features
    return _size(layer, decision).stored_bytes(layer)


HASH_CODE = LayerTechnique(
    name=HashCode.technique,
    decision=HashCode,
    stage=Stage.QUANTIZE,
    identity=HashCode(hash_bits=0),
    levels=(),
    choices=_choices,
    solve=_solve,
    install=_install,
    stored_bytes=_stored_bytes,
)
