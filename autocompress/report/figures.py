"""Figures as short texts with units; every text here is at most 18 characters long."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from autocompress.evaluation import SHARE

ABSENT: Final = "-"
_SIZES: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def number(value: float) -> str:
    """Three significant digits, at most seven characters (`0.0123`, `12.3`, `12345`, `-2e+308`)."""
    if not np.isfinite(value):
        return ABSENT
    # Rounded first: 9.999 has one decimal, not two.
    size = abs(float(f"{value:.3g}"))
    if size == 0:
        return "0"
    if not 0.001 <= size < 99999.5:
        return f"{value:.0e}"
    if size >= 999.5:
        return f"{value:.0f}"
    digits = 2 - int(np.floor(np.log10(size)))
    return f"{value:.{min(max(digits, 0), 4)}f}"


def milliseconds(value: float) -> str:
    """A latency (`0.832 ms`)."""
    return _with_unit(value, " ms")


def millijoules(value: float) -> str:
    """An energy (`0.832 mJ`)."""
    return _with_unit(value, " mJ")


def points(value: float, *, signed: bool = False) -> str:
    """A difference in percentage points, two decimals as long as they fit (`0.28`, `+0.28`)."""
    if not np.isfinite(value):
        return ABSENT
    if abs(value) >= 1000:
        return number(value)
    return f"{value + 0.0:{'+' if signed else ''}.2f}"


def byte_size(value: float) -> str:
    """A number of bytes in decimal units (`412 B`, `98.2 kB`, `1.21 MB`)."""
    for unit, name in _SIZES:
        if abs(value) >= unit:
            return _with_unit(value / unit, f" {name}")
    return f"{value:.0f} B" if np.isfinite(value) else ABSENT


def speedup(value: float, low: float, high: float) -> str:
    """A speed-up with its interval (`2.71x [2.68, 2.74]`); the interval only where it is known."""
    if not np.isfinite(value):
        return ABSENT
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{_ratio(value)}x"
    return f"{_ratio(value)}x [{_ratio(low)}, {_ratio(high)}]"


def _ratio(value: float) -> str:
    """At most four characters, so that a speed-up with its interval is at most 18."""
    if 0.005 <= value < 9.995:
        return f"{value:.2f}"
    if 9.995 <= value < 99.95:
        return f"{value:.1f}"
    if 99.95 <= value < 9999.5:
        return f"{value:.0f}"
    return "0" if value < 0.005 else ">1e4"


def metric(value: float, *, share: bool) -> str:
    """A metric: a share as per cent (`92.41 %`), anything else by four significant digits."""
    if not np.isfinite(value):
        return ABSENT
    if share and 0 <= value <= 1:
        return f"{100 * value:.2f} %"
    text = f"{value:.4g}"
    return text if 0.001 <= abs(value) < 9999.5 and len(text) <= 8 else number(value)


def drop(value: float, *, share: bool) -> str:
    """A drop of the metric: of a share in points (`0.28`), else in the metric's unit (`0.0031`)."""
    return points(value) if share else number(value)


def is_share(front: pd.DataFrame) -> bool:
    """Whether the metric of a front (`columns.typed_front`) is per cent: accuracy or agreement."""
    return bool((front["metric_unit"] == SHARE).all())


def _with_unit(value: float, unit: str) -> str:
    return number(value) + unit if np.isfinite(value) else ABSENT
