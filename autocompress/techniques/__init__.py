"""Compression techniques, one file each; a new one is its file and one line in `TECHNIQUES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autocompress.errors import ConfigError
from autocompress.graph.blocks import is_within
from autocompress.plan import Decision, Plan, Step, plan_from_rows
from autocompress.techniques.block_drop import BLOCK_DROP
from autocompress.techniques.codebook import CODEBOOK
from autocompress.techniques.codebook_tuning import TUNE_CODEBOOKS
from autocompress.techniques.entropy_grid import ENTROPY_GRID
from autocompress.techniques.equalize import EQUALIZE
from autocompress.techniques.filter_prune import FILTER_PRUNE
from autocompress.techniques.hash_code import HASH_CODE
from autocompress.techniques.low_rank import LOW_RANK
from autocompress.techniques.precision import PRECISION
from autocompress.techniques.qat import QAT
from autocompress.techniques.recovery import RECOVER
from autocompress.techniques.stock import STOCK_QUANTIZER, StockQuantizer
from autocompress.techniques.technique import (
    NETWORK,
    BlockTechnique,
    GroupTechnique,
    LayerTechnique,
    NetworkTechnique,
    Stage,
)
from autocompress.techniques.weight_prune import WEIGHT_PRUNE

Technique = BlockTechnique | GroupTechnique | LayerTechnique | NetworkTechnique

TECHNIQUES: tuple[Technique, ...] = (
    BLOCK_DROP,
    FILTER_PRUNE,
    LOW_RANK,
    WEIGHT_PRUNE,
    RECOVER,
    EQUALIZE,
    PRECISION,
    CODEBOOK,
    HASH_CODE,
    ENTROPY_GRID,
    STOCK_QUANTIZER,
    QAT,
    TUNE_CODEBOOKS,
)


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


def technique_of(decision: Decision) -> Technique:
    """The technique that a decision belongs to."""
    return technique_named(decision.technique)


def pruning_ratio_of(decision: Decision) -> float:
    """The share of a group's channels that a decision asks to take; 0 where it prunes none."""
    if not isinstance(technique_of(decision), GroupTechnique):
        return 0.0
    return float(decision.model_dump()["pruning_ratio"])


def read_plan(rows: Sequence[Mapping[str, Any]]) -> Plan:
    """Read a plan back from the rows of its JSON.

    Raises:
        PlanError: an unknown technique, or a value outside its range.
    """
    return plan_from_rows([dict(row) for row in rows], [t.decision for t in TECHNIQUES])


def consistent(plan: Plan) -> Plan:
    """A plan without steps that another one makes void, or that have nothing to work on.

    Nothing is done to what stands in a block that is taken out, channel groups that begin there
    among it. A quantizer of the whole network leaves nothing to quantize layer by layer, and then
    nothing to train afterwards; training of quantized weights needs layers of the kind that it
    trains; equalization serves quantization only.
    """
    gone = dropped_by(plan)
    working = [
        s for s in plan.steps if not _does_nothing(s.decision) and not is_within(s.target, gone)
    ]
    whole = any(_quantizes_network(s) for s in working)
    single = {
        s.decision.technique
        for s in working
        if technique_of(s.decision).stage is Stage.QUANTIZE and s.target != NETWORK
    }

    def stays(technique: Technique) -> bool:
        if technique.stage is Stage.QUANTIZE and not isinstance(technique, NetworkTechnique):
            return not whole
        if technique.stage is Stage.RETRAIN and isinstance(technique, NetworkTechnique):
            return not whole and bool(single & set(technique.trains))
        return technique.stage is not Stage.EQUALIZE or whole or bool(single)

    return Plan(tuple(s for s in working if stays(technique_of(s.decision))))


def dropped_by(plan: Plan) -> tuple[str, ...]:
    """Names of the blocks that a plan takes out."""
    return tuple(
        step.target
        for step in plan.steps
        if isinstance(technique_of(step.decision), BlockTechnique)
        and not _does_nothing(step.decision)
    )


def _does_nothing(decision: Decision) -> bool:
    return decision == technique_of(decision).identity or (
        isinstance(decision, StockQuantizer) and decision.mode == "none"
    )


def _quantizes_network(step: Step) -> bool:
    return step.target == NETWORK and technique_of(step.decision).stage is Stage.QUANTIZE


__all__ = [
    "NETWORK",
    "TECHNIQUES",
    "BlockTechnique",
    "GroupTechnique",
    "LayerTechnique",
    "NetworkTechnique",
    "Stage",
    "Technique",
    "consistent",
    "dropped_by",
    "read_plan",
    "technique_named",
    "technique_of",
]
