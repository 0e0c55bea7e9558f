"""A tiny problem to train on, with batch norm and dropout, and losses that can be counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import Split
from autocompress.recover.training import Batch, TrainingSettings

FAST = TrainingSettings(epochs=3, learning_rate=0.05, batch_size=16, holdout=32, bf16=False)


def make_split(samples: int = 128, seed: int = 0) -> Split:
    """Three classes, by the largest of three features' sums over an image."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 3, 4, 4, generator=generator)
    return Split(inputs, inputs.sum((2, 3)).argmax(1))


def make_network(seed: int = 0, width: int = 6, dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Dropout(dropout), nn.Conv2d(width, 4, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ).eval()  # fmt: skip


class CrossEntropy:
    """Cross-entropy that notes the samples it saw and the modes that it was called in."""

    def __init__(self) -> None:
        self.extra = nn.Module()
        self.samples: list[Tensor | None] = []
        self.norm_modes: list[bool] = []

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        if network.training:
            self.samples.append(batch.samples)
            self.norm_modes += [m.training for m in network if isinstance(m, nn.BatchNorm2d)]
        return F.cross_entropy(network(*batch.inputs), batch.targets)


class FromFunction:
    """A loss made of a function of network and batch."""

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.extra = nn.Module()
        self.function = function

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.function(network, batch)


class Killed(BaseException):
    """Stands for the end of the process."""


def killer(after: int) -> Callable[[], None]:
    """A callback that raises `Killed` when it is called for that time."""
    calls = [0]

    def advance() -> None:
        calls[0] += 1
        if calls[0] == after:
            raise Killed

    return advance


def tensors(network: nn.Module) -> dict[str, Tensor]:
    named = (*network.named_parameters(), *network.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
