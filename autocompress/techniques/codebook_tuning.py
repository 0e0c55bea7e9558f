"""Shared-codebook fine-tuning: codewords trained by the gradients of all weights that use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from pydantic import Field

from autocompress.device import DeviceProfile
from autocompress.graph import NetworkGraph
from autocompress.plan import Decision
from autocompress.techniques.technique import NetworkTechnique, Stage


@final
class TuneCodebooks(Decision):
    """Distil the original network into the codewords (Han et al. 2016, section 3.2)."""

    technique: ClassVar[str] = "tune_codebooks"
    epochs: float = Field(ge=0, le=100)
    learning_rate: float = Field(default=0.01, gt=0, le=1)


def _choices(
    graph: NetworkGraph, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    return tuple(d for d in offered if isinstance(d, TuneCodebooks) and d.epochs > 0)


TUNE_CODEBOOKS = NetworkTechnique(
    name=TuneCodebooks.technique,
    decision=TuneCodebooks,
    stage=Stage.RETRAIN,
    identity=TuneCodebooks(epochs=0),
    choices=_choices,
    trains=("codebook", "hash_code"),
)
