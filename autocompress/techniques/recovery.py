"""How a pruned or decomposed network gets its accuracy back by training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from pydantic import Field

from autocompress.device import DeviceProfile
from autocompress.graph import NetworkGraph
from autocompress.plan import Decision
from autocompress.techniques.technique import NetworkTechnique, Stage


@final
class Recover(Decision):
    """Train the whole network after pruning and decomposition, before quantization.

    Attributes:
        method: `fine_tune` learns the labels; `response` the original network's outputs, `feature`
            its intermediate maps, `response_feature` both, each with the labels where there are
            some.
        epochs: of the train split; 0 leaves the network as it is.
        learning_rate: the peak, of SGD with Nesterov momentum; transformers are trained by AdamW,
            at a hundredth of it, times a share from 1/8 to 1 that is small where the outputs are
            near the original's (`rate_share`).
        temperature: of the softened class scores; low ones leave the labels more of a say.
        pruning_rounds: in so many rounds single weights are pruned, with a share of the training
            after each; 1 prunes at once.
        cycles: of training, each twice as long as the one before it and with a warm-up and cosine
            of its own up to the same peak (Loshchilov & Hutter 2017, SGDR, section 3, T_mult = 2).
            `epochs` are those of the first, in which the pruning rounds are.
    """

    technique: ClassVar[str] = "recover"
    method: Literal["fine_tune", "response", "feature", "response_feature"] = "response"
    epochs: float = Field(ge=0, le=100)
    learning_rate: float = Field(default=0.05, gt=0, le=1)
    temperature: float = Field(default=2.0, ge=1, le=20)
    pruning_rounds: int = Field(default=1, ge=1, le=16)
    cycles: int = Field(default=1, ge=1, le=8)


def cycle_epochs(decision: Recover, number: int) -> float:
    """Epochs of a decision's training cycle, counted from 0."""
    return float(decision.epochs * 2**number)


def _choices(
    graph: NetworkGraph, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    return tuple(d for d in offered if isinstance(d, Recover) and d.epochs > 0)


RECOVER = NetworkTechnique(
    name=Recover.technique,
    decision=Recover,
    stage=Stage.RECOVER,
    identity=Recover(epochs=0),
    choices=_choices,
)
