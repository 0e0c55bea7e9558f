"""What `autocompress solve` shows: the solved plan's figures, and measured candidates beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.evaluation import POINTS
from autocompress.measure.measurement import Measurement
from autocompress.plan import file_of
from autocompress.report import figures
from autocompress.search.solve import Solved
from autocompress.search.solve_figures import Figures, MeasuredCandidate
from autocompress.search.solve_limits import Limits

_UNTRUSTED: Final = "*"


def solved_parts(solved: Solved) -> list[RenderableType]:
    """The solved plan, its predicted and its measured figures apart, and the run's candidates.

    Everything fits 100 columns.
    """
    return [_plan_table(solved), *map(_note, _notes(solved)), Text(""), _within_table(solved)]


def limits_text(limits: Limits) -> str:
    """The limits in words, such as `latency at most 0.500 ms`."""
    words: dict[str, tuple[str, Callable[[float], str]]] = {
        "--max-latency-ms": ("latency at most", figures.milliseconds),
        "--min-speedup": ("speed-up at least", lambda value: f"{figures.number(value)}x"),
        "--max-bytes": ("file at most", figures.byte_size),
        "--max-download-bytes": ("coded file at most", figures.byte_size),
    }
    said = [(words[option], value) for option, value in limits.options().items()]
    return ", ".join(f"{label} {text(value)}" for (label, text), value in said)


def _plan_table(solved: Solved) -> Table:
    predicted, measured = solved.predicted, solved.measured
    drop = predicted.drop or (measured.drop if measured else None)
    unit = f", {POINTS}" if drop is not None and drop.unit == POINTS else ""
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("latency, ms", lambda f: _interval(f.latency, figures.number)),
        ("speed-up", _speedup),
        (f"drop of the metric{unit}", lambda f: _interval(f.drop, _drop_text(f.drop))),
        ("file", lambda f: _size(f.file_bytes)),
        ("coded file", lambda f: _size(f.download_bytes)),
    ]
    table = _table(f"Plan {file_of(solved.candidate)} in {solved.runtime}")
    for heading in ("", "predicted", *(["measured"] if measured else [])):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, say in rows:
        table.add_row(
            *(Text(t) for t in (name, say(predicted), *([say(measured)] if measured else [])))
        )
    return table


def _within_table(solved: Solved) -> Table | Text:
    """Candidates of the run, measured all of them."""
    limits = limits_text(solved.limits)
    if not solved.within:
        return Text(f"The run has measured no candidate with {limits}.", overflow="fold")
    table = _table(f"Measured candidates of the run with {limits}")
    headings = ("candidate", "drop", "latency", "speed-up", "file", "coded")
    runtimes = len({c.runtime for c in solved.within} | {solved.runtime}) > 1
    for heading in (*headings, *(["runtime"] if runtimes else []), ""):
        left = heading in ("candidate", "runtime", "")
        table.add_column(
            heading, justify="left" if left else "right", max_width=24, overflow="fold"
        )
    for candidate in solved.within:
        cells = _cells(candidate)
        extra = [candidate.runtime] if runtimes else []
        table.add_row(*map(Text, (*cells, *extra, "trained" if candidate.trained else "")))
    if not all(c.figures.latency.trusted for c in solved.within):
        table.caption = Text(f"{_UNTRUSTED} untrusted: the interval stayed too wide.", style="dim")
        table.caption_justify = "left"
    return table


def _cells(candidate: MeasuredCandidate) -> list[str]:
    measured = candidate.figures
    return [
        file_of(candidate.candidate),
        figures.ABSENT if measured.drop is None else _drop_text(measured.drop)(measured.drop.value),
        figures.milliseconds(measured.latency.value),
        _speedup(measured),
        _size(measured.file_bytes),
        _size(measured.download_bytes),
    ]


def _notes(solved: Solved) -> list[str]:
    counts = Counter(step.decision.technique for step in solved.plan.steps)
    steps = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    notes = [f"steps: {steps}" if steps else "The original network is within the limits."]
    if solved.proven:
        notes.append("No plan of the space has a smaller summed loss within the limits (proven).")
    else:
        notes.append(
            f"Not proven to be the best: the summed loss of {figures.number(solved.loss)} might be "
            f"lower by up to {figures.number(solved.gap)}."
        )
    notes.append(
        f"Predicted from {solved.learnt_from} measured candidates, with 95 % intervals; drops are "
        "those on the search split."
    )
    if solved.predicted.drop is None:
        notes.append("Too few candidates are measured to predict the drop.")
    reaching = _reaching(solved)
    if reaching:
        notes.append(f"The interval of {' and '.join(reaching)} reaches past the limit.")
    if _beaten(solved):
        notes.append("A measured candidate, below, loses no more than this plan is predicted to.")
    if solved.measured is None:
        notes.append("It was not measured: --measure builds and measures it.")
    else:
        if not solved.measured.keep(solved.limits):
            notes.append("As measured it is not within the limits: solve with a stricter one.")
        notes.append(f"model: {solved.model}")
        if not solved.measured.latency.trusted:
            notes.append(f"{_UNTRUSTED} untrusted: {solved.measured.latency.reason}")
    return notes


def _beaten(solved: Solved) -> bool:
    """Whether the run has measured a candidate that loses no more than is predicted."""
    drop = solved.predicted.drop
    losses = [c.figures.drop.value for c in solved.within if c.figures.drop is not None]
    return drop is not None and min(losses, default=np.inf) <= drop.value


def _reaching(solved: Solved) -> list[str]:
    """The predicted figures whose intervals hold values on the wrong side of a limit."""
    predicted, limits = solved.predicted, solved.limits
    upper = (
        ("the latency", predicted.latency, limits.max_latency_ms),
        ("the file's size", predicted.file_bytes, limits.max_bytes),
        ("the coded size", predicted.download_bytes, limits.max_download_bytes),
    )
    found = [
        name
        for name, figure, limit in upper
        if figure is not None and limit is not None and figure.ci_high > limit
    ]
    if limits.min_speedup is not None and predicted.speedup.ci_low < limits.min_speedup:
        found.append("the speed-up")
    return found


def _note(text: str) -> Text:
    return Text(text, style="dim", overflow="fold")


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.title = Text(title, style="bold")
    table.title_justify = "left"
    return table


def _interval(figure: Measurement | None, text: Callable[[float], str]) -> str:
    if figure is None:
        return figures.ABSENT
    if not np.isfinite([figure.ci_low, figure.ci_high]).all():
        return text(figure.value)
    return f"{text(figure.value)} [{text(figure.ci_low)}, {text(figure.ci_high)}]"


def _drop_text(drop: Measurement | None) -> Callable[[float], str]:
    """How a drop of this figure's unit is written."""
    share = drop is not None and drop.unit == POINTS
    return lambda value: figures.drop(value, share=share)


def _speedup(measured: Figures) -> str:
    speedup = measured.speedup
    text = figures.speedup(speedup.value, speedup.ci_low, speedup.ci_high)
    return text if measured.latency.trusted else text + _UNTRUSTED


def _size(figure: Measurement | None) -> str:
    if figure is None:
        return figures.ABSENT
    if figure.ci_low == figure.ci_high:
        return figures.byte_size(figure.value)
    return _interval(figure, figures.byte_size)
