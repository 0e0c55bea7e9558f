"""What `autocompress explain` shows: the verdict, where the time goes, the layers, the causes."""

from __future__ import annotations

from typing import Final

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autocompress.measure.explain.breakdown import LayerTime
from autocompress.measure.explain.changes import Change
from autocompress.measure.explain.explanation import Explanation, spent_on
from autocompress.report import figures

_WIDTH: Final = 100
_MOST_LAYERS: Final = 40
# Profiles count microseconds; ratios of less say nothing.
_SHORTEST_MS: Final = 0.001
# Shares of the run under which a slower layer is not marked.
_TELLING: Final = 0.005
_SHORT: Final = {
    "integers": "int8", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "": "?",
}  # fmt: skip


def explanation_parts(
    explanation: Explanation, *, width: int = _WIDTH, everything: bool = False
) -> list[RenderableType]:
    """An explanation as texts and tables, to be printed one after another.

    Args:
        width: the most columns that they take.
        everything: show all layers, not only those that take most of the time.
    """
    parts: list[RenderableType] = [Text(explanation.verdict), Text(""), time_table(explanation)]
    parts.append(layer_table(explanation, width=width, everything=everything))
    if explanation.findings:
        parts.append(Text("What costs time, the largest part first", style="bold"))
    for number, finding in enumerate(explanation.findings, 1):
        body = Text(finding.seen)
        body.append(f"\nWhy: {finding.why}", style="dim")
        body.append(f"\nChange: {_sentence(finding.advice)}")
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(Text(f"{number}."), body)
        parts.append(Padding(grid, (0, 0, 1, 0)))
    parts += [Text(f"Note: {note}", style="dim") for note in explanation.notes]
    return parts


def time_table(explanation: Explanation) -> Table:
    """Where both models' time goes."""
    table = _table("Where the time goes, ms per run")
    for heading in ("", "original", "candidate"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    before, after = spent_on(explanation.baseline), spent_on(explanation.after)
    for name in before:
        if before[name] or after[name]:
            table.add_row(name, _ms(before[name]), _ms(after[name]))
    table.add_section()
    table.add_row(
        f"measured, in {explanation.runtime}",
        _ms(explanation.baseline.latency_ms),
        _ms(explanation.after.latency_ms),
        style="bold",
    )
    nodes = (explanation.baseline.node_count, explanation.after.node_count)
    table.add_row("nodes that ran", *map(str, nodes))
    return table


def layer_table(
    explanation: Explanation, *, width: int = _WIDTH, everything: bool = False
) -> Table:
    """Each layer before and after, in the network's order."""
    changes = _shown(explanation.changes, everything=everything)
    table = _table("Layers, ms per run")
    table.add_column("layer", no_wrap=False, overflow="fold", ratio=3)
    table.add_column("what it is now", no_wrap=False, overflow="fold", ratio=4)
    for heading in ("original", "candidate", "faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ran in", no_wrap=True)
    table.width = width
    least = _TELLING * explanation.after.latency_ms
    for change in changes:
        slower = change.before is not None and change.gain_ms < -least
        table.add_row(
            Text(change.name),
            Text(_what(change)),
            _ms(change.before_ms) if change.before else figures.ABSENT,
            _ms(change.after_ms) if change.after else "gone",
            _ratio(change),
            Text(_ran_in(change)),
            style="red" if slower else "",
        )
    left = len(explanation.changes) - len(changes)
    if left:
        rest = [c for c in explanation.changes if c not in changes]
        table.caption = Text(
            f"{left} more layers: {_ms(sum(c.before_ms for c in rest))} ms before, "
            f"{_ms(sum(c.after_ms for c in rest))} ms now",
            style="dim",
        )
        table.caption_justify = "left"
    return table


def _shown(changes: tuple[Change, ...], *, everything: bool) -> tuple[Change, ...]:
    """Those that take most of the time in either model, in their order."""
    if everything or len(changes) <= _MOST_LAYERS:
        return changes
    ranked = sorted(changes, key=lambda c: -max(c.before_ms, c.after_ms))[:_MOST_LAYERS]
    return tuple(change for change in changes if change in ranked)


def _what(change: Change) -> str:
    """The layer's shape, after an arrow where it has changed."""
    before = change.before.layer.label if change.before else ""
    after = " + ".join(time.layer.label for time in change.after)
    # Quantizers rename operators; only sizes tell that a layer has changed.
    if not after or before.partition(" ")[2] == after.partition(" ")[2]:
        return before or after
    return after


def _ran_in(change: Change) -> str:
    """Precisions before and after, and what the file had asked for where that is another."""
    before = _SHORT.get(change.before.precision, "?") if change.before else ""
    after = "+".join(dict.fromkeys(_now(time) for time in change.after))
    wanted = any(t.layer.quantized and t.precision not in ("integers", "") for t in change.after)
    text = after if before in ("", after) or not after else f"{before} > {after}"
    return f"{text} (not int8)" if wanted else text or before


def _now(time: LayerTime) -> str:
    # Blocks of 4-bit weights are multiplied by inputs of 8 bits.
    return "int4" if time.layer.scheme == "blocks" else _SHORT.get(time.precision, time.precision)


def _ratio(change: Change) -> str:
    if min(change.before_ms, change.after_ms) < _SHORTEST_MS:
        return figures.ABSENT
    return f"{change.before_ms / change.after_ms:.2f}x"


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
