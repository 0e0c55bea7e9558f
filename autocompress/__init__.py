"""autocompress: the measured Pareto front of compressed networks for your device.

>>> import autocompress
>>> front = autocompress.search("experiments/digits.yaml", trials=40)  # doctest: +SKIP
>>> front.table()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autocompress import search as search
    from autocompress.export.coding import load_coded as load_coded
    from autocompress.search.front import Front as Front
    from autocompress.workload import Split as Split
    from autocompress.workload import Workload as Workload
    from autocompress.workload import load_network as load_network

__version__ = "0.1.0"

# Imported on first use: the measuring processes must not load PyTorch.
_LAZY = {
    "Front": "autocompress.search.front",
    "Split": "autocompress.workload",
    "Workload": "autocompress.workload",
    "load_coded": "autocompress.export.coding",
    "load_network": "autocompress.workload",
}

__all__ = ["Front", "Split", "Workload", "load_coded", "load_network", "search"]


def __getattr__(name: str) -> object:
    if name == "search":
        return import_module("autocompress.search")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'autocompress' has no attribute '{name}'")
