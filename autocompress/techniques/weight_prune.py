"""Weight pruning: single weights become zero, anywhere in a layer or N of every M.

A dense kernel multiplies zeros as fast as any number, so a layer that lost weights is *not* faster,
its ONNX file not smaller and it needs no less memory. It pays in bytes to download, once the file
is coded, and where a runtime has kernels for a 2:4 pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.device import DeviceProfile
from autocompress.errors import PlanError
from autocompress.graph import Layer
from autocompress.plan import Decision
from autocompress.techniques.reconstruction import damped_moment, dead_columns
from autocompress.techniques.sparsity import (
    FREE,
    Groups,
    by_group_score,
    by_score,
    merged,
    refitted,
    remove,
)
from autocompress.techniques.technique import (
    LayerProblem,
    LayerTechnique,
    Stage,
    Variant,
    bias_of,
)

# Weights of the reconstruction rule are kept at every multiple of one in so many.
_STEPS = 20


@final
class WeightPrune(Decision):
    """Make this share of a layer's weights zero.

    Attributes:
        sparsity: realised at the nearest multiple of 0.05. An N:M pattern has only one sparsity
            (0.5, 0.75, 0.5); with another the decision is neither offered nor installed.
        pattern: `N:M` keeps N of every M consecutive input channels at the same kernel position.
        criterion: which weights go: `obs`, those that the others can make up for, with the others
            refitted to the layer's output (the optimal brain surgeon; by magnitude in grouped
            convolutions, which have no statistics); `magnitude`, the smallest; `gradient`, those
            of the least w² E[g²], the expected growth of the loss (needs gradients, which grouped
            convolutions and decomposed layers do not have).
    """

    technique: ClassVar[str] = "weight_prune"
    sparsity: float = Field(ge=0, le=0.95)
    pattern: Literal["unstructured", "2:4", "1:4", "4:8"] = "unstructured"
    criterion: Literal["obs", "magnitude", "gradient"] = "obs"


def kept_sparsity(sparsity: float) -> float:
    """The sparsity that is realised: the nearest multiple of 0.05."""
    return round(sparsity * _STEPS) / _STEPS


def pattern_sparsity(pattern: str) -> float | None:
    """The sparsity of an N:M pattern; None for `unstructured`."""
    if pattern == "unstructured":
        return None
    kept, size = map(int, pattern.split(":"))
    return 1 - kept / size


def eased(decision: WeightPrune, share: float) -> WeightPrune:
    """A step on the way to a decision, for gradual pruning: this share of its sparsity.

    An N:M pattern has no half-way: it is the whole decision from the first step on.
    """
    if decision.pattern != "unstructured":
        return decision
    return decision.model_copy(update={"sparsity": decision.sparsity * share})


def _groups(pattern: str, layer: Layer) -> Groups:
    if pattern == "unstructured":
        return FREE
    kept, size = map(int, pattern.split(":"))
    return Groups(size - kept, size, layer.columns_per_channel)


def _removed(size: int, sparsity: float) -> int:
    """How many of a layer's weights go; one always stays."""
    return min(round(size * kept_sparsity(sparsity)), size - 1)


def _divides(layer: Layer, pattern: str) -> bool:
    return layer.in_channels // layer.groups % _groups(pattern, layer).size == 0


def _choices(
    layer: Layer, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Decisions that can be done and differ in what they do."""
    seen = set[tuple[str, str, int]]()
    kept: list[WeightPrune] = []
    for decision in offered:
        assert isinstance(decision, WeightPrune)
        count = _removed(layer.out_channels * layer.in_features, decision.sparsity)
        criterion = decision.criterion
        if layer.groups > 1 and criterion == "obs":
            criterion = "magnitude"
        key = (decision.pattern, criterion, count)
        possible = _consistent(decision) and _divides(layer, decision.pattern)
        known = layer.groups == 1 or criterion != "gradient"
        if count and possible and known and key not in seen:
            seen.add(key)
            kept.append(decision)
    return tuple(sorted(kept, key=lambda d: kept_sparsity(d.sparsity)))


def _consistent(decision: WeightPrune) -> bool:
    return pattern_sparsity(decision.pattern) in (None, kept_sparsity(decision.sparsity))


def _solve(problem: LayerProblem, decision: Decision) -> Variant:
    """What goes and what is left, at every sparsity.

    Returns:
        `order`: flat indices of the weights in the order of removal, int32; `values`, only of the
        reconstruction rule: the weights that stay, row after row, for one multiple of 0.05 after
        another; `mean`: of the inputs, where it is known.

    Raises:
        PlanError: the input channels are no multiple of M, or there are no gradients.
    """
    assert isinstance(decision, WeightPrune)
    layer = problem.layer
    if not _divides(layer, decision.pattern):
        raise PlanError(
            f"The input channels of layer '{layer.name}' cannot be grouped.",
            given=f"{layer.in_channels // layer.groups} for the pattern {decision.pattern}",
            allowed=f"a multiple of {_groups(decision.pattern, layer).size}",
            advice="prune it unstructured",
        )
    if decision.criterion == "obs" and problem.statistics is not None:
        variant = _reconstructed(problem, _groups(decision.pattern, layer))
    else:
        score = _score(problem, decision)
        free = decision.pattern == "unstructured"
        order = by_score(score) if free else by_group_score(score, _groups(decision.pattern, layer))
        variant = {"order": order.int()}
    if problem.statistics is not None:
        variant["mean"] = problem.statistics.mean.float()
    return variant


def _score(problem: LayerProblem, decision: WeightPrune) -> Tensor:
    """Importance of every weight by a rule without update, shape (out, in).

    The gradient's is the diagonal of optimal brain damage (LeCun et al. 1989, eq. 5) with the
    Fisher information in place of the Hessian.
    """
    if decision.criterion != "gradient":
        return problem.weight.abs()
    if problem.gradients is None:
        raise PlanError(
            f"Layer '{problem.layer.name}' has no gradients to prune by.",
            given="a grouped convolution, or a part of a decomposed layer",
            allowed="the criteria obs and magnitude",
        )
    return problem.weight.square() * problem.gradients.fisher


def _reconstructed(problem: LayerProblem, groups: Groups) -> dict[str, Tensor]:
    statistics = problem.statistics
    assert statistics is not None
    moment = damped_moment(statistics, problem.free_bias)
    # A dead column costs nothing: its damping alone would price a large weight.
    alive = ~dead_columns(statistics, problem.free_bias)
    weight = problem.weight * alive
    removal = remove(weight, moment, groups)
    order = merged(removal)
    if groups is not FREE:
        levels = [len(order)]
    else:
        levels = [_removed(weight.numel(), step / _STEPS) for step in range(1, _STEPS)]
    values = []
    for count in levels:
        left = refitted(weight, moment, removal, order[:count])
        values.append(left.reshape(-1)[_kept(weight.numel(), order[:count])])
    return {"order": order[: levels[-1]].int(), "values": torch.cat(values)}


def _kept(size: int, gone: Tensor) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[gone.long()] = False
    return kept


def _install(module: nn.Module, variant: Variant, decision: Decision, multiple: int) -> nn.Module:
    """Write the weights, and leave the buffer `weight_mask`: True where a weight stays.

    Raises:
        PlanError: the sparsity is not that of the N:M pattern.
    """
    assert isinstance(decision, WeightPrune)
    if not _consistent(decision):
        raise PlanError(
            f"The pattern {decision.pattern} has another sparsity.",
            given=decision.sparsity,
            allowed=f"{pattern_sparsity(decision.pattern)}",
        )
    weight, bias = cast(Tensor, module.weight), bias_of(module)
    size = weight.numel()
    count = len(variant["order"])
    if decision.pattern == "unstructured":
        count = _removed(size, decision.sparsity)
    if not count:
        return module
    kept = _kept(size, variant["order"][:count])
    before = weight.detach().reshape(-1)
    after = torch.where(kept, before, 0)
    if "values" in variant:
        after[kept] = _values(variant["values"], size, decision)
    with torch.no_grad():
        if bias is not None and "mean" in variant:
            # What the lost weights contributed on average goes into the bias.
            bias.add_((before - after).reshape(len(weight), -1) @ variant["mean"])
        weight.copy_(after.reshape(weight.shape))
    mask = kept.reshape(weight.shape)
    module.register_buffer("weight_mask", mask.to(weight.device), persistent=False)
    return module


def _values(values: Tensor, size: int, decision: WeightPrune) -> Tensor:
    """The weights that stay at the decision's sparsity, of those of every sparsity."""
    if decision.pattern != "unstructured":
        return values
    level = round(decision.sparsity * _STEPS)
    left = [size - _removed(size, step / _STEPS) for step in range(1, level + 1)]
    return values[sum(left[:-1]) : sum(left)]


def _stored_bytes(layer: Layer, decision: Decision, multiple: int) -> int:
    """Zeros are stored like any other number: only the coded container leaves them out."""
    return 4 * layer.out_channels * layer.in_features


def _uses_gradients(decision: Decision) -> bool:
    assert isinstance(decision, WeightPrune)
    return decision.criterion == "gradient"


WEIGHT_PRUNE = LayerTechnique(
    name=WeightPrune.technique,
    decision=WeightPrune,
    stage=Stage.SPARSIFY,
    identity=WeightPrune(sparsity=0),
    levels=("sparsity",),
    choices=_choices,
    solve=_solve,
    install=_install,
    stored_bytes=_stored_bytes,
    uses_gradients=_uses_gradients,
)
