"""The front as rich tables that fit a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from autocompress.plan import file_of
from autocompress.report import figures
from autocompress.report.columns import LATENCY, REFERENCES, typed_front

SIGNS: Final = {"original": "◆", "stock_int8": "▲", "finalist": "●", "candidate": "○"}
STYLES: Final = {
    "original": "bold cyan", "stock_int8": "bold magenta", "finalist": "green", "candidate": "",
}  # fmt: skip
NAMES: Final = {"original": "the original network", "stock_int8": "the stock tool's int8"}
UNTRUSTED: Final = "*"
_BESIDE: Final = "◌"
_FOOTNOTE: Final = (
    f"{UNTRUSTED} untrusted: the interval stayed wider than the device profile asks, or the"
    " machine was too busy."
)

Row = dict[str, Any]


@final
@dataclass(frozen=True)
class _Column:
    heading: str
    width: int
    cell: Callable[[Row, bool], str]
    justify: JustifyMethod = "right"


def _label(row: Row, share: bool) -> str:
    beside = row["role"] == "finalist" and not row["on_front"]
    sign = _BESIDE if beside else SIGNS[row["role"]]
    return f"{sign} {file_of(row['candidate']) or row['role']}"


def _speedup(row: Row, share: bool) -> str:
    text = figures.speedup(row["speedup"], row["speedup_low"], row["speedup_high"])
    return text if row["trusted"] else text + UNTRUSTED


def _front_sign(row: Row, share: bool) -> str:
    return "yes" if row["on_front"] else "no"


def _drop(row: Row, share: bool) -> str:
    return figures.drop(row["drop_test_pp"], share=share)


_CANDIDATE: Final = _Column("candidate", 14, _label, "left")
_SEARCHED: Final = _Column(
    "metric\nsearch", 8, lambda row, share: figures.metric(row["metric_search"], share=share)
)
_TESTED: Final = _Column(
    "metric\ntest", 8, lambda row, share: figures.metric(row["metric_test"], share=share)
)
_DROP: Final = _Column("drop\npoints", 7, _drop)
_OWN_DROP: Final = _Column("drop\nmetric", 7, _drop)
_LATENCY: Final = _Column("latency", 10, lambda row, share: figures.milliseconds(row["latency_ms"]))
_SPEEDUP: Final = _Column("speed-up", 19, _speedup, "left")
_RUNTIME: Final = _Column("runtime", 24, lambda row, share: row["runtime"], "left")
_ENERGY: Final = _Column("energy", 10, lambda row, share: figures.millijoules(row["energy_mj"]))
_FILE: Final = _Column("file", 8, lambda row, share: figures.byte_size(row["file_bytes"]))
_DOWNLOAD: Final = _Column("coded", 8, lambda row, share: figures.byte_size(row["download_bytes"]))
_MEMORY: Final = _Column(
    "peak\nmemory", 8, lambda row, share: figures.byte_size(row["peak_memory_bytes"])
)
_ON_FRONT: Final = _Column("front", 5, _front_sign, "left")
_COST_COLUMNS: Final = {
    "file_bytes": _FILE, "download_bytes": _DOWNLOAD, "peak_memory_bytes": _MEMORY,
    "energy_mj": _ENERGY,
}  # fmt: skip
# What a narrow terminal does without, in this order.
_EXPENDABLE: Final = (_MEMORY, _DOWNLOAD, _SEARCHED, _FILE, _ON_FRONT)


def front_table(
    frame: pd.DataFrame,
    *,
    cost: str = LATENCY,
    device: str = "",
    everything: bool = False,
    width: int = 100,
) -> Table:
    """The front and all judged points by rising cost, with both reference rows.

    Args:
        frame: the columns of `front.csv`.
        cost: the column that the rows go by; it is always shown.
        device: where the figures were measured; goes into the title.
        everything: also show the points that are not on the front, and a column that says which.
        width: the most columns that the table takes; under 100, figures that do not fit are left
            out: peak memory first, then the coded size, the metric of the search split and the
            file's size.
    """
    front = typed_front(frame)
    on_front = int((front["on_front"] & ~front["role"].isin(REFERENCES)).sum())
    trials = int((~front["role"].isin(REFERENCES)).sum())
    told = front["on_front"] | front["role"].isin((*REFERENCES, "finalist"))
    shown = front if everything else front[told]
    share = figures.is_share(front)
    columns = [_CANDIDATE, *_when_told(front), _SEARCHED, _TESTED]
    columns += [_DROP if share else _OWN_DROP, _LATENCY, _SPEEDUP]
    columns += [_ENERGY] if front["energy_mj"].notna().any() else []
    columns += [_FILE, _DOWNLOAD, _MEMORY]
    if everything:
        columns.append(_ON_FRONT)
    title = f"Front of {on_front} out of {trials} candidates, measured on {device or 'this device'}"
    shown = _by_cost(shown, cost)
    table = _table(shown, columns, cost, share=share, width=width)
    table.title = Text(title, style="bold")
    signs = [f"{SIGNS[role]} {text}" for role, text in NAMES.items()]
    notes = ["   ".join([*signs, f"{SIGNS['finalist']} finalist, judged on the test split"])]
    if (shown["role"].eq("finalist") & ~shown["on_front"]).any():
        notes.append(f"{_BESIDE} judged as well: off the front by the figures of the search")
    if not shown["trusted"].all():
        notes.append(_FOOTNOTE)
    table.caption = Text("\n".join(notes), style="dim")
    table.caption_justify = "left"
    return table


def compact_table(
    frame: pd.DataFrame, *, cost: str = LATENCY, rows: int = 8, width: int = 100
) -> Table:
    """The best front so far in few rows: the references and points spread along the front.

    Args:
        frame: the columns of `front.csv`.
        cost: the column that the rows go by.
        rows: the most rows shown, at least 3.
        width: the most columns that the table takes.
    """
    front = typed_front(frame)
    references = front["role"].isin(REFERENCES)
    members = _by_cost(front[front["on_front"] & ~references], cost)
    room = max(rows - int(references.sum()), 1)
    if len(members) > room:
        members = members.iloc[np.linspace(0, len(members) - 1, room).round().astype(int)]
    shown = _by_cost(pd.concat([front[references], members]), cost)
    columns = [_CANDIDATE, *_when_told(front), _SEARCHED, _LATENCY, _SPEEDUP, _FILE]
    if cost in _COST_COLUMNS and _COST_COLUMNS[cost] not in columns:
        columns.append(_COST_COLUMNS[cost])
    return _table(shown, columns, cost, share=figures.is_share(front), width=width)


def _when_told(front: pd.DataFrame) -> list[_Column]:
    """The runtime's column, where there is more than one runtime."""
    return [_RUNTIME] if front["runtime"].nunique() > 1 else []


def _by_cost(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Rows by rising cost, then latency; unknown last."""
    keys = list(dict.fromkeys((cost, LATENCY)))
    ordered: pd.DataFrame = rows.sort_values(keys, kind="stable", na_position="last")
    return ordered


def _table(
    shown: pd.DataFrame, columns: list[_Column], cost: str, *, share: bool, width: int
) -> Table:
    """As many of the columns as fit, at their natural width."""
    ruler = Console(width=1000, color_system=None)
    table = _rows(shown, columns, share)
    for spare in _EXPENDABLE:
        if spare is _COST_COLUMNS.get(cost):
            continue
        if ruler.measure(table).maximum <= width:
            return table
        columns = [column for column in columns if column is not spare]
        table = _rows(shown, columns, share)
    table.width = min(ruler.measure(table).maximum, width)
    return table


def _rows(shown: pd.DataFrame, columns: list[_Column], share: bool) -> Table:
    """Texts are never read as rich markup."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(
            Text(column.heading),
            justify=column.justify,
            max_width=column.width,
            overflow="fold",
            no_wrap=column is not _CANDIDATE,
        )
    for row in shown.to_dict(orient="records"):
        cells = {str(key): value for key, value in row.items()}
        table.add_row(
            *(Text(column.cell(cells, share)) for column in columns),
            style=STYLES[cells["role"]],
        )
    return table
