"""What `autocompress explain` does: profile a candidate beside the original and tell the causes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import pandas as pd

from autocompress.config import read_yaml, validate
from autocompress.device import DeviceProfile
from autocompress.device.facts import differences
from autocompress.errors import MeasurementError, RunFolderError
from autocompress.measure.any_file import open_model, random_inputs
from autocompress.measure.arrays import read_arrays
from autocompress.measure.client import Inputs, Subject, Worker
from autocompress.measure.explain.explanation import (
    Explanation,
    Profiled,
    Speed,
    explain_profiles,
    kernel_tile,
)
from autocompress.measure.explain.graph import graph_of
from autocompress.report.columns import read_device, read_front
from autocompress.search.columns import ORIGINAL

Progress = Callable[[str], None]
_PROFILE_S = 1.0
_LEAST_RUNS, _MOST_RUNS = 20, 1000
_SPLITS = ("test", "search")
_RANDOM = "The profiles were taken with random inputs, for there were no stored ones."


@final
@dataclass(frozen=True)
class _Pair:
    """A candidate and the original in the profile's first runtime, with what was measured of them.

    Attributes:
        speed: None where it is to be measured.
        own_latency_ms: the original's in the candidate's runtime; None where it is to be measured.
    """

    name: str
    original: Subject
    candidate: Subject
    inputs: Inputs
    speed: Speed | None = None
    own_latency_ms: float | None = None


def explain(run: Path, candidate: str, progress: Progress | None = None) -> Explanation:
    """Explain a candidate of a run; its paired measurement is the run's, profiles are taken now.

    Args:
        run: a run folder.
        candidate: as `front.csv` calls it.
        progress: told what is being done.

    Raises:
        RunFolderError: the folder has no such candidate, it is the original, its file is gone, or
            the run was measured on another device than this one.
        MeasurementError: a model fails, or the runtime has no profile.
        DeviceError: a runtime is not available.
    """
    profile = _profile_of(run)
    row = _row(run, candidate)
    runtime = str(row["runtime"]) or profile.runtime_names[0]
    if candidate == ORIGINAL:
        raise RunFolderError(
            "The original network is what candidates are compared with.",
            given=candidate,
            advice=f"name another row of `autocompress front {run} --all`",
        )
    artifact, original = run / str(row["artifact"]), run / "artifacts" / f"{ORIGINAL}.onnx"
    for path in (artifact, original):
        if not path.is_file():
            raise RunFolderError(
                "A model of the run is gone.",
                given=path,
                advice=f"autocompress search EXPERIMENT --run {run}",
            )
    own = ORIGINAL if runtime == profile.runtime_names[0] else f"{ORIGINAL}@{runtime}"
    known = _stored_speed(run, own)
    inputs = _stored_inputs(run / "scratch", original, profile.batch_size)
    with tempfile.TemporaryDirectory() as scratch, Worker(profile, Path(scratch)) as worker:
        apart = differences(worker.fingerprint, read_device(run))
        if apart:
            raise RunFolderError(
                "The run was measured on another device; profiles taken here say nothing of it.",
                given="; ".join(apart),
                advice="explain it on the device that it was searched on",
            )
        pair = _Pair(
            name=candidate,
            original=Subject(original, profile.runtime_names[0]),
            candidate=Subject(artifact, runtime),
            inputs=inputs or _random(original, profile),
            speed=_stored_speed(run, candidate),
            own_latency_ms=known.candidate_ms if known else None,
        )
        result = _explain(worker, profile, pair, progress or _silent)
    return result if inputs else replace(result, notes=(*result.notes, _RANDOM))


def explain_files(
    baseline: Path,
    candidate: Path,
    profile: DeviceProfile,
    runtime: str,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Explain the speed of any ONNX file against any other; both in one runtime.

    Args:
        baseline: for instance the float model.
        candidate: a model with the same inputs.
        profile: the device.
        runtime: full name of one of its runtimes.
        inputs: one array per model input, or an .npz file of them; random ones if None.
        progress: told what is being done.

    Raises:
        MeasurementError: a file is no model, a model fails, or the runtime has no profile.
        DeviceError: the runtime is not available.
    """
    given = inputs if inputs is not None else _random(baseline, profile)
    pair = _Pair(candidate.stem, Subject(baseline, runtime), Subject(candidate, runtime), given)
    with tempfile.TemporaryDirectory() as scratch, Worker(profile, Path(scratch)) as worker:
        result = _explain(worker, profile, pair, progress or _silent)
    return result if inputs is not None else replace(result, notes=(*result.notes, _RANDOM))


def _explain(
    worker: Worker, profile: DeviceProfile, pair: _Pair, progress: Progress
) -> Explanation:
    runtime = pair.candidate.runtime
    speed = pair.speed
    if speed is None:
        progress("measuring the original and the candidate in turn")
        speed = _measured(worker, pair.original, pair.candidate, pair.inputs)
    original = Subject(pair.original.model, runtime)
    latency_ms = pair.own_latency_ms
    if pair.original.runtime == runtime:
        latency_ms = speed.baseline_ms
    elif latency_ms is None:
        progress("measuring the original in the candidate's runtime")
        latency_ms = _measured(worker, pair.original, original, pair.inputs).candidate_ms
    sides = []
    for subject, known_ms in ((original, latency_ms), (pair.candidate, speed.candidate_ms)):
        progress(f"profiling {subject.model.name} in {runtime}")
        runs = min(max(round(1e3 * _PROFILE_S / known_ms), _LEAST_RUNS), _MOST_RUNS)
        nodes = worker.profile(subject, pair.inputs, runs)
        sides.append(Profiled(graph_of(open_model(subject.model)), nodes, known_ms))
    flags = worker.fingerprint.instruction_sets if profile.kind == "cpu" else ()
    tile = kernel_tile(profile.channel_multiple, flags)
    return explain_profiles(pair.name, profile.runtime(runtime), sides[0], sides[1], speed, tile)


def _measured(worker: Worker, baseline: Subject, candidate: Subject, inputs: Inputs) -> Speed:
    paired = worker.compare(baseline, candidate, inputs, final=True, seed=0)
    return Speed(
        baseline_ms=paired.baseline_ms,
        candidate_ms=paired.candidate_ms,
        speedup=paired.speedup,
        low=paired.speedup_low,
        high=paired.speedup_high,
        reason=paired.reason,
    )


def _profile_of(run: Path) -> DeviceProfile:
    path = run / "experiment.yaml"
    data = read_yaml(path, RunFolderError).get("device_profile")
    if not isinstance(data, dict):
        raise RunFolderError("The run does not say which device it is for.", given=path)
    return validate(DeviceProfile, data, f"device_profile of {path}", RunFolderError)


def _row(run: Path, candidate: str) -> pd.Series[str]:
    front = read_front(run)
    rows = front[front["candidate"] == candidate]
    if rows.empty:
        known = [str(name) for name in front.sort_values("latency_ms")["candidate"]]
        raise RunFolderError(
            "The run has no such candidate.",
            given=candidate,
            allowed=", ".join(known[:8]) + (" ..." if len(known) > 8 else ""),
            advice=f"autocompress front {run} --all",
        )
    row: pd.Series[str] = rows.iloc[0]
    return row


def _stored_speed(run: Path, candidate: str) -> Speed | None:
    """The paired measurement of a candidate, on the test split if there is one of it."""
    for split in _SPLITS:
        path = run / "measurements" / f"{candidate}-{split}.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return Speed(
                baseline_ms=float(data["baseline_ms"]),
                candidate_ms=float(data["candidate_ms"]),
                speedup=float(data["speedup"]),
                low=float(data["speedup_low"]),
                high=float(data["speedup_high"]),
                reason=str(data["reason"]),
            )
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise RunFolderError(
                f"A measurement of the run cannot be read: {cause}",
                given=path,
                advice="delete the file, and it is measured anew",
            ) from cause
    return None


def _stored_inputs(scratch: Path, model: Path, batch_size: int) -> Path | None:
    """The smallest stored inputs of a search that fit a model; None if there are none."""
    wanted = [
        tuple(d.dim_value for d in item.type.tensor_type.shape.dim[1:])
        for item in open_model(model).graph.input
    ]
    for path in sorted(scratch.glob("inputs-*.npz"), key=lambda found: found.stat().st_size):
        try:
            arrays = read_arrays(path)
        except MeasurementError:
            continue
        fits = len(arrays) == len(wanted) and all(
            array.ndim == len(sizes) + 1
            and len(array) >= batch_size
            and all(size in (0, given) for size, given in zip(sizes, array.shape[1:], strict=True))
            for array, sizes in zip(arrays, wanted, strict=True)
        )
        if fits:
            return path
    return None


def _random(model: Path, profile: DeviceProfile) -> Inputs:
    return random_inputs(open_model(model), profile.batch_size, {}, seed=0)


def _silent(text: str) -> None:
    """Tell nobody."""
