"""Handing out a picked model: the ONNX file and a JSON card that says what it is."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from autocompress.device import Fingerprint
from autocompress.errors import ConfigError, RunFolderError
from autocompress.evaluation import SHARE
from autocompress.files import write_whole
from autocompress.report.columns import read_device
from autocompress.report.pick import Choice

_BLOCK = 1 << 20


class Figure(BaseModel):
    """One figure of a model; `ci_low` and `ci_high` where its interval was taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    unit: str
    ci_low: float | None = None
    ci_high: float | None = None
    source: Literal["measured"] = "measured"


class RunWith(BaseModel):
    """How the model must be run for the figures to hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    runtime: str
    runtime_version: str
    settings: dict[str, Any]
    threads: int
    batch_size: int


class ModelCard(BaseModel):
    """What stands beside a handed-out model, as JSON.

    `plan` has the rows of `Plan.to_rows`; it is empty for the original network, and where the run
    folder does not hold the plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[2] = 2
    name: str
    model: str
    sha256: str
    role: str
    reason: str
    figures: dict[str, Figure]
    trusted: bool
    plan_hash: str | None
    plan: tuple[dict[str, Any], ...]
    device: Fingerprint
    device_id: str
    run_with: RunWith
    autocompress_version: str


def hand_out(run: Path, choice: Choice, out: Path) -> Path:
    """Copy a picked model to `out/<name>.onnx` with its card `out/<name>.json`.

    The model appears under its name only once it is whole. Picking the same model again changes
    nothing but the card.

    Args:
        run: the run folder that the choice is from.
        choice: what `pick` gave.
        out: a folder; made if it is not there.

    Returns:
        The path of the ONNX file.

    Raises:
        RunFolderError: the run folder lacks the model, its device or a readable plan.
        ConfigError: `out` cannot be written, or holds another model under that name.
    """
    row = choice.row
    source = _artifact(run, row)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(row["candidate"])).strip(".-") or str(row["role"])
    target = out / f"{name}.onnx"
    digest = _sha256(source)
    card = _card(run, choice, name, digest)
    text = json.dumps(card.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            write_whole(target, source.read_bytes())
        elif _sha256(target) != digest:
            raise ConfigError(
                "There is another model of that name in the folder; it is not overwritten.",
                given=target,
                advice="give another folder to --out, or move the model away",
            )
        write_whole(out / f"{name}.json", text.encode())
    except OSError as cause:
        raise ConfigError(f"The model cannot be written: {cause}", given=f"--out {out}") from cause
    return target


def read_card(path: Path) -> ModelCard:
    """Read a card back.

    Raises:
        ConfigError: the file cannot be read or is no card.
    """
    try:
        return ModelCard.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigError(f"This is not a model's card: {cause}", given=path) from cause


def _artifact(run: Path, row: dict[str, Any]) -> Path:
    path = run / str(row["artifact"] or "")
    if not row["artifact"] or not path.is_file():
        raise RunFolderError(
            "The picked model's file is not in the run folder.",
            given=row["artifact"] or f"no artifact for {row['candidate']}",
            advice="run `autocompress search` again with the same run folder, or pick another",
        )
    return path


def _card(run: Path, choice: Choice, name: str, digest: str) -> ModelCard:
    row, device = choice.row, read_device(run)
    runtime = device.runtime(row["runtime"] or device.runtimes[0].name)
    return ModelCard(
        name=name,
        model=f"{name}.onnx",
        sha256=digest,
        role=row["role"],
        reason=choice.reason,
        figures=_figures(row),
        trusted=row["trusted"],
        plan_hash=row["plan_hash"],
        plan=_plan_rows(run, row["plan_hash"]),
        device=device,
        device_id=device.id,
        run_with=RunWith(
            runtime=runtime.name,
            runtime_version=runtime.version,
            settings=runtime.settings,
            threads=device.threads,
            batch_size=device.batch_size,
        ),
        autocompress_version=_version(),
    )


def _figures(row: dict[str, Any]) -> dict[str, Figure]:
    """The figures that were taken; a missing one is left out."""
    lost = "percentage points" if row["metric_unit"] == SHARE else "of the metric, in its own unit,"
    units = {
        "metric_search": "metric on the search split",
        "metric_test": "metric on the test split",
        "drop_test_pp": f"{lost} lost on the test split",
        "latency_ms": "ms",
        "speedup": "times faster than the original network",
        "energy_mj": "mJ per inference",
        "file_bytes": "B",
        "download_bytes": "B in the coded container",
        "peak_memory_bytes": "B",
        "gpu_memory_bytes": "B",
    }
    taken = {
        key: Figure(value=row[key], unit=unit)
        for key, unit in units.items()
        if row[key] is not None
    }
    if "speedup" in taken:
        interval = {"ci_low": row["speedup_low"], "ci_high": row["speedup_high"]}
        taken["speedup"] = taken["speedup"].model_copy(update=interval)
    if "energy_mj" in taken:
        interval = {"ci_low": row["energy_low_mj"], "ci_high": row["energy_high_mj"]}
        taken["energy_mj"] = taken["energy_mj"].model_copy(update=interval)
    return taken


def _plan_rows(run: Path, plan_hash: str | None) -> tuple[dict[str, Any], ...]:
    path = run / "plans" / f"{plan_hash}.json"
    if not plan_hash or not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise RunFolderError(f"A plan cannot be read: {cause}", given=path) from cause
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RunFolderError("A plan's file must hold a list of rows.", given=path)
    return tuple(rows)


def _version() -> str:
    try:
        return metadata.version("autocompress")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
