"""Small workloads of kinds that are no image classification; their networks are random.

What is right is what the original network gives, so that every score starts at its best.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress import Split, Workload

SAMPLES = 192


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Regressor(nn.Module):
    """Two numbers from a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 32), nn.Tanh())
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Detector(nn.Module):
    """For every cell of a grid class scores and a box, as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 16, 2), conv(16, 32, 2)
        self.inner = conv(32, 32)
        self.scores = nn.Conv2d(32, 4, 1)
        self.boxes = nn.Conv2d(32, 4, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.down(self.stem(image))
        x = x + self.inner(x)
        return {"scores": self.scores(x), "boxes": torch.sigmoid(self.boxes(x))}


class UNet(nn.Module):
    """Class scores per pixel; one skip connection, one learned and one plain way up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bottom = conv(3, 16), conv(16, 24), conv(24, 32)
        self.up = nn.ConvTranspose2d(32, 24, 2, 2)
        self.join, self.last = conv(48, 24), conv(40, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        x = self.join(torch.cat([self.up(self.bottom(F.max_pool2d(second, 2))), second], 1))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.head(self.last(torch.cat([x, first], 1)))


class SeriesNetwork(nn.Module):
    """Convolutions along time, one of them depthwise and one dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 24, 5, 2, 2), nn.BatchNorm1d(24), nn.ReLU(),
            nn.Conv1d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm1d(24), nn.ReLU(),
            nn.Conv1d(24, 32, 3, padding=2, dilation=2), nn.BatchNorm1d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(2))


def negative_mean_absolute_error(outputs: np.ndarray, targets: np.ndarray) -> float:
    return -float(np.abs(outputs - targets).mean())


def found_objects(outputs: tuple[np.ndarray, np.ndarray], targets: np.ndarray) -> float:
    """Share of cells of the right class whose box is near; targets are class, then the box."""
    scores, boxes = outputs
    right = scores.argmax(1) == targets[:, 0]
    near = np.abs(boxes - targets[:, 1:]).max(1) < 0.25
    return float((right & near).mean())


def regression() -> Workload:
    network, x = prepared(Regressor, (12,))
    y = answers(network, x)[0]
    # Errors of the labels: else no candidate could come near.
    y = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return workload(network, x, y, negative_mean_absolute_error)


def detection() -> Workload:
    """By name, with two outputs, and open to images of any size."""
    network, x = prepared(Detector, (3, 16, 16))
    scores, boxes = answers(network, x)
    targets = torch.cat([scores.argmax(1, keepdim=True).float(), boxes], 1)
    parts = [Split({"image": x[i::4]}, targets[i::4]) for i in range(4)]
    return Workload(
        network, {"image": x[:1]}, parts[0], parts[1], parts[2], parts[3], found_objects,
        dynamic_axes={"image": {2: "height", 3: "width"}},
    )  # fmt: skip


def segmentation() -> Workload:
    network, x = prepared(UNet, (3, 16, 16))
    return workload(network, x, answers(network, x)[0].argmax(1), "accuracy")


def series() -> Workload:
    network, x = prepared(SeriesNetwork, (4, 64))
    with torch.no_grad():
        # Else a random network sees one class everywhere.
        network.head.bias -= network(x).mean(0)
    return workload(network, x, answers(network, x)[0].argmax(1), "accuracy")


def prepared(kind: type[nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """A network with statistics of its inputs, in eval mode, and inputs."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    network = kind()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    x = torch.randn(SAMPLES, *shape, generator=generator)
    with torch.no_grad():
        for _ in range(40):
            network.train()(x)
    return network.eval(), x


def answers(network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = network(x)
    return tuple(found.values()) if isinstance(found, dict) else (found,)


def workload(network: nn.Module, x: Tensor, y: Tensor, metric) -> Workload:
    parts = [Split(x[i::4], y[i::4]) for i in range(4)]
    return Workload(network, x[:1], parts[0], parts[1], parts[2], parts[3], metric)
