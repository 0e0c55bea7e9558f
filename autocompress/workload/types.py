"""A workload and its splits: what the user brings, as frozen types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocompress.errors import WorkloadError

Array: TypeAlias = npt.NDArray[Any]
Metric: TypeAlias = Literal["accuracy", "agreement"] | Callable[[Any, Any], float]


@final
@dataclass(frozen=True, eq=False)
class Split:
    """Samples with their targets; dimension 0 of every tensor counts the samples.

    Args:
        inputs: one tensor per network input, each of shape (n, ...); a single tensor will do.
        targets: shape (n, ...), or None where the metric needs none.

    Raises:
        WorkloadError: no tensor, or tensors of different lengths.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", _as_batch(self.inputs, "A split's inputs"))
        if self.targets is None:
            return
        if not isinstance(self.targets, Tensor) or self.targets.ndim == 0:
            raise WorkloadError(
                "A split's targets must be a tensor with one entry per sample.",
                given=describe(self.targets),
                allowed="a torch.Tensor of shape (n, ...), or None",
            )
        if len(self.targets) != len(self):
            raise WorkloadError(
                "A split has not one target per sample.",
                given=f"{len(self)} samples, {len(self.targets)} targets",
                allowed="as many targets as samples",
            )

    def __len__(self) -> int:
        return len(self.inputs[0])

    def subset(self, which: int | Sequence[int] | Tensor) -> Split:
        """The samples with the given indices, or for a number n: n evenly spaced ones (or all)."""
        if isinstance(which, int):
            count = min(which, len(self))
            index = torch.arange(count) * len(self) // max(count, 1)
        else:
            index = torch.as_tensor(which, dtype=torch.long)
        targets = None if self.targets is None else self.targets[index]
        return Split(tuple(tensor[index] for tensor in self.inputs), targets)

    def numpy_inputs(self) -> tuple[Array, ...]:
        """The inputs as numpy arrays, sharing memory where they can."""
        return tuple(tensor.detach().cpu().numpy() for tensor in self.inputs)


@final
@dataclass(frozen=True, eq=False)
class Workload:
    """A trained network and all that is needed to compress and judge it.

    Args:
        network: trained, in eval mode; its outputs have the batch in dimension 0.
        example_inputs: a batch of one or more per network input; a single tensor will do.
        calibration: for statistics and ranges; needs no targets.
        train: for recovery; None leaves recovery out.
        search_split: judges candidates during the search.
        test_split: judges the final front only; the search never reads it.
        metric: higher is better. `accuracy`: share of samples whose argmax over axis 1 of the
            first output equals the integer target; `agreement`: the same against the original
            network's argmax; or a function of the outputs (one array, or a tuple of arrays where
            the network has several outputs) and the targets (an array or None).

    Raises:
        WorkloadError: `example_inputs` are no batch of tensors.
    """

    network: nn.Module
    example_inputs: tuple[Tensor, ...]
    calibration: Split
    train: Split | None
    search_split: Split
    test_split: Split
    metric: Metric = "accuracy"

    def __post_init__(self) -> None:
        batch = _as_batch(self.example_inputs, "A workload's example_inputs")
        if len(batch[0]) == 0:
            raise WorkloadError(
                "A workload's example_inputs hold no sample.",
                given=describe(batch),
                allowed="a batch of at least one in dimension 0",
            )
        object.__setattr__(self, "example_inputs", batch)

    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        named = {
            "calibration": self.calibration,
            "train": self.train,
            "search_split": self.search_split,
            "test_split": self.test_split,
        }
        return {name: split for name, split in named.items() if split is not None}


def describe(value: object) -> str:
    """The type, data type and shape of what was given, for an error's text."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of [" + ", ".join(describe(v) for v in value) + "]"
    return type(value).__name__


def _as_batch(tensors: object, what: str) -> tuple[Tensor, ...]:
    batch = (tensors,) if isinstance(tensors, Tensor) else tensors
    if (
        not isinstance(batch, (tuple, list))
        or not batch
        or not all(isinstance(t, Tensor) and t.ndim > 0 for t in batch)
        or len({len(t) for t in batch}) > 1
    ):
        raise WorkloadError(
            f"{what} must be tensors that have the same number of samples.",
            given=describe(tensors),
            allowed="a torch.Tensor, or a tuple of them, with the samples in dimension 0",
        )
    return tuple(batch)
