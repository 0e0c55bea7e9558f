"""Leaving out of a search what the device's latency table shows not to be faster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

from pydantic import BaseModel, ConfigDict

from autocompress.errors import RunFolderError
from autocompress.files import write_json
from autocompress.measure.table.store import Store, cache_path
from autocompress.measure.table.table import Table
from autocompress.search.prepare import Prepared
from autocompress.search.progress import Progress
from autocompress.search.space import Space
from autocompress.search.storage import has_study
from autocompress.search.thin import Thinned, latency_alone, thin_space
from autocompress.search.variants import find_variants

_FILE = "dropped_levels.json"
_SHOWN = 3


@final
class DroppedLevels(BaseModel):
    """What a search leaves out: it must not change while its study goes on.

    Attributes:
        indices: by the name of a parameter, which of its decisions, counted from 0.
        reasons: one text for each in the words of the table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    indices: dict[str, tuple[int, ...]] = {}
    reasons: tuple[str, ...] = ()


def keep_paying_levels(prepared: Prepared, progress: Progress) -> Prepared:
    """The search without levels that are not faster; decided once per run folder, and kept in it.

    Only where nothing but the metric and latency counts, and only by a table that
    `autocompress profile --network` has made: a search does not measure single layers itself.

    Args:
        prepared: its run folder is claimed.

    Raises:
        RunFolderError: what the folder keeps about it cannot be read.
    """
    path = prepared.folder.path / _FILE
    if path.is_file():
        dropped = _read(path)
    elif has_study(prepared.folder.path) or not latency_alone(prepared.experiment.objectives):
        return prepared
    else:
        dropped = _find(prepared, progress)
        write_json(path, dropped.model_dump(mode="json"))
    if dropped.reasons:
        shown = "; ".join(dropped.reasons[:_SHOWN])
        rest = len(dropped.reasons) - _SHOWN
        more = f"; and {rest} more, all in {path}" if rest > 0 else ""
        progress.note(f"not searched, because it is no faster on this device: {shown}{more}")
    return replace(prepared, space=_without(prepared.space, dropped))


def _find(prepared: Prepared, progress: Progress) -> DroppedLevels:
    """A level goes if it is no faster in any of the profile's runtimes."""
    profile, space = prepared.profile, prepared.space
    tables = [
        Table(Store(cache_path(prepared.identity.device.runtime_id(name))).entries().values())
        for name in profile.runtime_names
    ]
    if any(len(table) == 0 for table in tables):
        return DroppedLevels()
    progress.stage("find levels that pay")
    network = (prepared.workload, prepared.graph, prepared.exporter)
    variants = find_variants(*network, space, profile)
    found = [thin_space(space, prepared.graph, variants, table, profile) for table in tables]
    kept = {(p.name, d) for thinned in found for p in thinned.space.parameters for d in p.decisions}
    indices = {
        p.name: tuple(i for i, d in enumerate(p.decisions) if (p.name, d) not in kept)
        for p in space.parameters
    }
    indices = {name: gone for name, gone in indices.items() if gone}
    return DroppedLevels(indices=indices, reasons=_reasons(found, indices, space))


def _reasons(
    found: Sequence[Thinned], indices: Mapping[str, tuple[int, ...]], space: Space
) -> tuple[str, ...]:
    if len(found) == 1:
        return found[0].reasons
    # Times differ by runtime: only what goes in all of them is named.
    decisions = {p.name: p.decisions for p in space.parameters}
    return tuple(
        f"{name} {decisions[name][i].model_dump(mode='json')}, no faster in any runtime"
        for name, gone in indices.items()
        for i in gone
    )


def _without(space: Space, dropped: DroppedLevels) -> Space:
    parameters = []
    for parameter in space.parameters:
        gone = dropped.indices.get(parameter.name, ())
        decisions = tuple(d for i, d in enumerate(parameter.decisions) if i not in gone)
        if decisions:
            parameters.append(replace(parameter, decisions=decisions))
    return replace(space, parameters=tuple(parameters))


def _read(path: Path) -> DroppedLevels:
    try:
        return DroppedLevels.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as cause:
        raise RunFolderError(
            f"What the search leaves out cannot be read: {cause}",
            given=path,
            advice="give another folder with --run",
        ) from cause
