"""What a sweep found: one table and one chart across its runs, and who dominates whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.files import write_whole
from autocompress.pareto import hypervolume, non_dominated
from autocompress.report import figures
from autocompress.report.columns import read_front
from autocompress.search.columns import ORIGINAL
from autocompress.search.sweep import Finished, by_group

# Columns of `front.csv` that stand for objectives, and whether more of it is better.
_COLUMNS: Final[Mapping[str, tuple[str, bool]]] = {
    "metric": ("metric_test", True),
    "latency": ("speedup", True),
    "energy": ("energy_mj", False),
    "file_bytes": ("file_bytes", False),
    "download_bytes": ("download_bytes", False),
    "peak_memory": ("peak_memory_bytes", False),
    "gpu_memory": ("gpu_memory_bytes", False),
}
# What a point may lose: percentage points, or hundredths of the original's own metric.
_LOST = 1.0


@final
@dataclass(frozen=True)
class Row:
    """A run among those of its workload and device, by its finalists' figures on the test split.

    Attributes:
        points: on the run's own front.
        on_joint_front: of them those that no run of the group dominates.
        covered: share of its points that some other run's point dominates or equals.
        volume: hypervolume as a share of the joint front's, the original network the corner.
        speedup: the fastest point that lost at most one percentage point, or of a user's metric a
            hundredth of the original's; NaN if there is none.
        download_bytes: of the smallest such point's coded file.
    """

    group: str
    label: str
    run: str
    minutes: float
    points: int
    on_joint_front: int
    covered: float
    volume: float
    speedup: float
    download_bytes: float


def sweep_rows(finished: Sequence[Finished]) -> list[Row]:
    """One row for each run that has a front, group by group."""
    return [row for group, runs in by_group(finished) for row in _group_rows(group, runs)]


def covered_share(
    own: NDArray[np.float64], other: NDArray[np.float64], maximise: Sequence[bool]
) -> float:
    """The share of points that some other point dominates or equals.

    Zitzler & Thiele, "Multiobjective evolutionary algorithms: a comparative case study and the
    strength Pareto approach" (1999), the coverage C(other, own).

    Args:
        own, other: shape (points, objectives).
        maximise: whether larger is better, by objective.
    """
    if not len(own) or not len(other):
        return 0.0
    sign = np.where(list(maximise), 1.0, -1.0)
    no_worse = (sign * other[:, None] >= sign * own[None]).all(axis=2)
    return float(no_worse.any(axis=0).mean())


def sweep_parts(rows: Sequence[Row], failed: Sequence[Finished]) -> list[RenderableType]:
    """The table, at most 100 columns wide, and what failed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("space, sampler, seed", "points", "joint", "covered", "volume", "speed-up",
                 "coded", "minutes"):  # fmt: skip
        right = name != "space, sampler, seed"
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_row(Text(group, style="bold"))
        table.add_row(
            f"  {row.label}",
            str(row.points),
            str(row.on_joint_front),
            f"{row.covered:.0%}",
            f"{row.volume:.1%}",
            figures.ABSENT if np.isnan(row.speedup) else f"{figures.number(row.speedup)}x",
            figures.ABSENT
            if np.isnan(row.download_bytes)
            else figures.byte_size(row.download_bytes),
            f"{row.minutes:.1f}",
        )
    legend = (
        "points: on the run's own front, judged on the test split; joint: of them on the front of "
        "all runs of the workload and device; covered: share that another run dominates or equals; "
        "volume: hypervolume against the joint front's; speed-up, coded: the best with at most one "
        "point lost, or a hundredth of a metric of your own"
    )
    parts: list[RenderableType] = [table, Text(legend, style="dim", overflow="fold")]
    parts += [Text(f"failed: {one.cell.name}: {one.failure}") for one in failed]
    return parts


def write_sweep(rows: Sequence[Row], finished: Sequence[Finished], folder: Path) -> None:
    """Write `sweep.csv`, a row for each run, and the chart `sweep.html`, which needs no network."""
    frame = pd.DataFrame([asdict(row) for row in rows])
    write_whole(folder / "sweep.csv", frame.to_csv(index=False).encode())
    write_whole(folder / "sweep.html", sweep_chart(finished).to_html().encode())


def sweep_chart(finished: Sequence[Finished]) -> go.Figure:
    """Speed-up against what every run's front lost, a panel for each group."""
    groups = list(by_group(finished))
    figure = make_subplots(
        rows=max(len(groups), 1), cols=1, subplot_titles=[name for name, _ in groups]
    )
    for number, (_, runs) in enumerate(groups, 1):
        unit = "points" if figures.is_share(read_front(runs[0].run)) else "metric"
        for one in runs:
            front = _front(one).sort_values("speedup")
            figure.add_trace(
                go.Scatter(
                    x=front["speedup"],
                    y=front["drop_test_pp"],
                    text=front["candidate"],
                    name=f"{one.cell.group}: {one.cell.label}",
                    mode="lines+markers",
                    line={"shape": "hv"},
                    hovertemplate="%{text}: %{x:.2f}x, %{y:.3~g} " + f"{unit} lost",
                ),
                row=number,
                col=1,
            )
        figure.update_xaxes(type="log", title="times faster than the original", row=number, col=1)
        figure.update_yaxes(
            title=f"{unit} lost on the test split", autorange="reversed", row=number, col=1
        )
    figure.update_layout(height=420 * max(len(groups), 1), template="plotly_white")
    return figure


def _front(one: Finished) -> pd.DataFrame:
    frame = read_front(one.run)
    judged = (frame["role"] == "finalist") & frame["on_front"] & frame["metric_test"].notna()
    front: pd.DataFrame = frame.loc[judged]
    return front


def _group_rows(group: str, runs: Sequence[Finished]) -> list[Row]:
    objectives = [name for name in runs[0].cell.experiment["objectives"] if name in _COLUMNS]
    columns = [_COLUMNS[name][0] for name in objectives]
    maximise = [_COLUMNS[name][1] for name in objectives]
    fronts = [_front(one) for one in runs]
    values = [front[columns].to_numpy(dtype=np.float64) for front in fronts]
    joint = np.concatenate(values)
    best = non_dominated(joint, maximise=maximise) if len(joint) else np.zeros(0, dtype=bool)
    corner = _corner(runs[0], columns, maximise)
    allowed = _allowed_drop(runs[0])
    whole = hypervolume(joint, corner, maximise=maximise) or 1.0
    rows, start = [], 0
    for one, front, own in zip(runs, fronts, values, strict=True):
        others = [v for v in values if v is not own]
        other = np.concatenate(others) if others else own[:0]
        good = front[front["drop_test_pp"] <= allowed]
        rows.append(
            Row(
                group,
                one.cell.label,
                str(one.run),
                one.seconds / 60,
                len(own),
                int(best[start : start + len(own)].sum()),
                covered_share(own, other, maximise),
                hypervolume(own, corner, maximise=maximise) / whole,
                float(good["speedup"].max()),
                float(good["download_bytes"].min()),
            )
        )
        start += len(own)
    return rows


def _allowed_drop(one: Finished) -> float:
    frame = read_front(one.run)
    original = frame.loc[frame["candidate"] == ORIGINAL, "metric_test"]
    return _LOST if figures.is_share(frame) else _LOST * abs(float(original.iloc[0])) / 100


def _corner(one: Finished, columns: Sequence[str], maximise: Sequence[bool]) -> NDArray[np.float64]:
    """The original network, with a metric that lost a tenth."""
    frame = read_front(one.run)
    original = frame[frame["role"] == "original"][list(columns)].to_numpy(dtype=np.float64)[0]
    worse = [
        v - 0.1 * abs(v) if name == "metric_test" else v
        for v, name in zip(original, columns, strict=True)
    ]
    return np.where(np.isfinite(worse), worse, 0.0)
