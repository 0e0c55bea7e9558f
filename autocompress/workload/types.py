"""A workload and its splits: what the user brings, as frozen types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from autocompress.errors import WorkloadError
from autocompress.workload.exported import raise_layers
from autocompress.workload.inputs import Axes, Batch, as_axes, as_batch, describe, ordered
from autocompress.workload.network import as_positional
from autocompress.workload.padding import NO_PADDING, Padding
from autocompress.workload.pretrained import load_network

Array: TypeAlias = npt.NDArray[Any]
Metric: TypeAlias = Literal["accuracy", "agreement"] | Callable[[Any, Any], float]


@final
@dataclass(frozen=True, eq=False)
class Split:
    """Samples with their targets; dimension 0 of every tensor counts the samples.

    Args:
        inputs: one tensor per network input, each of shape (n, ...); a single tensor will do, and
            so will a mapping from the network's parameter names to tensors.
        targets: shape (n, ...), or None where the metric needs none.
        input_names: of the inputs, in order; taken from a mapping.

    Raises:
        WorkloadError: no tensor, or tensors of different lengths.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None
    input_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        batch = as_batch(self.inputs, self.input_names, "A split's inputs")
        object.__setattr__(self, "inputs", batch.tensors)
        object.__setattr__(self, "input_names", batch.names)
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
        return Split(tuple(tensor[index] for tensor in self.inputs), targets, self.input_names)

    def ordered(self, names: tuple[str, ...], what: str) -> Split:
        """The split with its inputs in the order of some names; without names they stay.

        Raises:
            WorkloadError: it has other names; `what` begins the sentence.
        """
        inputs = ordered(Batch(self.inputs, self.input_names), names, what)
        return Split(inputs, self.targets, names)

    def numpy_inputs(self) -> tuple[Array, ...]:
        """The inputs as numpy arrays, sharing memory where they can."""
        return tuple(tensor.detach().cpu().numpy() for tensor in self.inputs)


@final
@dataclass(frozen=True, eq=False)
class Workload:
    """A trained network and all that is needed to compress and judge it.

    Args:
        network: trained, in eval mode; its outputs have the batch in dimension 0 and are tensors,
            or tuples, lists and mappings of them, which are taken in order, None left out. Or a
            `torch.export.ExportedProgram` with a free batch, whose layers become modules again; or
            a name that `load_network` takes.
        example_inputs: a batch of one or more per network input; a single tensor will do. A
            mapping from parameter names to tensors is for networks that are called by keyword:
            then splits may be mappings too, and exported files name their inputs so.
        calibration: for statistics and ranges; needs no targets.
        train: for recovery; None leaves recovery out.
        search_split: judges candidates during the search.
        test_split: judges the final front only; the search never reads it.
        metric: higher is better. `accuracy`: share of samples whose argmax over axis 1 of the
            first output equals the integer target; `agreement`: the same against the original
            network's argmax; or a function of the outputs (one array, or a tuple of arrays where
            the network has several outputs) and the targets (an array or None).
        dynamic_axes: per input, in order or by input name, the axes besides the batch that stay
            open in the exported files, by axis their names: `({1: "length"}, {1: "length"})`.
            Equal names are equal sizes. Figures are taken at the sizes of the inputs given.
        input_names: the keywords that the network is called with; taken from a mapping.
        padding: what statistics and trainings leave out; found by a search, see `find_padding`.

    Raises:
        WorkloadError: `example_inputs` are no batch of tensors, splits have other names, or the
            `dynamic_axes` do not fit.
    """

    network: nn.Module
    example_inputs: tuple[Tensor, ...]
    calibration: Split
    train: Split | None
    search_split: Split
    test_split: Split
    metric: Metric = "accuracy"
    dynamic_axes: tuple[Axes, ...] = ()
    input_names: tuple[str, ...] = ()
    padding: Padding = NO_PADDING

    @property
    def class_scores(self) -> bool:
        """Whether the first output holds a score for every class: a user's metric may take any."""
        return not callable(self.metric)

    def __post_init__(self) -> None:
        batch = as_batch(self.example_inputs, self.input_names, "A workload's example_inputs")
        if len(batch.tensors[0]) == 0:
            raise WorkloadError(
                "A workload's example_inputs hold no sample.",
                given=describe(batch.tensors),
                allowed="a batch of at least one in dimension 0",
            )
        changes: dict[str, object] = {
            "example_inputs": batch.tensors,
            "input_names": batch.names,
            "dynamic_axes": as_axes(self.dynamic_axes, batch),
        }
        for name, split in self.splits().items():
            changes[name] = split.ordered(batch.names, f"The inputs of split '{name}'")
        network: object = self.network
        if isinstance(network, str):
            network = load_network(network)
        if isinstance(network, ExportedProgram):
            network = raise_layers(network, batch.tensors, batch.names)
        if isinstance(network, nn.Module):
            changes["network"] = as_positional(network, batch.names, batch.tensors)
        for name, value in changes.items():
            object.__setattr__(self, name, value)

    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        named = {
            "calibration": self.calibration,
            "train": self.train,
            "search_split": self.search_split,
            "test_split": self.test_split,
        }
        return {name: split for name, split in named.items() if split is not None}
