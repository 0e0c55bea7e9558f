"""What `autocompress profile --network` shows: the latency table, and how well it predicts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.report import figures
from autocompress.report.device import where
from autocompress.search.network_report import Agreement, NetworkReport

_ROWS = 12
_WORST = 5


def network_parts(report: NetworkReport, *, everything: bool = False) -> list[RenderableType]:
    """A network's latency table as texts and tables of at most 100 columns, one after another.

    Args:
        report: what building the table gave.
        everything: all layers and levels, not only the slowest and the first.
    """
    count = None if everything else _ROWS
    parts: list[RenderableType] = [Text(_summary(report)), _layer_table(report, count)]
    parts.append(_plan_table(report, None if everything else _WORST))
    parts += [Text(text) for text in _sentences(report, count)]
    return parts


def _summary(report: NetworkReport) -> str:
    blocks, meetings = report.blocks, report.meetings
    return (
        f"Latency table of '{report.experiment}' in {report.runtime}, {where(report.device)}\n"
        f"{report.entries} entries in {report.cache}\n"
        f"blocks: {blocks.measured} measured now, {blocks.reused} reused; meetings of two blocks: "
        f"{meetings.measured} measured now, {meetings.reused} reused\n"
    )


def _layer_table(report: NetworkReport, count: int | None) -> Table:
    rows = report.layers[:count]
    variants = list(rows[0].latency_ms) if rows else []
    title = "Layers, ms per run"
    if len(rows) < len(report.layers):
        title += f": the slowest {len(rows)} of {len(report.layers)}"
    table = _table(title)
    table.add_column("layer", overflow="fold")
    table.add_column("channels", overflow="fold")
    for name in variants:
        table.add_column(name, justify="right")
    for row in rows:
        taken = row.latency_ms.values()
        times = [figures.ABSENT if t is None else figures.number(t) for t in taken]
        table.add_row(*map(Text, (row.layer, row.channels, *times)))
    return table


def _plan_table(report: NetworkReport, count: int | None) -> Table:
    worst = sorted(report.plans, key=lambda plan: -abs(plan.error))[:count]
    title = "Random plans, predicted against measured"
    if len(worst) < len(report.plans):
        title += f": the worst {len(worst)} of {len(report.plans)}"
    table = _table(title)
    table.add_column("plan")
    for heading in ("predicted", "measured", "error", "blocks guessed"):
        table.add_column(heading, justify="right")
    for plan in worst:
        mark = "" if plan.measured.trusted else "*"
        table.add_row(
            Text(plan.plan),
            figures.milliseconds(plan.predicted.latency_ms),
            figures.milliseconds(plan.measured.value) + mark,
            f"{plan.error:+.1%}",
            str(plan.predicted.interpolated),
        )
    return table


def _sentences(report: NetworkReport, count: int | None) -> list[str]:
    texts = [_agreement("The table", report.agreement)]
    if report.interpolated_agreement.plans:
        sparse = "With a quarter of the blocks measured and the rest guessed, it"
        texts.append(_agreement(sparse, report.interpolated_agreement))
    if any(not plan.measured.trusted for plan in report.plans):
        texts.append("* untrusted: measured on a machine that was too busy.")
    if report.misses:
        texts.append(
            "Fused entries, because the sum of single blocks misses by more than 10 %: "
            + "; ".join(
                f"{m.kind} at {m.tensor} ({m.apart_ms:.4f} ms apart, {m.together_ms:.4f} together)"
                for m in report.misses[:count]
            )
        )
    if report.slow_levels:
        slow = len(report.slow_levels)
        heading = f"{slow} levels do not pay; searches for latency leave them out"
        texts.append("\n  ".join([f"{heading}:", *report.slow_levels[:count]]))
        if count is not None and len(report.slow_levels) > count:
            texts.append(f"  ... and {len(report.slow_levels) - count} more (--json has all)")
    texts += [f"not measured: {failure}" for failure in _some(report.failures, count)]
    return texts


def _agreement(what: str, found: Agreement) -> str:
    if not found.plans:
        return f"{what} was not checked on any plan."
    return (
        f"{what} is off by {found.mean_absolute_error:.1%} on average over {found.plans} random "
        f"plans (at most {found.largest_error:.1%}); rank correlation {found.rank_correlation:.3f}."
    )


def _some(texts: Sequence[str], count: int | None) -> Sequence[str]:
    return texts[:count]


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.title = Text(title, style="bold")
    table.title_justify = "left"
    return table
