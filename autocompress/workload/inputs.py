"""What a network is given: tensors by position or by name, and which of their axes are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias, final

import torch
from torch import Tensor

from autocompress.errors import WorkloadError

Axes: TypeAlias = Mapping[int, str]

BATCH_AXIS = "batch"
_SMALLEST = 2


@final
@dataclass(frozen=True)
class Batch:
    """Inputs with the samples in dimension 0.

    Attributes:
        names: one per tensor where they were given by name, else none at all.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]


def as_batch(given: object, names: tuple[str, ...], what: str) -> Batch:
    """Inputs as a tuple of tensors.

    Args:
        given: a tensor, a tuple of them, or a mapping from names to tensors.
        names: those of the tensors where `given` is no mapping; may be none.
        what: begins an error's sentence.

    Raises:
        WorkloadError: there is no tensor, their lengths differ, or names do not fit.
    """
    tensors = (given,) if isinstance(given, Tensor) else given
    if isinstance(given, Mapping):
        names, tensors = tuple(given), tuple(given.values())
    if (
        not isinstance(tensors, (tuple, list))
        or not tensors
        or not all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors)
        or len({len(t) for t in tensors}) > 1
    ):
        raise WorkloadError(
            f"{what} must be tensors that have the same number of samples.",
            given=describe(given),
            allowed="a torch.Tensor, a tuple of them, or a mapping from the network's parameter "
            "names to them, with the samples in dimension 0",
        )
    if names and (len(names) != len(tensors) or not all(map(_is_name, names))):
        raise WorkloadError(
            f"The names of {what[:1].lower() + what[1:]} do not fit.",
            given=f"{len(tensors)} tensors, names {', '.join(map(str, names))}",
            allowed="a name of the forward function's parameters for each tensor",
        )
    return Batch(tuple(tensors), names)


def ordered(batch: Batch, names: tuple[str, ...], what: str) -> tuple[Tensor, ...]:
    """A batch's tensors in the order of some names; without names of its own they stay.

    Raises:
        WorkloadError: it has other names.
    """
    if not batch.names or batch.names == names:
        return batch.tensors
    if set(batch.names) != set(names):
        raise WorkloadError(
            f"{what} have other names than example_inputs.",
            given=", ".join(batch.names),
            allowed=", ".join(names) or "no names, as example_inputs have none",
            advice="give a mapping with the same names everywhere",
        )
    found = dict(zip(batch.names, batch.tensors, strict=True))
    return tuple(found[name] for name in names)


def as_axes(given: object, batch: Batch) -> tuple[Axes, ...]:
    """The open axes of every input, in the order of the inputs; none at all where no axis is open.

    Args:
        given: per input a mapping from axis to name: a tuple, or a mapping by input name.
        batch: the example inputs.

    Raises:
        WorkloadError: an axis is not there, is the batch, is too small or has no name of its own,
            or axes of one name have different sizes.
    """
    by_input: object = given
    if isinstance(given, Mapping) and set(given) <= set(batch.names):
        by_input = tuple(given.get(name, {}) for name in batch.names)
    if (
        not isinstance(by_input, (tuple, list))
        or len(by_input) not in (0, len(batch.tensors))
        or not all(isinstance(axes, Mapping) for axes in by_input)
    ):
        raise WorkloadError(
            "The dynamic_axes do not fit the inputs.",
            given=given,
            allowed=f"a tuple of {len(batch.tensors)} mappings from axis to name, or one mapping "
            f"by input name ({', '.join(batch.names) or 'the inputs have none'})",
            advice='for example ({1: "length"}, {1: "length"})',
        )
    sizes: dict[str, int] = {}
    for tensor, axes in zip(batch.tensors, by_input, strict=False):
        for axis, name in axes.items():
            _check_axis(tensor, axis, name)
            size = tensor.shape[axis]
            if sizes.setdefault(name, size) != size:
                raise WorkloadError(
                    f"Axes called '{name}' have different sizes in example_inputs.",
                    given=f"{sizes[name]} and {size}",
                    allowed="equal sizes for equal names",
                    advice="give axes that vary on their own names of their own",
                )
    found = tuple(dict(axes) for axes in by_input)
    return found if any(found) else ()


def axis_sizes(tensors: Sequence[Tensor], axes: Sequence[Axes]) -> dict[str, int]:
    """The size of every open axis by its name."""
    return {
        name: tensor.shape[axis]
        for tensor, named in zip(tensors, axes, strict=False)
        for axis, name in named.items()
    }


def resized(
    tensors: tuple[Tensor, ...], axes: Sequence[Axes], factor: Fraction
) -> tuple[Tensor, ...] | None:
    """Inputs whose open axes are so many times as long, cut or repeated; None if none changes."""
    found: list[Tensor] = []
    for tensor, named in zip(tensors, axes, strict=True):
        for axis in named:
            size = max(_SMALLEST, int(tensor.shape[axis] * factor))
            index = torch.arange(size) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
        found.append(tensor)
    same = all(a.shape == b.shape for a, b in zip(found, tensors, strict=True))
    return None if same else tuple(found)


def describe(value: object) -> str:
    """The type, data type and shape of what was given, for an error's text."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of [" + ", ".join(describe(v) for v in value) + "]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}: {describe(v)}" for key, v in value.items())
        return f"{type(value).__name__} of [{inner}]"
    return type(value).__name__


def _check_axis(tensor: Tensor, axis: object, name: object) -> None:
    last = tensor.ndim - 1
    if not isinstance(axis, int) or not 1 <= axis <= last:
        raise WorkloadError(
            "The dynamic_axes name an axis that cannot be opened.",
            given=f"axis {axis} of an input of shape {tuple(tensor.shape)}",
            allowed=f"1 to {last}" if last else "none",
            advice="leave axis 0 out: the batch is always open",
        )
    if not _is_name(name) or name == BATCH_AXIS:
        raise WorkloadError(
            "The dynamic_axes hold a name that no axis can have.",
            given=repr(name),
            allowed=f"a Python identifier other than '{BATCH_AXIS}', which is axis 0",
        )
    if tensor.shape[axis] < _SMALLEST:
        raise WorkloadError(
            "The example_inputs are too small along an open axis: a size of 1 means broadcasting.",
            given=f"axis {axis} ('{name}') of shape {tuple(tensor.shape)}",
            allowed=f"at least {_SMALLEST}",
            advice="give example_inputs and splits of a usual size",
        )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()
