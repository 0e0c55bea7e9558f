"""What a user sees while a search runs: a live bar and front, or plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, final

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autocompress.config import Objective
from autocompress.report import figures
from autocompress.report.columns import LATENCY, REFERENCES, cost_of, typed_front
from autocompress.report.tables import compact_table

_LINE_EVERY_S: Final = 10.0
# Each redraw costs a millisecond or two of the machine that is being measured.
_REDRAWS_PER_S: Final = 1.0


@final
@dataclass
class _Stage:
    name: str
    total: int | None
    limit_s: float | None
    started: float
    done: int = 0

    def share(self, now: float) -> float | None:
        """How much is done, 0 to 1, by the limit that will be hit first; None without a limit."""
        shares = []
        if self.total:
            shares.append(self.done / self.total)
        if self.limit_s:
            shares.append((now - self.started) / self.limit_s)
        return min(max(shares), 1.0) if shares else None

    def describe(self, now: float) -> str:
        """Counts, times and rate, in plain ASCII."""
        elapsed = max(now - self.started, 0.0)
        parts = []
        if self.total is not None or self.done:
            of = f"/{self.total}" if self.total is not None else ""
            parts.append(f"{self.done}{of} done")
        of = f" of {duration(self.limit_s)}" if self.limit_s else ""
        parts.append(duration(elapsed) + of)
        if self.done and elapsed >= 1:
            parts.append(f"{60 * self.done / elapsed:.1f} per minute")
        return ", ".join(parts)


@final
class SearchDisplay:
    """Context manager that shows the stages of a search and the best front so far.

    On a terminal: one live bar above the front. Elsewhere: a plain line for each finished stage and
    at most one every 10 s between, without control characters. Call it from one thread.

    Args:
        console: where to write; None is standard error, which leaves standard output to results.
        clock: seconds that never go back.
    """

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._clock = clock
        self._stage: _Stage | None = None
        self._front: RenderableType | None = None
        self._summary = ""
        self._last_line = clock()
        # FORCE_COLOR makes rich call a log file a terminal; cursor movements must not go there.
        live = self._console.is_interactive and self._console.file.isatty()
        self._live = self._make_live() if live else None

    def __enter__(self) -> SearchDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish("stopped" if kind else "finished")
        if self._live:
            self._live.stop()

    def stage(self, name: str, total: int | None = None, *, limit_s: float | None = None) -> None:
        """Begin a stage; the one before it is finished.

        Args:
            name: what is being done, such as `search`.
            total: how often `advance` will be called, if that is known.
            limit_s: the time limit in seconds, if there is one.
        """
        self._finish("finished")
        self._stage = _Stage(name, total, limit_s, self._clock())
        self._last_line = self._clock()

    def advance(self, steps: int = 1) -> None:
        """Count finished steps of the current stage."""
        if self._stage:
            self._stage.done += steps
            self._line_if_due()

    def note(self, text: str) -> None:
        """Show one sentence that must not be missed; it stays above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show_front(self, frame: pd.DataFrame, objectives: Sequence[Objective]) -> None:
        """Show the best front so far by the first of the costs that are searched.

        Args:
            frame: has the columns of `front.csv`.
        """
        front, cost = typed_front(frame), cost_of(objectives)
        members = front[front["on_front"] & ~front["role"].isin(REFERENCES)]
        self._summary = f"; front of {len(members)}{_best(members, cost)}"
        if self._live:
            width = min(self._console.width, 100)
            self._front = compact_table(front, cost=cost, width=width)
        self._line_if_due()

    def _make_live(self) -> Live:
        return Live(
            console=self._console,
            refresh_per_second=_REDRAWS_PER_S,
            get_renderable=self._render,
            vertical_overflow="crop",
        )

    def _render(self) -> RenderableType:
        # Rich calls this from its own thread: the stage may end meanwhile.
        stage, front = self._stage, self._front
        if stage is None:
            return Text("")
        now = self._clock()
        share = stage.share(now)
        bar = ProgressBar(
            total=None if share is None else 1.0,
            completed=share or 0.0,
            width=24,
            animation_time=now,
        )
        line = Table.grid(padding=(0, 1))
        line.add_row(Text(stage.name, style="bold"), bar, Text(stage.describe(now), style="dim"))
        return Group(line) if front is None else Group(line, front)

    def _finish(self, how: str) -> None:
        if self._stage is None:
            return
        text = f"{self._stage.name}: {how}, {self._stage.describe(self._clock())}{self._summary}"
        self._stage = None
        self._console.out(text, highlight=False)

    def _line_if_due(self) -> None:
        now = self._clock()
        if self._live is None and self._stage and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            text = f"{self._stage.name}: {self._stage.describe(now)}{self._summary}"
            self._console.out(text, highlight=False)


def _best(members: pd.DataFrame, cost: str) -> str:
    """Such as `, fastest 3.10x` or `, least 96.2 kB`; nothing where it is not known."""
    if cost == LATENCY:
        fastest = members["speedup"].max()
        return f", fastest {fastest:.2f}x" if fastest == fastest else ""
    least = members[cost].min()
    if least != least:
        return ""
    text = figures.millijoules(least) if cost == "energy_mj" else figures.byte_size(least)
    return f", least {text}"


def duration(seconds: float) -> str:
    """Seconds as `8 s`, `3 min 05 s` or `1 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
