"""PyTorch's table of ONNX functions, made once a process: making it is half of an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

_MODULE = "torch.onnx._internal.exporter._registration"
_CLASS, _MAKER = "ONNXRegistry", "from_torchlib"


@contextmanager
def kept_function_table() -> Iterator[None]:
    """Let `torch.onnx.export` take the table that an earlier export made.

    Not for exports with a `custom_translation_table`, which is written into it. The table is
    private to PyTorch: versions that keep it elsewhere make it each time, as they do without this.
    """
    found = _class_and_maker()
    if found is None:
        yield
        return
    table, maker = found
    setattr(table, _MAKER, staticmethod(_kept_table))
    try:
        yield
    finally:
        setattr(table, _MAKER, maker)


@cache
def _class_and_maker() -> tuple[type, Any] | None:
    try:
        table = vars(import_module(_MODULE)).get(_CLASS)
    except ImportError:
        return None
    if not isinstance(table, type):
        return None
    maker = vars(table).get(_MAKER)
    return (table, maker) if isinstance(maker, classmethod) else None


@cache
def _kept_table(*arguments: object, **options: object) -> object:
    found = _class_and_maker()
    assert found is not None
    table, maker = found
    return maker.__func__(table, *arguments, **options)
