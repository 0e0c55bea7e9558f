from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from autocompress.config import Objective
from autocompress.report.figures import byte_size
from autocompress.report.progress import SearchDisplay, duration


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclass
class Log:
    clock: Clock = field(default_factory=Clock)
    file: io.StringIO = field(default_factory=io.StringIO)

    def display(self) -> SearchDisplay:
        return SearchDisplay(Console(file=self.file, width=60), clock=self.clock)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def test_a_log_gets_few_plain_lines(front: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = Log()
    with log.display() as display:
        display.stage("statistics")
        log.clock.now += 4
        display.stage("search", 40, limit_s=600)
        for _ in range(40):
            log.clock.now += 1
            display.advance()
            display.show_front(front, ["metric", "latency"])
    assert log.lines == [
        "statistics: finished, 4 s",
        "search: 10/40 done, 10 s of 10 min 00 s, 60.0 per minute; front of 5, fastest 8.00x",
        "search: 20/40 done, 20 s of 10 min 00 s, 60.0 per minute; front of 5, fastest 8.00x",
        "search: 30/40 done, 30 s of 10 min 00 s, 60.0 per minute; front of 5, fastest 8.00x",
        "search: 40/40 done, 40 s of 10 min 00 s, 60.0 per minute; front of 5, fastest 8.00x",
        "search: finished, 40/40 done, 40 s of 10 min 00 s, 60.0 per minute;"
        " front of 5, fastest 8.00x",
    ]
    assert log.file.getvalue().isascii()
    assert not any(ord(sign) < 32 and sign != "\n" for sign in log.file.getvalue())


@pytest.mark.parametrize(
    ("objectives", "text"),
    [
        (["metric"], "fastest 8.00x"),
        (["metric", "latency", "download_bytes"], "fastest 8.00x"),
        (["metric", "download_bytes", "latency"], "least {}"),
        (["metric", "energy"], ""),
    ],
)
def test_the_best_is_told_by_the_first_cost_that_is_searched(
    front: pd.DataFrame, objectives: list[Objective], text: str
) -> None:
    log = Log()
    with log.display() as display:
        display.stage("search", 40)
        display.show_front(front.assign(energy_mj=np.nan), objectives)
    members = front[front["on_front"] & (front["role"] == "finalist")]
    least = byte_size(members["download_bytes"].min())
    assert log.lines[0].partition("; front of 5")[2].removeprefix(", ") == text.format(least)


def test_an_error_ends_as_stopped() -> None:
    log = Log()
    with pytest.raises(KeyboardInterrupt), log.display() as display:
        display.stage("search", 40)
        display.advance(3)
        raise KeyboardInterrupt
    assert log.lines == ["search: stopped, 3/40 done, 0 s"]


def test_a_terminal_gets_a_bar_and_the_front(front: pd.DataFrame) -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=100)
    with SearchDisplay(console) as display:
        display.stage("search", 40)
        display.advance()
        display.show_front(front, ["metric", "latency"])
        assert display._live is not None
        display._live.refresh()
    text = file.getvalue()
    assert "1/40 done" in text and "◆ original" in text and "\x1b[" in text
    assert "search: finished" in text


def test_calls_without_a_stage_do_nothing(front: pd.DataFrame) -> None:
    log = Log()
    with log.display() as display:
        display.advance()
        display.show_front(front, ["metric", "latency"])
    assert log.lines == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (4320, "1 h 12 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
