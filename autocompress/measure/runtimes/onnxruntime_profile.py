"""ONNX Runtime's own profile: the nodes of the optimized graph, for each of its providers."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

from autocompress.device import RuntimeSettings
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.runtimes.onnxruntime_origins import MarkedModel, mark, origins
from autocompress.measure.runtimes.onnxruntime_session import Providers, import_onnxruntime
from autocompress.measure.session import Array, NodeTime

_WARM_UPS = 10
_SUFFIX = "_kernel_time"
_PROVIDER = "ExecutionProvider"
# Their graphs hold compiled parts, which cannot be written to a file.
_COMPILING = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
# Times of nodes within these are counted in theirs.
_CONTROL_FLOW = ("If", "Loop", "Scan")
_TYPES = {"float": "float32", "double": "float64"}
_LAYOUTS = {"com.microsoft.nchwc": "nchwc", "com.ms.internal.nhwc": "nhwc"}
Event = Mapping[str, Any]


def profile_file(
    path: Path,
    settings: RuntimeSettings,
    options: Any,
    providers: Providers,
    inputs: Sequence[Array],
    runs: int,
) -> tuple[NodeTime, ...]:
    """Profile a file.

    A node's kernel is the provider that ran it, and the layout of its values if that is not the
    file's (`CPU nchwc`). Its time is the mean over the faster half of the runs: the profile counts
    whole microseconds, so that a median would be as coarse.

    Args:
        path: an ONNX file.
        settings: for error messages.
        options: the session options of a fresh session; they are changed.
        providers: as for a session.
        inputs: one array per model input.
        runs: how often to run, after some more runs to warm up.

    Raises:
        DeviceError: the provider does not start.
        MeasurementError: the profile holds no node.
        Exception: ONNX Runtime's own errors about the file.
    """
    import onnx

    marked = mark(onnx.load(path, load_external_data=False))
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    with TemporaryDirectory(prefix="autocompress-profile-") as folder:
        graph = Path(folder) / "optimized.onnx"
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "trace")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.resolve().parent)
        )
        if first not in _COMPILING:
            options.optimized_model_filepath = str(graph)
            # Else a file of more than 2 GB could not be written.
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "weights.bin"
            )
        session = import_onnxruntime(settings).InferenceSession(
            marked.model.SerializeToString(), sess_options=options, providers=list(providers)
        )
        _check_first(session, first)
        feed = dict(zip((i.name for i in session.get_inputs()), inputs, strict=True))
        for _ in range(_WARM_UPS + runs):
            session.run(None, feed)
        trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = onnx.load(graph, load_external_data=False).graph.node if graph.is_file() else ()
    times = read_trace(trace, runs)
    if not times:
        raise MeasurementError("ONNX Runtime's profile holds no node.", given=path)
    return _with_origins(times, marked, nodes)


def _check_first(session: Any, wanted: str) -> None:
    # ONNX Runtime falls back to the CPU with no more than a warning.
    if session.get_providers()[0] != wanted:
        raise DeviceError(
            "ONNX Runtime did not start the profile's provider and fell back to another.",
            given=wanted,
            allowed=", ".join(session.get_providers()),
            advice="check the provider's drivers and libraries",
        )


def read_trace(trace: Iterable[Event], runs: int) -> list[NodeTime]:
    """The nodes of a profile's trace, in the order in which they ran first.

    Args:
        trace: the events that ONNX Runtime writes, times in microseconds.
        runs: how many of the last runs count.
    """
    events = sorted(trace, key=lambda event: int(event.get("ts", 0)))
    taken = [e for e in events if e.get("cat") == "Session" and e.get("name") == "model_run"]
    taken = taken[-runs:]
    starts = [int(e["ts"]) for e in taken]
    durations = [int(e["dur"]) for e in taken]
    sums: dict[tuple[str, str], list[int]] = {}
    firsts: dict[tuple[str, str], Event] = {}
    for event in _outermost(events):
        run = bisect_right(starts, int(event["ts"])) - 1
        if run >= 0:
            key = (str(event["name"]), str(event["args"].get("node_index", "")))
            firsts.setdefault(key, event)
            sums.setdefault(key, [0] * len(taken))[run] += int(event["dur"])
    quiet = sorted(range(len(taken)), key=durations.__getitem__)[: ceil(len(taken) / 2)]
    return [
        _node_time(firsts[key], sum(times[run] for run in quiet) / len(quiet) / 1e3)
        for key, times in sums.items()
    ]


def _outermost(events: Iterable[Event]) -> list[Event]:
    """Events of kernels, without those that ran within another node's subgraph."""
    nodes = [
        e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith(_SUFFIX)
    ]
    result, end = [], -1
    # A node begins no later than what is within it, and is sorted before it by its length.
    for event in sorted(nodes, key=lambda e: (int(e["ts"]), -int(e["dur"]))):
        if int(event["ts"]) + int(event["dur"]) <= end:
            continue
        result.append(event)
        if event["args"].get("op_name") in _CONTROL_FLOW:
            end = int(event["ts"]) + int(event["dur"])
    return result


def _node_time(event: Event, milliseconds: float) -> NodeTime:
    args = event["args"]
    return NodeTime(
        name=str(event["name"])[: -len(_SUFFIX)],
        operator=str(args["op_name"]),
        kernel=str(args.get("provider", "")).removesuffix(_PROVIDER),
        milliseconds=milliseconds,
        inputs=_values(args.get("input_type_shape", ())),
        outputs=_values(args.get("output_type_shape", ())),
    )


def _values(found: Iterable[Mapping[str, Sequence[int]]]) -> tuple[str, ...]:
    """Types and shapes; constants that a kernel has packed for itself are not among them."""
    return tuple(
        f"{_TYPES.get(kind, kind)}[{','.join(map(str, shape))}]"
        for value in found
        for kind, shape in value.items()
    )


def _with_origins(
    times: Sequence[NodeTime], marked: MarkedModel, optimized: Sequence[Any]
) -> tuple[NodeTime, ...]:
    by_name = {node.name: place for place, node in enumerate(optimized)}
    # Names alone still tell most of it where the graph could not be written.
    graph = list(optimized) or [_Named(time.name, time.operator) for time in times]
    sources = origins(marked, graph)
    result = []
    for index, time in enumerate(times):
        place = by_name.get(time.name) if optimized else index
        layout = (
            _LAYOUTS.get(optimized[place].domain, "") if optimized and place is not None else ""
        )
        result.append(
            NodeTime(
                name=marked.original_name(time.name),
                operator=time.operator,
                kernel=f"{time.kernel} {layout}".strip(),
                milliseconds=time.milliseconds,
                inputs=time.inputs,
                outputs=time.outputs,
                origins=sources[place] if place is not None else (),
            )
        )
    return tuple(result)


@final
@dataclass(frozen=True)
class _Named:
    """A node of which only name and operator are known."""

    name: str
    op_type: str
    output: tuple[str, ...] = ()
