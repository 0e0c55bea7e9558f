"""What a training must remember to go on after a kill with bit-identical results."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from autocompress.errors import RunFolderError
from autocompress.files import write_whole

Tensors = dict[str, Tensor]
# Counted up whenever the loop changes, so that no training goes on with what an older one began.
_VERSION = 3


@final
@dataclass
class TrainingState:
    """Where a training stands; together with the weights all that its future depends on.

    Attributes:
        step: optimizer steps done.
        loss_sum: of the steps of the epoch that is under way.
        held_out_losses: before the training and after every epoch; empty without held-out samples.
        best: tensors of the epoch with the least held-out loss; None without held-out samples.
        optimizer: its `state_dict`; None until it is saved, and after the end.
    """

    bf16: bool
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    best: Tensors | None = None
    optimizer: dict[str, Any] | None = None
    stopped_early: bool = False
    finished: bool = False


def tensors_of(*modules: nn.Module) -> Tensors:
    """Every parameter and buffer, also those that a `state_dict` leaves out; not copied."""
    return {
        f"{position}|{name}": tensor.detach()
        for position, module in enumerate(modules)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def copy_of(tensors: Tensors) -> Tensors:
    """Copies, with the same strides."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def restore(tensors: Tensors, *modules: nn.Module) -> None:
    """Write the values back into modules of the structure that they came from.

    Raises:
        RunFolderError: the modules have other tensors.
    """
    current = tensors_of(*modules)
    shapes = {name: tensor.shape for name, tensor in current.items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise RunFolderError(
            "A training's checkpoint belongs to another network.",
            given=f"{len(tensors)} tensors",
            allowed=f"the {len(current)} tensors of the network and its loss",
            advice="give another `identity` or folder to a training of another network",
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(tensors[name])


@final
class CheckpointFile:
    """The checkpoint of one training in a folder; other trainings have other files.

    Args:
        folder: made if there is none; None keeps nothing.
        identity: texts that tell one training from another.
    """

    def __init__(self, folder: Path | None, *identity: str) -> None:
        text = repr((_VERSION, torch.__version__, *identity))
        name = f"training-{hashlib.sha256(text.encode()).hexdigest()[:20]}.pt"
        self._path = None if folder is None else folder / name

    def save(self, state: TrainingState, tensors: Tensors) -> None:
        """Write whole or not at all."""
        if self._path is None:
            return
        # A clone holds only its own numbers; a view would drag its whole storage along.
        content = {f.name: getattr(state, f.name) for f in fields(state)}
        buffer = io.BytesIO()
        torch.save({"state": content, "tensors": copy_of(tensors)}, buffer)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, buffer.getvalue())

    def load(self) -> tuple[TrainingState, Tensors] | None:
        """What was saved last; None if there is nothing, or a damaged file, which is done again."""
        if self._path is None or not self._path.exists():
            return None
        try:
            content = torch.load(self._path, weights_only=True, map_location="cpu")
            return TrainingState(**content["state"]), content["tensors"]
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError):
            return None
