"""What a device turns out to be able to do, and its profile once that is known.

Integer kernels of x86 CPUs without VNNI multiply bytes by `vpmaddubsw`, which adds two products in
16 bits and cuts what is too large: two products of 255 and 127 are. With weights of 7 bits, as ONNX
Runtime's documentation advises for such CPUs ("Quantize ONNX Models", `reduce_range`), every sum
fits. Other libraries pick other kernels, so this is tried in each runtime, and not told from names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np

from autocompress.config import Strict
from autocompress.device import DeviceProfile, RuntimeSettings
from autocompress.errors import DeviceError
from autocompress.measure.runtimes import runtime_for
from autocompress.measure.session import Placement

_INTEGER_OPERATORS = ("Conv", "Gemm", "MatMul")
# An exact sum is off by the rounding of its ends only, one that was cut by almost a half.
_LEAST_SHARE = 0.9
_CHANNELS, _SIDE = 64, 8


@final
class Abilities(Strict):
    """What a machine can do of what a profile names.

    Attributes:
        absent: by full name the optional runtimes that cannot run there, and why.
        saturating: full names of runtimes whose integer kernels cut large sums.
    """

    absent: Mapping[str, str]
    saturating: tuple[str, ...]


def find_abilities(profile: DeviceProfile, placement: Placement) -> Abilities:
    """Try this machine.

    Raises:
        DeviceError: a runtime that is not optional cannot run here.
    """
    absent, saturating = {}, []
    integers = any(8 in profile.kernels.get(name, ()) for name in _INTEGER_OPERATORS)
    # GPUs add products of bytes in 32 bits.
    tried = integers and profile.kind == "cpu" and profile.integer_sums == "auto"
    for settings in profile.runtimes:
        try:
            runtime_for(settings).check_available(settings)
        except DeviceError as reason:
            if not settings.optional:
                raise
            absent[settings.full_name] = f"{reason.what.rstrip('.')} ({reason.given})"
            continue
        if tried and _saturates(settings, placement):
            saturating.append(settings.full_name)
    return Abilities(absent=absent, saturating=tuple(saturating))


def _saturates(settings: RuntimeSettings, placement: Placement) -> bool:
    import onnx

    ones = np.ones((1, _CHANNELS, _SIDE, _SIDE), np.float32)
    with TemporaryDirectory(prefix="autocompress-sums-") as folder:
        path = Path(folder) / "sums.onnx"
        onnx.save(_largest_sums(), path)
        outputs = runtime_for(settings).load(path, settings, placement).run([ones])
    return min(float(np.min(output)) for output in outputs) < _LEAST_SHARE * _CHANNELS


def _largest_sums() -> Any:
    """A convolution and a product of bytes; inputs of 1 give the number of channels everywhere.

    All integers of inputs and weights are as large as can be.
    """
    from onnx import TensorProto, helper, numpy_helper

    largest = np.int8(127)
    values = {
        "kernel_int8": np.full((_CHANNELS, _CHANNELS, 1, 1), largest),
        "matrix_int8": np.full((_SIDE, _CHANNELS * _SIDE), largest),
        "weight_scale": np.float32(1 / 127),
        "weight_zero": np.int8(0),
        "matrix_scale": np.float32(_CHANNELS / _SIDE / 127),
        "scale": np.float32(1 / 255),
        "sum_scale": np.float32(_CHANNELS / 128),
        "zero": np.uint8(0),
    }
    both = ("QuantizeLinear", "DequantizeLinear")
    nodes = []

    def rounded(value: str, scale: str, result: str) -> None:
        names = [value, f"{result}_uint8", result]
        for kind, source, target in zip(both, names, names[1:], strict=False):
            nodes.append(helper.make_node(kind, [source, scale, "zero"], [target]))

    rounded("x", "scale", "bytes")
    for name, scale in (("kernel", "weight_scale"), ("matrix", "matrix_scale")):
        parts = [f"{name}_int8", scale, "weight_zero"]
        nodes.append(helper.make_node("DequantizeLinear", parts, [name]))
    nodes.append(helper.make_node("Conv", ["bytes", "kernel"], ["convolved"]))
    nodes.append(helper.make_node("MatMul", ["bytes", "matrix"], ["multiplied"]))
    for name, result in (("convolved", "y"), ("multiplied", "z")):
        rounded(name, "sum_scale", result)
    shape = [1, _CHANNELS, _SIDE, _SIDE]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [*shape[:3], _CHANNELS * _SIDE]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def settled(profile: DeviceProfile, abilities: Abilities) -> tuple[DeviceProfile, tuple[str, ...]]:
    """A profile without what its device lacks, and what there is to tell of that.

    Returns:
        A profile whose `integer_sums` is no longer `auto`, and notes, one sentence each.
    """
    notes = [f"without {name}: {reason}" for name, reason in abilities.absent.items()]
    sums = profile.integer_sums
    if sums == "auto":
        sums = "saturating" if abilities.saturating else "exact"
    if abilities.saturating:
        notes.append(
            "integer kernels of this CPU cut large sums "
            f"({', '.join(abilities.saturating)}): weights for them take 7 bits"
        )
    kept = tuple(r for r in profile.runtimes if r.full_name not in abilities.absent)
    return profile.model_copy(update={"runtimes": kept, "integer_sums": sums}), tuple(notes)
