"""The network before its compression as a teacher, and its outputs, which are computed once."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Literal, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autocompress.bank.store import make_key, network_hash, tensors_hash
from autocompress.errors import WorkloadError
from autocompress.files import write_whole
from autocompress.graph.layers import flatten_outputs
from autocompress.recover.autocast import takes_bf16
from autocompress.recover.layout import channels_last, takes_channels_last
from autocompress.recover.schedule import epoch_batches, split_off
from autocompress.recover.training_types import Batch, Inputs
from autocompress.workload import NO_PADDING, Padding

_CACHE_BYTES = 1 << 28
_BATCH = 128
_PART = 32
_KEEP_EVERY_S = 60.0
# Counted up whenever the outputs change, so that no run goes on with older ones.
_VERSION = 1


@final
class Teacher:
    """The original network, run in evaluation mode without gradients.

    Args:
        network: in evaluation mode, on the student's device; not changed.
        shared: its outputs on the split that the batches are of; None keeps nothing.

    Raises:
        WorkloadError: the network is in training mode.
    """

    def __init__(self, network: nn.Module, shared: TeacherOutputs | None = None) -> None:
        if any(module.training for module in network.modules()):
            raise WorkloadError(
                "A teacher is in training mode.",
                allowed="a network whose modules are all in eval mode",
                advice="call eval() on the original network",
            )
        self.network = network
        self._shared = shared

    def outputs(self, batch: Batch) -> list[Tensor]:
        """Outputs of a batch as a flat list, without gradients."""
        if self._shared is not None and batch.samples is not None:
            found = self._shared.of(batch.samples)
            if found is not None:
                return found
        return self.run(batch.inputs)

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Outputs of some inputs as a flat list, without gradients; nothing is remembered."""
        with torch.no_grad():
            return flatten_outputs(self.network(*inputs))


def chunks_in_order_of_use(samples: int, holdout: int, seed: int) -> tuple[Tensor, ...]:
    """All samples of a split in chunks: those held out, then a training's first batches.

    So a training of part of an epoch needs no other chunk than those that it has batches of.

    Args:
        samples: of the whole split.
        holdout: how many of them only judge.
        seed: of the trainings.
    """
    trained, held_out = split_off(samples, holdout, seed)
    chunks = [*torch.split(held_out, _BATCH), *epoch_batches(trained, _BATCH, seed, 0)]
    rest = torch.ones(samples, dtype=torch.bool)
    rest[torch.cat(chunks)] = False
    chunks.extend(torch.split(rest.nonzero().flatten(), _BATCH))
    return tuple(chunk for chunk in chunks if len(chunk))


@final
class TeacherOutputs:
    """A network's outputs on a split: computed when they are first asked for, kept, and shared.

    Samples are always computed together with the others of their chunk, so that the numbers do
    not depend on who asks first: on one machine and with equally many threads they are the same
    each time. In bf16 they have its 8 bits of precision, as in a training that uses it.

    Args:
        network: in evaluation mode; not changed.
        inputs: of the whole split.
        chunks: of the split's sample numbers, each in exactly one of them.
        folder: keeps them in a file; None only in memory.
        bf16: autocast to bf16; "auto" where the device has bf16 arithmetic (`bf16_pays`).
        padding: of the inputs, which is left out.

    Attributes:
        seconds: spent in the network.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Inputs,
        chunks: tuple[Tensor, ...],
        folder: Path | None = None,
        bf16: bool | Literal["auto"] = "auto",
        padding: Padding = NO_PADDING,
    ) -> None:
        self._padding = padding
        self.seconds = 0.0
        self._network, self._inputs, self._chunks = network, inputs, chunks
        self._device = next(network.parameters()).device
        self._bf16 = takes_bf16(network, inputs) if bf16 == "auto" else bf16
        self._channels_last: bool | None = None
        self._chunk_of = torch.empty(len(inputs[0]), dtype=torch.long)
        for number, chunk in enumerate(chunks):
            self._chunk_of[chunk] = number
        self._known = torch.zeros(len(chunks), dtype=torch.bool)
        self._kept: list[Tensor] = []
        self._too_large = self._changed = False
        self._path = None if folder is None else self._find_path(folder)
        self._written_at = time.monotonic()
        self._read()

    def of(self, samples: Tensor) -> list[Tensor] | None:
        """Outputs of some samples as a flat list on the network's device, without gradients.

        None if the outputs of all samples are too large to be kept.

        Args:
            samples: numbers in the split, shape (batch,), int64, on the CPU.
        """
        numbers = self._chunk_of[samples]
        if not self._too_large and not bool(self._known[numbers].all()):
            start = time.monotonic()
            for number in sorted(set(numbers.tolist())):
                if not self._known[number] and not self._too_large:
                    self._compute(number)
            self.seconds += time.monotonic() - start
            if time.monotonic() - self._written_at > _KEEP_EVERY_S:
                self.keep()
        if self._too_large:
            return None
        return [kept[samples].to(self._device) for kept in self._kept]

    def keep(self) -> None:
        """Write what is not on disk yet; done by itself every minute in which there is any."""
        if self._path is None or not self._changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {str(position): kept for position, kept in enumerate(self._kept)}
        write_whole(self._path, save({"known": self._known, **content}))
        self._changed, self._written_at = False, time.monotonic()

    def _compute(self, number: int) -> None:
        chunk = self._chunks[number]
        for part in self._parts(chunk):
            inputs = self._padding.cut(tuple(x[part] for x in self._inputs))
            outputs = self._run(tuple(x.to(self._device) for x in inputs))
            if not self._kept:
                samples = len(self._chunk_of)
                size = sum(o[0].numel() * o.element_size() for o in outputs) * samples
                self._too_large = size > _CACHE_BYTES
                if self._too_large:
                    return
                self._kept = [torch.zeros(samples, *o.shape[1:], dtype=o.dtype) for o in outputs]
            for kept, output in zip(self._kept, outputs, strict=True):
                kept[part] = output.cpu()
        self._known[number] = self._changed = True

    def _parts(self, chunk: Tensor) -> tuple[Tensor, ...]:
        """A chunk's samples; with padding in parts of about the same length."""
        if not self._padding.axes:
            return (chunk,)
        inputs = tuple(x[chunk] for x in self._inputs)
        return tuple(chunk[part] for part in self._padding.parts(inputs, _PART))

    def _run(self, inputs: Inputs) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            if self._channels_last is None:
                self._channels_last = takes_channels_last(self._network, inputs)
            laid_out = channels_last(inputs) if self._channels_last else inputs
            return flatten_outputs(self._network(*laid_out))

    def _find_path(self, folder: Path) -> Path:
        key = make_key(
            _VERSION, network_hash(self._network), tensors_hash(self._inputs),
            tensors_hash(self._chunks), self._bf16, self._device.type, *self._padding.key,
        )  # fmt: skip
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return folder / f"teacher-{digest}.safetensors"

    def _read(self) -> None:
        """Take what is on disk; a damaged file is computed again."""
        if self._path is None or not self._path.exists():
            return
        try:
            content = load_file(self._path)
        except (SafetensorError, OSError):
            return
        known = content.pop("known")
        self._kept = [content[str(position)] for position in range(len(content))]
        self._known = known
