"""The sizes at which a file's open axes are measured, noted in the ONNX file itself."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

_PREFIX = "autocompress.size."


def note_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Note usual sizes of open axes, by the names of the axes, in place."""
    for name, size in sizes.items():
        model.metadata_props.add(key=f"{_PREFIX}{name}", value=str(size))


def noted_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """The sizes that are noted, by the names of the axes; what is no number is left out."""
    return {
        entry.key.removeprefix(_PREFIX): int(entry.value)
        for entry in model.metadata_props
        if entry.key.startswith(_PREFIX) and entry.value.isdigit()
    }
