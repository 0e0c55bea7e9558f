"""The front as a scatter of characters: a cost to the right, the metric upwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.text import Text

from autocompress.report import figures
from autocompress.report.columns import LATENCY, REFERENCES, typed_front
from autocompress.report.tables import NAMES, SIGNS, STYLES

_FRONT: Final = "●"
_OTHER: Final = "·"
_BELOW: Final = "▾"
_MARGIN: Final = 9
_LOG_BEYOND: Final = 5.0
_MIN_WIDTH: Final = 40
_MIN_HEIGHT: Final = 8
_SMALLEST_SPAN: Final = 1e-4
_COST: Final = "cost"
# Of costs that are no bytes.
_UNITS: Final = {LATENCY: "ms", "energy_mj": "mJ"}

Mark = tuple[str, str]


@final
@dataclass(frozen=True)
class _Frame:
    """The plotted range and the cells it is drawn on."""

    left: float
    right: float
    bottom: float
    top: float
    columns: int
    rows: int

    @property
    def log(self) -> bool:
        """Whether the cost is drawn by its logarithm."""
        return self.right > _LOG_BEYOND * self.left > 0

    def column(self, cost: float) -> int:
        """Column of a cost, 0 at the left."""
        low, high, value = self.left, self.right, cost
        if self.log:
            low, high, value = np.log(low), np.log(high), np.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(float(np.clip(share, 0, 1)) * (self.columns - 1))

    def row(self, metric: float) -> int:
        """Row of a metric, 0 at the top."""
        span = self.top - self.bottom
        share = (self.top - metric) / span if span > 0 else 0.5
        return round(float(np.clip(share, 0, 1)) * (self.rows - 1))

    def cost(self, share: float) -> float:
        """The cost at a share of the width."""
        if self.log:
            return float(self.left * (self.right / self.left) ** share)
        return self.left + share * (self.right - self.left)


def front_chart(
    frame: pd.DataFrame, *, cost: str = LATENCY, width: int = 100, height: int = 16
) -> Text:
    """Scatter of a cost against the metric on the search split, which every row has.

    Both references are always inside the frame. The metric's axis ends below the references and
    the upper three quarters of the front; what is worse is drawn on the lowest row as ▾, so that a
    few useless candidates do not squash the rest. The cost is logarithmic beyond a range of 5.

    Args:
        frame: the columns of `front.csv`; rows without cost or metric are left out.
        cost: a column of it, of figures that are positive (see `read_cost`).
        width: the most columns taken, at least 40.
        height: the most rows taken, legend and axis included, at least 8.
    """
    width, height = max(width, _MIN_WIDTH), max(height, _MIN_HEIGHT)
    front = typed_front(frame)
    known = np.isfinite(front[[cost, "metric_search"]]).all(axis=1)
    front = front[known & (front[cost] > 0)].rename(columns={cost: _COST})
    if front.empty:
        return Text("No point has been measured yet.")
    plot = _frame(front, columns=width - _MARGIN - 2, rows=height - 4)
    cells = _cells(front, plot)
    share = figures.is_share(front)
    text = Text(no_wrap=True, overflow="crop")
    text.append(_legend(front))
    for row in range(plot.rows):
        level = plot.top - row / (plot.rows - 1) * (plot.top - plot.bottom)
        labelled = row % 4 == 0 or row == plot.rows - 1
        text.append(f"{figures.metric(level, share=share) if labelled else '':>{_MARGIN}} ")
        text.append("┤" if labelled else "│")
        for column in range(plot.columns):
            text.append(*cells.get((row, column), (" ", "")))
        text.append("\n")
    text.append(" " * (_MARGIN + 1) + "└" + "─" * plot.columns + "\n")
    text.append(_cost_axis(plot, cost))
    return text


def _frame(front: pd.DataFrame, *, columns: int, rows: int) -> _Frame:
    cost = front[_COST].to_numpy(dtype=np.float64)
    metric = front["metric_search"].to_numpy(dtype=np.float64)
    reference = front["role"].isin(REFERENCES).to_numpy()
    member = front["on_front"].to_numpy(dtype=np.bool_) & ~reference
    floor: NDArray[np.float64] = metric[reference]
    if member.any():
        floor = np.append(floor, np.quantile(metric[member], 0.25))
    top = float(metric.max())
    bottom = float(floor.min() if len(floor) else metric.min())
    if top - bottom < _SMALLEST_SPAN * abs(top):
        # All that matters lies on one level: what is worse gives the axis its length.
        bottom = float(metric.min())
    return _Frame(
        left=float(cost.min()),
        right=float(cost.max()),
        bottom=bottom,
        top=top,
        columns=columns,
        rows=rows,
    )


def _cells(front: pd.DataFrame, plot: _Frame) -> dict[tuple[int, int], Mark]:
    """What stands in each (row, column); references over the front over the others."""
    cells: dict[tuple[int, int], Mark] = {}
    rank = np.where(front["role"].isin(REFERENCES), 2, front["on_front"].astype(int))
    for index in np.argsort(rank, kind="stable"):
        row: dict[Any, Any] = front.iloc[int(index)].to_dict()
        place = plot.row(row["metric_search"]), plot.column(row[_COST])
        if row["role"] in REFERENCES:
            place = _free_beside(place, cells, plot)
            cells[place] = SIGNS[row["role"]], STYLES[row["role"]]
        else:
            style = STYLES["finalist"] if row["on_front"] else "dim"
            sign = _FRONT if row["on_front"] else _OTHER
            below = row["metric_search"] < plot.bottom
            cells[place] = _BELOW if below else sign, style
    return cells


def _free_beside(
    place: tuple[int, int], cells: dict[tuple[int, int], Mark], plot: _Frame
) -> tuple[int, int]:
    """The place itself, or one column beside it where the other reference already stands."""
    taken = {SIGNS[role] for role in REFERENCES}
    if place in cells and cells[place][0] in taken:
        row, column = place
        return row, column - 1 if column + 1 >= plot.columns else column + 1
    return place


def _legend(front: pd.DataFrame) -> Text:
    legend = Text("metric on the search split   ")
    roles = set(front["role"])
    for role in REFERENCES:
        if role in roles:
            legend.append(SIGNS[role], STYLES[role])
            legend.append(f" {NAMES[role].removeprefix('the ')}  ")
    legend.append(_FRONT, STYLES["finalist"])
    legend.append(f" front  {_OTHER} other  {_BELOW} lower\n")
    return legend


def _cost_axis(plot: _Frame, column: str) -> str:
    """Five costs under their columns, and the unit."""
    unit = _UNITS.get(column, "")
    text = figures.number if unit else figures.byte_size
    line = [" "] * plot.columns
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        label = text(plot.cost(share))
        start = round(share * (plot.columns - 1)) - round(share * (len(label) - 1))
        line[start : start + len(label)] = label
    scale = ", ".join(filter(None, (unit, "log" if plot.log else "")))
    return f"{scale:>{_MARGIN}}  " + "".join(line)
