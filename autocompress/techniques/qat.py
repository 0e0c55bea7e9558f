"""Quantization-aware training: what is chosen; `recover.qat` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from pydantic import Field

from autocompress.device import DeviceProfile
from autocompress.graph import NetworkGraph
from autocompress.plan import Decision
from autocompress.techniques.technique import NetworkTechnique, Stage


@final
class Qat(Decision):
    """Train the quantized network with the rounding in its forward pass.

    Attributes:
        epochs: of the train split; 0 leaves the network as it is.
        learning_rate: the peak, of SGD with Nesterov momentum; for weights and scales. Transformers
            are trained by AdamW, at a hundredth of it, times a share from 1/8 to 1 that is small
            where the outputs, rounding included, are near the original's (`rate_share`).
        gradient_bits: of the gradients at the layers' outputs, rounded stochastically (Zhou et al.
            2016, DoReFa-Net, section 2.5); 32 leaves them as they are.
        distil: learn the original network's outputs, with the labels where there are some;
            otherwise the labels alone.
    """

    technique: ClassVar[str] = "qat"
    epochs: float = Field(ge=0, le=100)
    learning_rate: float = Field(default=0.01, gt=0, le=1)
    gradient_bits: Literal[32, 8, 6, 4] = 32
    distil: bool = True


def _choices(
    graph: NetworkGraph, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    """All that train."""
    return tuple(d for d in offered if isinstance(d, Qat) and d.epochs > 0)


QAT = NetworkTechnique(
    name=Qat.technique,
    decision=Qat,
    stage=Stage.RETRAIN,
    identity=Qat(epochs=0),
    choices=_choices,
    trains=("precision", "entropy_grid"),
)
