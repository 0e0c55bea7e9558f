"""Filters, neurons and attention heads removed, the least important first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from autocompress.device import DeviceProfile
from autocompress.graph import ChannelGroup
from autocompress.graph.groups import kept_size
from autocompress.plan import Decision
from autocompress.techniques.importance import (
    activation_importance,
    ascending,
    connection_importance,
    l1_importance,
    l2_importance,
    nonzero_importance,
    taylor_importance,
)
from autocompress.techniques.removal import removal_order
from autocompress.techniques.technique import GroupProblem, GroupTechnique, Stage


@final
class FilterPrune(Decision):
    """Remove this share of a group's channels (filters, neurons) or attention heads.

    Attributes:
        criterion: which go first: those whose loss the layers that read them can make up for
            best (`reconstruction`), or the least of a classic importance.
        refit: whether the layers that read the group get least-squares weights for what is left;
            without it the columns are just taken out.
    """

    technique: ClassVar[str] = "filter_prune"
    pruning_ratio: float = Field(ge=0, lt=1)
    criterion: Literal[
        "reconstruction", "l1", "l2", "taylor", "activation", "zeros", "connection"
    ] = "reconstruction"
    refit: bool = True


def _choices(
    group: ChannelGroup, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Ratios that give different channel counts, all multiples that the device rewards.

    A prunable group has a dense reader, so that every criterion has something to look at.
    """
    seen: set[tuple[int, str, bool]] = set()
    kept: list[tuple[int, Decision]] = []
    for decision in offered:
        assert isinstance(decision, FilterPrune)
        size = kept_size(group.size, decision.pruning_ratio, group.step(device.channel_multiple))
        result = (size, decision.criterion, decision.refit)
        if group.prunable and size < group.size and result not in seen:
            seen.add(result)
            kept.append((size, decision))
    return tuple(decision for _, decision in sorted(kept, key=lambda pair: -pair[0]))


def _order(problem: GroupProblem, decision: Decision) -> Tensor:
    assert isinstance(decision, FilterPrune)
    match decision.criterion:
        case "reconstruction":
            return removal_order(problem)
        case "l1":
            return ascending(l1_importance(problem))
        case "l2":
            return ascending(l2_importance(problem))
        case "taylor":
            return ascending(taylor_importance(problem))
        case "activation":
            return ascending(activation_importance(problem))
        case "zeros":
            # Without a ReLU there are no zeros, and all channels tie.
            return ascending(nonzero_importance(problem), activation_importance(problem))
        case "connection":
            return ascending(connection_importance(problem))


def _uses_gradients(decision: Decision) -> bool:
    assert isinstance(decision, FilterPrune)
    return decision.criterion == "taylor"


FILTER_PRUNE = GroupTechnique(
    name=FilterPrune.technique,
    decision=FilterPrune,
    stage=Stage.PRUNE,
    identity=FilterPrune(pruning_ratio=0),
    levels=("pruning_ratio", "refit"),
    choices=_choices,
    order=_order,
    uses_gradients=_uses_gradients,
)
