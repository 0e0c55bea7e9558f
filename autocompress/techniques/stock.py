"""The runtime's own automatic quantizer, as one more choice for the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

from autocompress.device import DeviceProfile
from autocompress.graph import NetworkGraph
from autocompress.plan import Decision
from autocompress.techniques.technique import NetworkTechnique, Stage


@final
class StockQuantizer(Decision):
    """Leave quantization to ONNX Runtime's quantizer; `none` leaves the network in float."""

    technique: ClassVar[str] = "stock_quantizer"
    mode: Literal["none", "static", "dynamic"]
    per_channel: bool = True
    signed_activations: bool = False
    calibration: Literal["minmax", "percentile", "entropy"] = "minmax"


def _choices(
    graph: NetworkGraph, offered: Sequence[Decision], device: DeviceProfile
) -> tuple[Decision, ...]:
    integer = any(8 in widths for widths in device.kernels.values())
    return tuple(
        d for d in offered if isinstance(d, StockQuantizer) and d.mode != "none" and integer
    )


STOCK_QUANTIZER = NetworkTechnique(
    name=StockQuantizer.technique,
    decision=StockQuantizer,
    stage=Stage.QUANTIZE,
    identity=StockQuantizer(mode="none"),
    choices=_choices,
)
