"""Compression techniques, one file each; a new one is its file and one line in `TECHNIQUES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autocompress.errors import ConfigError
from autocompress.plan import Plan, plan_from_rows
from autocompress.techniques.filter_prune import FILTER_PRUNE
from autocompress.techniques.low_rank import LOW_RANK
from autocompress.techniques.precision import PRECISION
from autocompress.techniques.technique import GroupTechnique, LayerTechnique

Technique = GroupTechnique | LayerTechnique

TECHNIQUES: tuple[Technique, ...] = (FILTER_PRUNE, LOW_RANK, PRECISION)


def technique_named(name: str) -> Technique:
    """The technique of that name.

    Raises:
        ConfigError: there is none.
    """
    for technique in TECHNIQUES:
        if technique.name == name:
            return technique
    raise ConfigError(
        "There is no such technique.",
        given=name,
        allowed=", ".join(technique.name for technique in TECHNIQUES),
    )


def read_plan(rows: Sequence[Mapping[str, Any]]) -> Plan:
    """Read a plan back from the rows of its JSON.

    Raises:
        PlanError: an unknown technique, or a value outside its range.
    """
    return plan_from_rows([dict(row) for row in rows], [t.decision for t in TECHNIQUES])


__all__ = ["TECHNIQUES", "GroupTechnique", "LayerTechnique", "Technique", "read_plan"]
