"""What `autocompress profile --network` shows: how good the latency table is, and what is in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.report import figures
from autocompress.report.device import where
from autocompress.search.levels import GroupRow
from autocompress.search.network_report import Agreement, NetworkReport, PlanLatency

_WORST_PLANS, _SLOWEST_LAYERS, _WORST_MISSES, _FAILURES = 8, 12, 8, 5
_UNTRUSTED, _NO_FASTER = "*", "="
# A level that takes more of the time before is marked.
_FASTER = 0.99
_WIDTH = 100


def network_parts(report: NetworkReport) -> list[RenderableType]:
    """Everything that there is to show, in order; no part is wider than 100 columns."""
    tables = [_layers_table(report)]
    tables += [_groups_table(report)] if report.groups else []
    tables += [_misses_table(report)] if report.misses else []
    tables += [_plans_table(report.plans)] if report.plans else []
    return [_summary(report), *tables, _slow_levels(report.slow_levels)]


def _summary(report: NetworkReport) -> Text:
    table, guessed = report.agreement, report.interpolated_agreement
    blocks, meetings = report.blocks, report.meetings
    original = report.original
    lines = [
        f"Latency table of '{report.experiment}' in {report.runtime} on {where(report.device)}",
        f"  blocks of layers:     {blocks.measured} measured, {blocks.reused} reused",
        f"  meetings of blocks:   {meetings.measured} measured, {meetings.reused} reused",
        f"  original network:     predicted {figures.milliseconds(original.predicted.latency_ms)}, "
        f"measured {figures.milliseconds(original.measured.value)} ({_share(original.error)})",
        f"  random plans:         {_agreement(table)}",
        f"  from a quarter of it: {_agreement(guessed)}",
        f"  kept in:              {report.cache} ({report.entries} entries)",
    ]
    lines += [f"  not measured: {text}" for text in report.failures[:_FAILURES]]
    if len(report.failures) > _FAILURES:
        lines.append(f"  and {len(report.failures) - _FAILURES} more could not be measured")
    return Text("\n".join(lines) + "\n")


def _agreement(found: Agreement) -> str:
    if not found.plans:
        return "none was measured"
    rank = figures.ABSENT if np.isnan(found.rank_correlation) else f"{found.rank_correlation:.3f}"
    return (
        f"{found.plans}, mean absolute error {100 * found.mean_absolute_error:.1f} %, "
        f"largest {100 * found.largest_error:.1f} %, rank correlation {rank}"
    )


def _plans_table(plans: Sequence[PlanLatency]) -> Table:
    worst = sorted(plans, key=lambda plan: -abs(plan.error))[:_WORST_PLANS]
    table = _table(
        f"The {len(worst)} worst predictions",
        ["plan"],
        ["predicted", "measured", "error", "speed-up", "conversions", "blocks", "interpolated"],
    )
    for plan in worst:
        predicted = plan.predicted
        mark = "" if plan.measured.trusted else _UNTRUSTED
        _add(
            table,
            plan.plan,
            figures.milliseconds(predicted.latency_ms),
            figures.milliseconds(plan.measured.value) + mark,
            _share(plan.error),
            f"{plan.speedup:.2f}x",
            f"{_time(predicted.meetings_ms)} ms",
            str(predicted.measured + predicted.interpolated),
            str(predicted.interpolated),
        )
    if any(not plan.measured.trusted for plan in worst):
        _caption(table, f"{_UNTRUSTED} untrusted: the machine was too busy, or time ran out")
    return table


def _layers_table(report: NetworkReport) -> Table:
    rows = report.layers[:_SLOWEST_LAYERS]
    names = list(rows[0].latency_ms) if rows else []
    table = _table(
        f"The {len(rows)} slowest of {len(report.layers)} layers, unpruned, in ms",
        ["layer", "channels"],
        names,
    )
    for row in rows:
        _add(table, row.layer, row.channels, *(_time(row.latency_ms[name]) for name in names))
    return table


def _groups_table(report: NetworkReport) -> Table:
    names = list(report.groups[0].latency_ms)
    table = _table(
        "All blocks that a channel group runs through, the rest unpruned, in ms",
        ["channel group"],
        ["channels", *names],
    )
    milder: GroupRow | None = None
    for row in report.groups:
        new = milder is None or milder.group != row.group
        if milder is not None and new:
            table.add_section()
        before = None if new else milder
        times = [_level_time(row, before, name) for name in names]
        _add(table, row.group if new else "", str(row.kept), *times)
        milder = row
    _caption(table, f"{_NO_FASTER} no faster than the next milder level")
    return table


def _level_time(row: GroupRow, milder: GroupRow | None, name: str) -> str:
    value = row.latency_ms[name]
    before = None if milder is None else milder.latency_ms[name]
    slow = value is not None and before is not None and value > _FASTER * before
    return _time(value) + (_NO_FASTER if slow else " ")


def _misses_table(report: NetworkReport) -> Table:
    rows = report.misses[:_WORST_MISSES]
    table = _table(
        f"Fused entries, where the sum of two blocks misses by over 10 %, in ms: {len(rows)} of "
        f"{len(report.misses)}",
        ["blocks", "tensor"],
        ["alone", "together"],
    )
    for row in rows:
        _add(table, row.kind, row.tensor, _time(row.apart_ms), _time(row.together_ms))
    _caption(table, "runtimes convert layouts between such blocks, or fuse them; predictions know")
    return table


def _slow_levels(reasons: Sequence[str]) -> Text:
    if not reasons:
        return Text("Every level of the search space saves time.\n")
    lines = ["Levels that save no time; a search for latency leaves them out:"]
    return Text("\n".join([*lines, *(f"  {reason}" for reason in reasons)]) + "\n")


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        # A table narrower than its title would break it.
        min_width=min(len(title), _WIDTH),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in texts:
        table.add_column(Text(heading), overflow="fold", max_width=_WIDTH // 2)
    for heading in numbers:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    # Names are never read as markup.
    table.add_row(*(Text(cell) for cell in cells))


def _caption(table: Table, text: str) -> None:
    table.caption = Text(text, style="dim")
    table.caption_justify = "left"


def _time(value: float | None) -> str:
    return figures.ABSENT if value is None else f"{value:.4f}"


def _share(value: float) -> str:
    return f"{100 * value:+.1f} %"
