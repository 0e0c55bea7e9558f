"""OpenVINO on the CPU."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np

from autocompress.device import OpenVinoSettings, RuntimeSettings
from autocompress.device.facts import how_to_install
from autocompress.errors import DeviceError
from autocompress.measure.runtimes.by_shape import ByShape, Compiled
from autocompress.measure.runtimes.onnx_files import trivial_model, without_functions
from autocompress.measure.session import Array, NodeTime, Placement, Runtime, Session

_DEVICE = "CPU"
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
_TYPES = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "boolean": "bool",
    **{f"i{bits}": f"int{bits}" for bits in (4, 8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (1, 4, 8, 16, 32, 64)},
}  # fmt: skip
_WARM_UPS = 5
_ROUNDS = 3


@final
class OpenVino(Runtime):
    """OpenVINO's CPU plugin: one stream, the latency hint, an explicit precision.

    Models are compiled for the shapes of their inputs. On the Fashion-MNIST network, batch 1, a
    free batch costs 4 % in float32 and 11 % in int8; at batch 32 nothing.
    """

    @property
    def name(self) -> str:
        """`openvino`."""
        return "openvino"

    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that OpenVINO is installed and that this CPU has the settings' precision."""
        _check_precision(_import_openvino(settings).Core(), settings)

    def load(self, path: Path, settings: RuntimeSettings, placement: Placement) -> Session:
        """Read a file; it is compiled once shapes are known.

        Functions of the file's own are computed first, as ONNX Runtime does at load: OpenVINO
        knows none.
        """
        core = _import_openvino(settings).Core()
        config = _config(settings, placement)
        with without_functions(path) as plain:
            model = core.read_model(plain)
        names = tuple(item.any_name for item in model.inputs)

        def compile_for(inputs: Sequence[Array]) -> Compiled:
            return _Compiled(_compile(core, model, inputs, config)).run

        _check_precision(core, settings)
        return ByShape(names, compile_for)

    def start(self, settings: RuntimeSettings, placement: Placement) -> None:
        """Load the plugin and the ONNX reader by running a trivial model."""
        import onnx

        # Computes files' functions at load; its code is no part of a model.
        import onnx.reference

        with TemporaryDirectory(prefix="autocompress-openvino-") as folder:
            path = Path(folder) / "trivial.onnx"
            onnx.save(trivial_model(), path)
            self.load(path, settings, placement).run([np.zeros((1, 4, 4, 4), np.float32)])

    def profile(
        self,
        path: Path,
        settings: RuntimeSettings,
        placement: Placement,
        inputs: Sequence[Array],
        runs: int,
    ) -> tuple[NodeTime, ...]:
        """OpenVINO's performance counters, in whole microseconds; a faster node counts as not run.

        OpenVINO counts a node's mean over all runs since the model was compiled. So the model is
        compiled three times, each time for a third of the runs; each time's mean is taken without
        its first runs, and the median of the three is given.
        """
        core = _import_openvino(settings).Core()
        _check_precision(core, settings)
        config = {**_config(settings, placement), "PERF_COUNT": True}
        with without_functions(path) as plain:
            model = core.read_model(plain)
        rounds = min(_ROUNDS, runs)
        profiles = [
            _Compiled(_compile(core, model, inputs, config)).profile(inputs, -(-runs // rounds))
            for _ in range(rounds)
        ]
        origins = _origin_names(path)
        return tuple(
            replace(
                nodes[0],
                milliseconds=statistics.median(node.milliseconds for node in nodes),
                origins=_origins(nodes[0].origins, origins),
            )
            for nodes in zip(*profiles, strict=True)
            if any(node.milliseconds > 0 for node in nodes)
        )


@final
class _Compiled:
    """A model compiled for one combination of input shapes."""

    def __init__(self, compiled: Any) -> None:
        from openvino import Tensor

        self._tensor = Tensor
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._outputs = range(len(compiled.outputs))

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once; the outputs are copies."""
        request = self._request
        for index, array in enumerate(inputs):
            shared = self._tensor(np.ascontiguousarray(array), shared_memory=True)
            request.set_input_tensor(index, shared)
        request.infer(share_outputs=True)
        return tuple(np.array(request.get_output_tensor(index).data) for index in self._outputs)

    def profile(self, inputs: Sequence[Array], runs: int) -> list[NodeTime]:
        """Mean times of all nodes, without the warm-up's; 0 for one that did not run."""
        for _ in range(_WARM_UPS):
            self.run(inputs)
        before = {info.node_name: info for info in self._request.get_profiling_info()}
        for _ in range(runs):
            self.run(inputs)
        operations = {
            operation.get_friendly_name(): operation
            for operation in self._compiled.get_runtime_model().get_ordered_ops()
        }
        return [
            _node_time(before[info.node_name], info, runs, operations)
            for info in self._request.get_profiling_info()
        ]


def _node_time(before: Any, after: Any, runs: int, operations: Mapping[str, Any]) -> NodeTime:
    means = [1e3 * info.real_time.total_seconds() for info in (before, after)]
    total = means[1] * (_WARM_UPS + runs) - means[0] * _WARM_UPS
    operation = operations.get(after.node_name)
    inputs, outputs, origins = [], [], ""
    if operation is not None:
        inputs = [_describe(item.get_source_output()) for item in operation.inputs()]
        outputs = [_describe(item) for item in operation.outputs()]
        origins = operation.get_rt_info()["originalLayersNames"].astype(str)
    return NodeTime(
        name=after.node_name,
        operator=after.node_type,
        kernel=after.exec_type,
        milliseconds=max(total / runs, 0.0),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        origins=tuple(origins.split(",")) if origins else (),
    )


def _describe(output: Any) -> str:
    """Type and shape of a value, such as `float32[1,3,8,8]`."""
    kind = output.get_element_type().to_string()
    dimensions = str(output.get_partial_shape()).strip("[]{}")
    return f"{_TYPES.get(kind, kind)}[{dimensions}]"


def _origin_names(path: Path) -> dict[str, str]:
    """The file's nodes by name and by what they make; OpenVINO names its own after either."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    made = {name: node.name or name for node in nodes for name in node.output}
    return {**made, **{node.name: node.name for node in nodes if node.name}}


def _origins(found: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """The file's nodes among OpenVINO's names, whose parts after a slash may be its own."""
    origins = []
    for name in found:
        while name and name not in names:
            name = name.rpartition("/")[0]
        if name:
            origins.append(names[name])
    return tuple(dict.fromkeys(origins))


def _compile(core: Any, model: Any, inputs: Sequence[Array], config: Mapping[str, Any]) -> Any:
    """The model compiled for inputs of the shapes given.

    Raises:
        DeviceError: OpenVINO takes another precision or number of threads than it was told.
    """
    model.reshape({index: list(array.shape) for index, array in enumerate(inputs)})
    compiled = core.compile_model(model, _DEVICE, dict(config))
    taken = {
        "INFERENCE_PRECISION_HINT": compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
        "INFERENCE_NUM_THREADS": compiled.get_property("INFERENCE_NUM_THREADS"),
    }
    wanted = {key: config[key] for key in taken}
    if taken != wanted:
        raise DeviceError(
            "OpenVINO does not run the model as the device profile asks.",
            given=wanted,
            allowed=taken,
            advice="correct `precision` or `threads` in the device profile",
        )
    return compiled


def _config(settings: RuntimeSettings, placement: Placement) -> dict[str, Any]:
    assert isinstance(settings, OpenVinoSettings)
    return {
        "INFERENCE_PRECISION_HINT": settings.precision,
        "INFERENCE_NUM_THREADS": placement.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # The worker is pinned already; OpenVINO would move the threads to cores of its choice.
        "ENABLE_CPU_PINNING": False,
        # Else it counts only one thread per physical core.
        "ENABLE_HYPER_THREADING": True,
    }


def _check_precision(core: Any, settings: RuntimeSettings) -> None:
    assert isinstance(settings, OpenVinoSettings)
    capabilities = core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    # OpenVINO would run in float32 without a word.
    if _CAPABILITIES[settings.precision] not in capabilities:
        cpu = core.get_property(_DEVICE, "FULL_DEVICE_NAME")
        known = [name for name, flag in _CAPABILITIES.items() if flag in capabilities]
        raise DeviceError(
            "OpenVINO has no kernels of the device profile's precision for this CPU.",
            given=f"precision {settings.precision} on {cpu}",
            allowed=", ".join(known),
            advice="correct `precision` in the device profile, or leave the runtime out",
        )


def _import_openvino(settings: RuntimeSettings) -> Any:
    # It sends usage statistics from a fork of this process, which hangs where there is no network.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as cause:
        raise DeviceError(
            "The runtime of the device profile cannot be imported.",
            given=f"{settings.name}: {cause}",
            advice=how_to_install(settings),
        ) from cause
    return openvino
