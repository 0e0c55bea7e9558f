"""Whole residual blocks taken out: a transformer's layers, blocks of a residual network.

Deep residual networks hold on when single blocks are skipped (Veit, Wilber & Belongie 2016,
"Residual Networks Behave Like Ensembles of Relatively Shallow Networks", section 4.1); so do
transformers (Sajjad et al. 2023, "On the effect of dropping layers of pre-trained transformer
models", section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from autocompress.device import DeviceProfile
from autocompress.graph import Block
from autocompress.plan import Decision
from autocompress.techniques.technique import BlockTechnique, Stage


@final
class BlockDrop(Decision):
    """Take a residual block out: what reads it gets its input.

    Attributes:
        drop: false leaves it where it is.
    """

    technique: ClassVar[str] = "block_drop"
    drop: bool


def _choices(
    block: Block, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    return tuple(dict.fromkeys(d for d in offered if isinstance(d, BlockDrop) and d.drop))


BLOCK_DROP = BlockTechnique(
    name=BlockDrop.technique,
    decision=BlockDrop,
    stage=Stage.PRUNE,
    identity=BlockDrop(drop=False),
    choices=_choices,
)
