"""Where the bytes of a coded container go, as a table."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from autocompress.export.coding import CodedSizes, TensorSize
from autocompress.report.figures import byte_size

_ROWS = 8


def coded_table(sizes: CodedSizes) -> Table:
    """The largest tensors of a container, and all that is left, by bytes in the container."""
    ordered = sorted(sizes.tensors, key=lambda t: -t.coded_bytes)
    shown, others = ordered[:_ROWS], ordered[_ROWS:]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tensor", max_width=44, overflow="fold")
    table.add_column("coded by", max_width=22, overflow="fold")
    for heading in ("in the file", "coded", "times smaller"):
        table.add_column(heading, justify="right")
    for tensor in shown:
        table.add_row(*_cells(tensor))
    if others:
        together = TensorSize(
            f"{len(others)} smaller tensors",
            "",
            sum(t.file_bytes for t in others),
            sum(t.coded_bytes for t in others),
        )
        table.add_row(*_cells(together))
    rest = TensorSize("graph and directory", "", sizes.rest_file_bytes, sizes.rest_coded_bytes)
    table.add_row(*_cells(rest))
    return table


def _cells(size: TensorSize) -> tuple[Text, ...]:
    ratio = size.file_bytes / max(size.coded_bytes, 1)
    texts = (size.name, size.method, byte_size(size.file_bytes), byte_size(size.coded_bytes))
    return (*map(Text, texts), Text(f"{ratio:.1f}x"))
