"""Low-rank decomposition: one layer becomes two to four smaller ones, run one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.errors import PlanError
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.cp import cp_factors
from autocompress.techniques.decomposed import (
    Kind,
    build_parts,
    fits,
    kept_rank,
    parts_of,
    ranks,
    share_of_work,
)
from autocompress.techniques.factors import column_moment
from autocompress.techniques.spatial_svd import spatial_factors
from autocompress.techniques.technique import LayerProblem, LayerTechnique, Stage, Variant
from autocompress.techniques.tucker import tucker_factors

_MEAN = "mean"
# What an entry of an embedding that is never read counts, against the mean of all.
_UNREAD = 0.1


@final
class LowRank(Decision):
    """Keep this share of a layer's full rank (see `decomposed.ranks`).

    Attributes:
        kind: `svd` of the unfolded weight; `spatial` (k x 1, then 1 x k), `tucker` (pointwise,
            k x k on fewer channels, pointwise) and `cp` (pointwise, depthwise k x 1, depthwise
            1 x k, pointwise) for convolutions with a kernel.
        data_aware: whether the output error on calibration data is minimised, or the weight's.
    """

    technique: ClassVar[str] = "low_rank"
    rank_ratio: float = Field(gt=0, le=1)
    kind: Kind = "svd"
    data_aware: bool = True


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Kinds and ranks that need fewer multiply-accumulates than the layer, the dearest first."""
    seen = set[tuple[str, bool, tuple[int, ...]]]()
    kept: list[tuple[float, Decision]] = []
    for decision in offered:
        assert isinstance(decision, LowRank)
        if not fits(layer, decision.kind):
            continue
        found = ranks(layer, decision.kind, decision.rank_ratio, device.channel_multiple)
        share = share_of_work(layer, parts_of(layer, decision.kind, found), layer.stride)
        key = (decision.kind, decision.data_aware, found)
        if share < 1 and key not in seen:
            seen.add(key)
            kept.append((share, decision))
    return tuple(decision for _, decision in sorted(kept, key=lambda pair: -pair[0]))


def _shares_solve(decision: Decision) -> bool:
    """Only the SVD is nested: the others' parts are fitted to each other at each rank."""
    assert isinstance(decision, LowRank)
    return decision.kind == "svd"


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    """The parts' weights, by their order, and the mean input.

    Raises:
        PlanError: the layer cannot be decomposed so, or a CP fit is degenerate.
    """
    assert isinstance(decision, LowRank)
    if problem.layer.kind == "embedding":
        return _embedding_factors(problem, data_aware=decision.data_aware)
    layer, known = problem.layer, problem.statistics if decision.data_aware else None
    _check(layer, decision.kind)
    # Solvers fit to the moments of a problem's inputs, or without them to its weight alone.
    problem = replace(problem, statistics=known)
    kept = ranks(layer, decision.kind, decision.rank_ratio, problem.multiple)
    parts: tuple[Tensor, ...]
    if decision.kind == "spatial":
        parts = spatial_factors(problem, kept[0])
    elif decision.kind == "tucker":
        parts = tucker_factors(problem, (kept[0], kept[1]))
    elif decision.kind == "cp":
        parts = cp_factors(problem, kept[0])
    else:
        parts = _svd_factors(problem)
    mean = torch.zeros(layer.in_features) if known is None else known.mean.float()
    return {**{str(i): part for i, part in enumerate(parts)}, _MEAN: mean}


def _check(layer: Layer, kind: Kind) -> None:
    if layer.groups > 1:
        raise PlanError(
            "A grouped convolution cannot be decomposed.",
            given=f"{layer.name} with {layer.groups} groups",
            allowed="linear layers, and convolutions of one group",
        )
    if layer.undivided:
        raise PlanError(f"Layer {layer.name} cannot be decomposed: {layer.undivided}.")
    if not fits(layer, kind):
        raise PlanError(
            f"A layer cannot be decomposed by kind {kind}.",
            given=f"{layer.name}, kernel {layer.kernel_size or 'none'}",
            allowed="spatial: both dimensions of a 2-d kernel above 1; tucker and cp: one of them",
            advice="take kind svd, which suits every layer",
        )


def _svd_factors(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Factors of every rank from one decomposition: W L = U S Vᵀ with H = L Lᵀ.

    The first r columns of `U √S` times the first r rows of `√S Vᵀ L⁻¹` are the rank-r weight with
    the least output error on the calibration data (Yuan et al. 2023, ASVD; Wang et al. 2024,
    SVD-LLM, theorem 3.2).

    Returns:
        Shapes (rank, c, *kernel) and (out, rank, 1...), float32.
    """
    weight = problem.weight.double()
    root = torch.linalg.cholesky(column_moment(problem))
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    split = s.sqrt()
    right = torch.linalg.solve_triangular(root, split[:, None] * vt, upper=False, left=False)
    kernel = problem.layer.kernel_size
    first = right.reshape(len(right), problem.layer.in_channels, *kernel)
    second = (u * split).reshape(len(u), -1, *(1 for _ in kernel))
    return first.float().contiguous(), second.float().contiguous()


def _embedding_factors(problem: LayerProblem, *, data_aware: bool) -> Variant:
    """A table and a linear layer of every rank, of an embedding.

    With a table W and how often each entry is read as D, the directions are the eigenvectors of
    `Wᵀ D W`: no others keep more of what is read. Entries never read count a little.

    Returns:
        The entries' coordinates, shape (entries, width), and the directions, shape (width, width),
        the most important ones first in the last dimension of both.
    """
    weight = problem.weight.double()
    counts = problem.usage if data_aware else None
    usage = torch.ones(len(weight)).double() if counts is None else counts / counts.sum().clamp(1)
    usage = usage / usage.mean().clamp(min=1e-30) + _UNREAD
    _, directions = torch.linalg.eigh(weight.T @ (usage[:, None] * weight))
    directions = directions.flip(1)
    return {"0": (weight @ directions).float(), "1": directions.float().contiguous()}


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    assert isinstance(decision, LowRank)
    if isinstance(module, nn.Embedding):
        table, directions = variant["0"], variant["1"]
        full = min(table.shape)
        rank = kept_rank(full, decision.rank_ratio, multiple)
        narrow = nn.Embedding(len(table), rank, module.padding_idx)
        narrow.weight = nn.Parameter(table[:, :rank].clone())
        linear = nn.Linear(rank, module.embedding_dim, bias=False)
        linear.weight = nn.Parameter(directions[:, :rank].clone())
        return nn.Sequential(narrow, linear).train(module.training)
    parts = [variant[str(i)] for i in range(len(variant) - 1)]
    if decision.kind == "svd":
        rank = kept_rank(len(parts[0]), decision.rank_ratio, multiple)
        parts = [parts[0][:rank], parts[1][:, :rank]]
    return build_parts(module, parts, variant[_MEAN])


def _stored_bytes(layer: Layer, decision: Decision, multiple: int) -> int:
    assert isinstance(decision, LowRank)
    kept = ranks(layer, decision.kind, decision.rank_ratio, multiple)
    return 4 * sum(part.weights for part in parts_of(layer, decision.kind, kept))


LOW_RANK = LayerTechnique(
    name=LowRank.technique,
    decision=LowRank,
    stage=Stage.DECOMPOSE,
    identity=LowRank(rank_ratio=1),
    levels=("rank_ratio",),
    choices=_choices,
    solve=_solve,
    install=_install,
    stored_bytes=_stored_bytes,
    shares_solve=_shares_solve,
    kinds=("conv", "linear", "embedding"),
)
