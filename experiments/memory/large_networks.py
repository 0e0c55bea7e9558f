"""Large networks with random weights: what a bank costs does not depend on what they know."""

# mypy: disable-error-code="arg-type, no-any-return"
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.workload import Split, Workload

CALIBRATION, JUDGED, LENGTH, CLASSES, SIDE = 256, 32, 64, 10, 64


class Encoder(nn.Module):
    """A transformer encoder and a linear layer on its first token.

    Inputs are token numbers of shape (n, length), int64; the output has shape (n, classes).
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig()
        self.words = config.vocab_size
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores."""
        return self.head(self.encoder(input_ids=tokens).last_hidden_state[:, 0])


class Bottleneck(nn.Module):
    """Pointwise, 3 x 3, pointwise, and a shortcut."""

    def __init__(self, width: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        sides = ((width, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1))
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in sides
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sides)
        self.shortcut: nn.Module = nn.Identity()
        if width != out:
            conv = nn.Conv2d(width, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, width, h, w) to (n, out, h / stride, w / stride)."""
        y = x
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y) if place < 2 else y
        return F.relu(y + self.shortcut(x))


class WideResidual(nn.Module):
    """About a ResNet-101 with wide 3 x 3 convolutions: up to 9 * 512 = 4608 unfolded columns."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 24, 3)) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
        parts += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for stage, count in enumerate(blocks):
            inner = min(128 << stage, 512)
            for block in range(count):
                stride = 2 if stage and not block else 1
                parts.append(Bottleneck(width, inner, 256 << stage, stride))
                width = 256 << stage
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, shape (n, classes), of images (n, 3, side, side)."""
        return self.head(self.features(x).mean((2, 3)))


def encoder() -> Workload:
    """BERT-base's shape, 109 million parameters: 12 layers of 768, 3072 between."""
    torch.manual_seed(0)
    network = Encoder().eval()
    return _workload(network, lambda n: torch.randint(network.words, (n, LENGTH)))


def convolutions() -> Workload:
    """101 million parameters in convolutions with batch norms."""
    torch.manual_seed(0)
    return _workload(WideResidual().eval(), lambda n: torch.randn(n, 3, SIDE, SIDE))


def _workload(network: nn.Module, draw: Callable[[int], Tensor]) -> Workload:
    def split(size: int) -> Split:
        return Split(draw(size), torch.randint(CLASSES, (size,)))

    return Workload(
        network=network,
        example_inputs=(draw(1),),
        calibration=Split(draw(CALIBRATION)),
        train=None,
        search_split=split(JUDGED),
        test_split=split(JUDGED),
    )
