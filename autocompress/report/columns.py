"""The stable columns of `front.csv`, and reading what a run folder says about its front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autocompress.config import Objective, read_yaml, validate
from autocompress.device import Fingerprint
from autocompress.errors import RunFolderError
from autocompress.evaluation import OWN_UNIT, SHARE
from autocompress.search.columns import COLUMNS, ORIGINAL, REFERENCES, ROLES

__all__ = [
    "COLUMNS", "LATENCY", "OBJECTIVES", "REFERENCES", "ROLES", "cost_of", "front_rows",
    "read_cost", "read_device", "read_front", "typed_front",
]  # fmt: skip

LATENCY = "latency_ms"
# By objective its column.
OBJECTIVES: Mapping[Objective, str] = {
    "metric": "metric_search", "latency": LATENCY, "energy": "energy_mj",
    "file_bytes": "file_bytes", "download_bytes": "download_bytes",
    "peak_memory": "peak_memory_bytes", "gpu_memory": "gpu_memory_bytes",
}  # fmt: skip

_TEXTS = ("candidate", "role", "metric_unit", "runtime", "artifact", "plan_hash")
_FLAGS = ("on_front", "trusted")
_BYTES = ("file_bytes", "download_bytes", "peak_memory_bytes", "gpu_memory_bytes")
# Fronts of earlier versions lack these.
_LATER = (
    "download_bytes", "runtime", "energy_mj", "energy_low_mj", "energy_high_mj", "gpu_memory_bytes",
    "metric_unit",
)  # fmt: skip
_FIX = "let `autocompress search` write the file; it is not meant to be edited"


def typed_front(frame: pd.DataFrame) -> pd.DataFrame:
    """The stable columns in their order: texts as str (nothing is ""), flags as bool, else float64.

    Other columns are left out. Figures that were not taken are NaN. Of a metric more is better.

    Raises:
        RunFolderError: a column is missing, or holds what its type does not allow.
    """
    frame = frame.assign(**{n: np.nan for n in _LATER if n not in frame.columns})
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise RunFolderError(
            "A front lacks columns.", given=", ".join(missing), allowed=", ".join(COLUMNS)
        )
    typed: dict[str, Any] = {}
    for name in COLUMNS:
        column = frame[name]
        if name in _TEXTS:
            typed[name] = column.astype(object).where(column.notna(), "").astype(str).to_numpy()
        elif name in _FLAGS:
            typed[name] = _flags(column)
        else:
            typed[name] = _figures(column)
    result: pd.DataFrame = pd.DataFrame(typed, columns=list(COLUMNS))
    if (result["metric_unit"] == "").all():
        result["metric_unit"] = _earlier_unit(result)
    unknown = sorted(set(result["role"]) - set(ROLES))
    if unknown:
        raise RunFolderError(
            "A front has rows of an unknown role.",
            given=", ".join(unknown),
            allowed=", ".join(ROLES),
            advice=_FIX,
        )
    return result


def _earlier_unit(front: pd.DataFrame) -> str:
    """The metric's unit by the drops, which were multiplied by 100 for a share and nothing else.

    Where no drop is known the metric counts as a user's own, whose numbers are shown as they are.
    """
    tested = front["metric_test"]
    original = tested[front["candidate"] == ORIGINAL]
    lost = (original.iloc[0] if len(original) else np.nan) - tested
    drop = front["drop_test_pp"].where(np.isfinite(lost), 0.0)
    return SHARE if drop.abs().sum() > 10 * lost.abs().sum() else OWN_UNIT


def _flags(column: pd.Series[Any]) -> NDArray[np.bool_]:
    words = {"True": True, "False": False, "true": True, "false": False, "1": True, "0": False}
    flags = [words.get(str(value)) for value in column]
    if None in flags:
        raise RunFolderError(
            f"Column {column.name} of a front is neither true nor false.",
            given=str(column.iloc[flags.index(None)]),
            allowed="True, False",
            advice=_FIX,
        )
    return np.array(flags, dtype=np.bool_)


def _figures(column: pd.Series[Any]) -> NDArray[np.float64]:
    try:
        return np.asarray(pd.to_numeric(column), dtype=np.float64)
    except (TypeError, ValueError) as cause:
        raise RunFolderError(
            f"Column {column.name} of a front holds something that is no number: {cause}",
            advice=_FIX,
        ) from cause


def read_front(run: Path) -> pd.DataFrame:
    """The current front of a run folder, as `typed_front`.

    Raises:
        RunFolderError: the folder has no result yet, or its `front.csv` cannot be read.
    """
    path = run / "front.csv"
    if not path.is_file():
        raise RunFolderError(
            "This is not a run folder." if not run.is_dir() else "The run has no front yet.",
            given=run,
            allowed="a run folder with a front.csv, written from the first finished trial on",
            advice=f"autocompress search EXPERIMENT --run {run}",
        )
    try:
        # Without the default list of NaN spellings: a candidate may be called "NA" or "null".
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as cause:
        raise RunFolderError(
            f"front.csv cannot be read: {cause}", given=path, advice=_FIX
        ) from cause
    front = typed_front(frame)
    if front.empty:
        raise RunFolderError(
            "The run has no finished trial yet.",
            given=path,
            advice=f"autocompress search EXPERIMENT --run {run}",
        )
    return front


def read_device(run: Path) -> Fingerprint:
    """The device that a run folder's figures were measured on (`device.json`).

    Raises:
        RunFolderError: the file is missing or is no fingerprint.
    """
    path = run / "device.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise RunFolderError(
            f"The run folder does not say which device it is of: {cause}",
            given=path,
            advice=f"autocompress search EXPERIMENT --run {run}",
        ) from cause
    if not isinstance(data, dict):
        raise RunFolderError("device.json must hold a mapping.", given=path)
    return validate(Fingerprint, data, path, RunFolderError)


def read_cost(run: Path) -> str:
    """The column of the first cost that a run's search goes by; latency where it does not say."""
    try:
        data: Any = read_yaml(run / "experiment.yaml", RunFolderError)["experiment"]
        return cost_of(data["objectives"])
    except (RunFolderError, KeyError, TypeError):
        # Made by an earlier version, or by hand: a table needs no experiment.
        return LATENCY


def cost_of(objectives: Sequence[Objective]) -> str:
    """The column of the first cost among objectives; latency where there is none."""
    columns = [OBJECTIVES[name] for name in objectives if name != "metric"]
    return columns[0] if columns else LATENCY


def front_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain values that JSON can hold, in the frame's order.

    Figures that were not taken are None, bytes are int, texts that are not there are None.
    """
    rows = typed_front(frame).to_dict(orient="records")
    return [{str(name): _plain(str(name), value) for name, value in row.items()} for row in rows]


def _plain(name: str, value: Any) -> str | bool | int | float | None:
    if name in _TEXTS:
        return str(value) or None
    if name in _FLAGS:
        return bool(value)
    if not np.isfinite(value):
        return None
    return int(value) if name in _BYTES else float(value)
