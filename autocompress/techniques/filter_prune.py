"""Filters and neurons removed where the layers that read them can be refitted best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from pydantic import Field

from autocompress.device import DeviceProfile
from autocompress.graph import ChannelGroup
from autocompress.graph.groups import kept_size
from autocompress.plan import Decision
from autocompress.techniques.reconstruction import removal_order
from autocompress.techniques.technique import GroupTechnique, Stage


@final
class FilterPrune(Decision):
    """Remove this share of a group's channels (convolution filters, linear neurons)."""

    technique: ClassVar[str] = "filter_prune"
    pruning_ratio: float = Field(ge=0, lt=1)


def _choices(
    group: ChannelGroup, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """Ratios that give different channel counts, all multiples that the device rewards."""
    seen = {group.size}
    kept: list[Decision] = []
    for decision in offered:
        assert isinstance(decision, FilterPrune)
        size = kept_size(group.size, decision.pruning_ratio, device.channel_multiple)
        if group.prunable and size not in seen:
            seen.add(size)
            kept.append(decision)
    return tuple(kept)


FILTER_PRUNE = GroupTechnique(
    name=FilterPrune.technique,
    decision=FilterPrune,
    stage=Stage.PRUNE,
    choices=_choices,
    order=removal_order,
)
