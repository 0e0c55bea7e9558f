"""What `autocompress inspect` shows: modules, groups and blocks, what they can take or why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.report import figures
from autocompress.search.inspection import BlockRow, GroupRow, Inspection, ModuleRow

_NAME_WIDTH: Final = 34
_LEFT_ALONE: Final = "dim"


def inspection_parts(inspection: Inspection, width: int = 100) -> tuple[RenderableType, ...]:
    """Tables of at most `width` columns, and what else there is to say."""
    title = (
        f"{100 * inspection.weight_share:.1f} % of the weights are in modules that the search space"
        " can compress"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), _module_table(inspection, width)]
    if inspection.groups:
        heading = Text("\nChannel groups: channels that can only be removed together", style="bold")
        parts += [heading, _group_table(inspection.groups, width)]
    if inspection.blocks:
        heading = Text("\nBlocks that the network can do without", style="bold")
        parts += [heading, _block_table(inspection.blocks, width)]
    lines = []
    if inspection.network_techniques:
        lines.append(f"the network as a whole: {', '.join(inspection.network_techniques)}")
    if inspection.unused:
        lines.append(f"values that nothing takes: {'; '.join(inspection.unused)}")
    lines += [f"note: {note}" for note in inspection.notes]
    if lines:
        parts.append(Group(Text(), *map(Text, lines)))
    return tuple(parts)


def _module_table(inspection: Inspection, width: int) -> Table:
    table = _table(width)
    table.add_column("module", overflow="fold", max_width=_NAME_WIDTH)
    table.add_column("kind", overflow="fold", max_width=14)
    table.add_column("shape", overflow="fold", max_width=13)
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    table.add_column("techniques, or why it is left alone", ratio=1)
    for row in inspection.modules:
        table.add_row(
            Text(row.name or "(the network itself)"),
            Text(row.kind),
            Text("x".join(map(str, row.shape))),
            _share(row.weight_share),
            figures.ABSENT if row.macs_share is None else _share(row.macs_share),
            _verdict(row),
            style="" if row.techniques else _LEFT_ALONE,
        )
    return table


def _group_table(groups: Sequence[GroupRow], width: int) -> Table:
    table = _table(width)
    table.add_column("group", overflow="fold", max_width=_NAME_WIDTH + 8)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("techniques, or why it is left alone", ratio=1)
    for row in groups:
        size = f"{row.size} heads" if row.heads else str(row.size)
        style = "" if row.techniques else _LEFT_ALONE
        table.add_row(Text(row.name), size, _verdict(row), style=style)
    return table


def _block_table(blocks: Sequence[BlockRow], width: int) -> Table:
    table = _table(width)
    table.add_column("block", overflow="fold", max_width=_NAME_WIDTH + 8)
    for heading in ("layers", "weights", "MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("techniques, or why it is left alone", ratio=1)
    for row in blocks:
        style = "" if row.techniques else _LEFT_ALONE
        shares = (_share(row.weight_share), _share(row.macs_share))
        table.add_row(Text(row.name), str(row.layers), *shares, _verdict(row), style=style)
    return table


def _table(width: int) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), width=width
    )


def _verdict(row: ModuleRow | GroupRow | BlockRow) -> Text:
    return Text("; ".join(filter(None, (", ".join(row.techniques), row.reason))))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
