"""`Node`: one operator of an ONNX graph as it is compiled for inputs of known shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from autocompress.errors import MeasurementError

# Takes a tensor per input of the node, None for one left out; one tensor per output.
Run = Callable[..., Tensor | tuple[Tensor, ...]]


@final
@dataclass(frozen=True)
class Target:
    """Where a graph runs, and the type of its floating-point values."""

    device: torch.device
    dtype: torch.dtype


@final
@dataclass(frozen=True, eq=False)
class Node:
    """An operator, its attributes and an example of each of its inputs.

    Attributes:
        opset: version of the operator set that gives the operator its meaning.
        attributes: values as `onnx.helper.get_attribute_value` gives them.
        inputs: of the shapes for which the graph is compiled; None for one left out.
        constant: whether each input's values are the same at every run.
        outputs: how many outputs are used.
    """

    name: str
    operator: str
    opset: int
    attributes: Mapping[str, Any]
    inputs: tuple[Tensor | None, ...]
    constant: tuple[bool, ...]
    outputs: int
    target: Target

    def has(self, index: int) -> bool:
        """Whether an input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def example(self, index: int) -> Tensor:
        """An input of the shape and type that the node is compiled for."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise self.refused(f"input {index} is missing")
        return value

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(self.example(index).shape)

    def axis(self, default: int, index: int = 0) -> int:
        """The attribute `axis`, counted from the front."""
        axis, rank = int(self.attributes.get("axis", default)), len(self.shape(index))
        return axis + rank if axis < 0 else axis

    def value(self, name: str, default: Any) -> Any:
        """An attribute; texts as `str`."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def constant_ints(self, index: int) -> tuple[int, ...]:
        """The numbers of an input that decides about shapes.

        Raises:
            MeasurementError: they depend on the data.
        """
        value = self.example(index)
        if not self.constant[index]:
            raise self.refused(f"input {index} depends on the data, and shapes depend on it")
        return tuple(int(number) for number in value.reshape(-1).tolist())

    def ints(self, name: str, index: int) -> tuple[int, ...] | None:
        """Numbers given by an input or, in older operator sets, by an attribute."""
        if self.has(index):
            return self.constant_ints(index)
        value = self.attributes.get(name)
        return None if value is None else tuple(int(number) for number in value)

    def refused(self, why: str) -> MeasurementError:
        """The error that says why this node cannot run."""
        return MeasurementError(
            f"PyTorch cannot run a node of the ONNX file: {why}.",
            given=f"{self.operator} {self.name}",
            advice="leave the runtime pytorch out of the device profile for this network",
        )
