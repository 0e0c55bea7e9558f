"""Weighted k-means of numbers and of short vectors (Lloyd 1982), on fixed random starts."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 40
_VECTOR_ROUNDS = 15
_BINS = 4096
# Distances of so many pairs are held at once.
_PAIRS = 1 << 22


def cluster_numbers(values: Tensor, cost: Tensor, codewords: int) -> Tensor:
    """Codewords in ascending order, shape (codewords, 1).

    As many as there are distinct values reproduce them exactly; further ones are zero.

    Args:
        values: shape (n, 1).
        cost: of a unit error of each value, shape (n,).
    """
    flat = values.reshape(-1)
    distinct = torch.unique(flat)
    if len(distinct) <= codewords:
        return torch.nn.functional.pad(distinct, (0, codewords - len(distinct)))[:, None]
    flat, order = flat.sort()
    weight = cost.double()[order]
    sums = torch.nn.functional.pad((weight * flat).cumsum(0), (1, 0))
    masses = torch.nn.functional.pad(weight.cumsum(0), (1, 0))
    centres = _spread(flat, weight, codewords)
    for _ in range(_ROUNDS):
        # In one dimension clusters are intervals of the sorted values.
        middles = (centres[1:] + centres[:-1]) / 2
        inner = torch.searchsorted(flat, middles)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(flat))])
        mass = masses[edges].diff()
        means = (sums[edges].diff() / mass.clamp(min=1e-30)).float()
        moved = torch.where(mass > 0, means, centres).sort().values
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres[:, None]


def _spread(values: Tensor, weight: Tensor, count: int) -> Tensor:
    """Starting points at quantiles of the cube root of the density, shape (count,).

    That is the optimal density of many codewords (Panter & Dite 1951).
    """
    low, high = float(values[0]), float(values[-1])
    index = ((values - low) / (high - low) * (_BINS - 1)).round().long()
    density = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, index, weight)
    steps = density.clamp(min=0).pow(1 / 3).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * steps[-1]
    bins = torch.searchsorted(steps, wanted).clamp(max=_BINS - 1)
    return (low + bins.float() / (_BINS - 1) * (high - low)).sort().values


def cluster_vectors(vectors: Tensor, cost: Tensor, codewords: int) -> Tensor:
    """Codewords, shape (codewords, d); as many as distinct vectors reproduce them exactly.

    Starts from vectors drawn by their share of the error of the mean; an empty cluster moves to
    the vector with the largest error.

    Args:
        vectors: shape (n, d).
        cost: of a unit error of each vector, shape (n,).
    """
    distinct = torch.unique(vectors, dim=0)
    if len(distinct) <= codewords:
        return torch.nn.functional.pad(distinct, (0, 0, 0, codewords - len(distinct)))
    generator = torch.Generator().manual_seed(0)
    share = (vectors.square().sum(1) * cost).double() + 1e-30
    # Drawn without replacement (Efraimidis & Spirakis 2006): the largest of u^(1/share).
    drawn = torch.rand(len(share), generator=generator, dtype=torch.float64)
    keys = drawn.clamp(min=1e-300).log() / share
    centres = vectors[keys.topk(codewords).indices].clone()
    for _ in range(_VECTOR_ROUNDS):
        codes, errors = _nearest(vectors, centres)
        mass = torch.zeros(codewords).index_add_(0, codes, cost)
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors * cost[:, None])
        empty = mass <= 0
        centres = torch.where(empty[:, None], centres, sums / mass.clamp(min=1e-30)[:, None])
        if bool(empty.any()):
            worst = (errors * cost).topk(int(empty.sum())).indices
            centres[empty] = vectors[worst]
    return centres


def nearest_codeword(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codeword of each vector, shape (n,), int64; vectors (n, d), codebook (K, d)."""
    return _nearest(vectors, codebook)[0]


def _nearest(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and squared distances of vectors, (n,) each."""
    codes, errors = [], []
    for part in torch.split(vectors, max(1, _PAIRS // len(codebook))):
        # By differences: a matrix product cannot tell near codewords apart.
        distances = torch.cdist(part, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        near = distances.min(1)
        codes.append(near.indices)
        errors.append(near.values.square())
    return torch.cat(codes), torch.cat(errors)
