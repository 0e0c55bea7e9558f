"""The residual network of the experiments, and its training: cached, and resumed after a kill."""

# mypy: disable-error-code="arg-type, call-overload, no-any-return, no-untyped-call, union-attr"
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.recover.autocast import bf16_pays
from autocompress.recover.layout import gradients_are_safe
from autocompress.workload import Split


@final
@dataclass(frozen=True)
class Architecture:
    """Shape of a `ResidualNetwork`: one stage per width; later stages halve the image."""

    channels: int
    classes: int
    widths: tuple[int, ...]
    blocks: int


@final
@dataclass(frozen=True)
class Training:
    """How a network is trained; equal settings give equal weights on one machine.

    `augment`: `shift` moves each image by up to `shift` pixels, `shift_flip` also mirrors half of
    them. `bfloat16` computes under autocast: by default where the CPU has instructions for it.
    `threads` changes the order of sums, so it belongs to the settings.
    """

    epochs: int
    batch_size: int
    peak_learning_rate: float
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    augment: Literal["none", "shift", "shift_flip"] = "none"
    shift: int = 1
    bfloat16: bool = field(default_factory=lambda: bf16_pays(torch.device("cpu")))
    threads: int = 2
    seed: int = 0


@final
class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: (n, c_in, h, w) to (n, c_out, h/stride, w/stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut to the convolved input."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


@final
class ResidualNetwork(nn.Module):
    """Stem, stages of blocks, global average pooling, head: (n, c, h, w) to (n, classes)."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        width = shape.widths[0]
        self.stem = nn.Conv2d(shape.channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages = []
        for position, out in enumerate(shape.widths):
            first = Block(width, out, 2 if position else 1)
            stages.append(
                nn.Sequential(first, *(Block(out, out, 1) for _ in range(shape.blocks - 1)))
            )
            width = out
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = F.relu(self.bn(self.stem(x)))
        return self.head(self.pool(self.stages(x)).flatten(1))


def cache_folder() -> Path:
    """Where weights and downloads are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "autocompress"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def trained_network(
    name: str, shape: Architecture, data: Split, training: Training
) -> ResidualNetwork:
    """The trained network, in eval mode; trains on first use, else reads the cache.

    A training that was killed goes on after its last whole epoch and ends with the same weights.

    Args:
        name: of the experiment; names the cached file.
        data: one input of shape (n, c, h, w) and integer targets of shape (n,).
    """
    settings = [asdict(shape), asdict(training), _digest(data)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    weights = cache_folder() / f"{name}-{key}.safetensors"
    checkpoint = weights.with_suffix(".checkpoint")
    with _locked(weights.with_suffix(".lock")):
        if not weights.exists():
            with _threads(training.threads):
                network = _train(name, shape, data, training, checkpoint)
            state = {k: v.contiguous() for k, v in network.state_dict().items()}
            write_file(weights, partial(save_file, state))
            checkpoint.unlink(missing_ok=True)
    with torch.random.fork_rng(devices=[]):
        network = ResidualNetwork(shape)
    network.load_state_dict(load_file(weights))
    return network.eval()


def _train(
    name: str, shape: Architecture, data: Split, training: Training, checkpoint: Path
) -> ResidualNetwork:
    generator = torch.Generator().manual_seed(training.seed)
    network = _initialised(shape, generator)
    safe = gradients_are_safe(network)
    layout = torch.channels_last if safe else torch.contiguous_format
    network = network.to(memory_format=layout)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=training.peak_learning_rate,
        momentum=0.9,
        weight_decay=training.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        training.peak_learning_rate,
        total_steps=training.epochs * (len(data) // training.batch_size),
        pct_start=0.25,
    )
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for part, value in parts.items():
            value.load_state_dict(saved[part])
        generator.set_state(saved["generator"])
        start = saved["epochs"]
    network.train()
    for epoch in range(start, training.epochs):
        label = f"{name}: epoch {epoch + 1} of {training.epochs}"
        _epoch(label, network, data, training, layout, (optimizer, schedule, generator))
        saved = {part: value.state_dict() for part, value in parts.items()}
        saved |= {"generator": generator.get_state(), "epochs": epoch + 1}
        write_file(checkpoint, partial(torch.save, saved))
    return network


def _epoch(
    label: str,
    network: nn.Module,
    data: Split,
    training: Training,
    layout: torch.memory_format,
    state: tuple[torch.optim.SGD, torch.optim.lr_scheduler.OneCycleLR, torch.Generator],
) -> None:
    optimizer, schedule, generator = state
    begun = time.monotonic()
    total = torch.zeros(())
    order = torch.randperm(len(data), generator=generator)
    steps = len(data) // training.batch_size
    batches = order[: steps * training.batch_size].split(training.batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as progress:
        for index in progress.track(batches, description=label):
            loss = _loss(network, data.subset(index), training, layout, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
    console.print(f"{label}, loss {total / steps:.4f}, {time.monotonic() - begun:.1f} s")


def _initialised(shape: Architecture, generator: torch.Generator) -> ResidualNetwork:
    # Modules draw their first weights from the global generator, which must not notice.
    with torch.random.fork_rng(devices=[]):
        network = ResidualNetwork(shape)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01, generator=generator)
            nn.init.zeros_(module.bias)
    return network


def _loss(
    network: nn.Module,
    batch: Split,
    training: Training,
    layout: torch.memory_format,
    generator: torch.Generator,
) -> Tensor:
    images = _augmented(batch.inputs[0], training, generator).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=training.bfloat16):
        scores = network(images)
    return F.cross_entropy(scores.float(), batch.targets, label_smoothing=training.label_smoothing)


def _augmented(images: Tensor, training: Training, generator: torch.Generator) -> Tensor:
    if training.augment == "none":
        return images
    n, _, height, width = images.shape
    if training.augment == "shift_flip":
        mirrored = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    reach = training.shift
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(0, 2 * reach + 1, (2, n), generator=generator)
    return windows[torch.arange(n), :, down, right]


def _digest(data: Split) -> str:
    digest = hashlib.sha256()
    for tensor in (*data.inputs, data.targets):
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write to a name beside, which becomes the file's once the bytes are on disk."""
    # A kill may come at any moment: the name appears only once the bytes are on disk.
    unfinished = path.with_suffix(path.suffix + ".partial")
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
