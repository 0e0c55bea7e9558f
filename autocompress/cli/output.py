"""What commands print."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

_WIDTH = 100


def say(text: str) -> None:
    """Tell what is being done, beside the output."""
    print(f"{text} ...", file=sys.stderr)


def tell(text: str) -> None:
    """Tell a fact, beside the output."""
    print(text, file=sys.stderr)


def make_console() -> Console:
    """Where tables go: at most 100 columns."""
    console = Console()
    # A log file has no width of its own; a narrower terminal keeps its own.
    return Console(width=min(console.width, _WIDTH) if console.is_terminal else _WIDTH)


def print_front(run: Path, console: Console, *, everything: bool = False) -> None:
    """Print a run's front as a table and a chart."""
    from autocompress.report.chart import front_chart
    from autocompress.report.columns import read_cost, read_device, read_front
    from autocompress.report.device import where
    from autocompress.report.tables import front_table

    frame, device, cost = read_front(run), read_device(run), read_cost(run)
    width, place = console.width, where(device)
    table = front_table(frame, cost=cost, device=place, everything=everything, width=width)
    console.print(table)
    console.print(front_chart(frame, cost=cost, width=width))
