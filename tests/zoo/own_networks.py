"""Networks of every layer and idiom that people write, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResNeXtBlock(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def resnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), ResNeXtBlock(16, 4), ResNeXtBlock(16, 4), *pooled_head(16)
    )


def pooled_head(width: int, classes: int = 5) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 8 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(8 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.AvgPool2d(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(self.transition(x).mean((2, 3)))


class UNet(nn.Module):
    """Transposed convolutions and skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.double(3, 8), self.double(8, 16)
        self.bottom = self.double(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2, self.merge1 = self.double(32, 16), self.double(16, 8)
        self.head = nn.Conv2d(8, 4, 1)

    @staticmethod
    def double(width: int, out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        deep = self.bottom(F.max_pool2d(second, 2))
        second = self.merge2(torch.cat([second, self.up2(deep)], 1))
        return self.head(self.merge1(torch.cat([first, self.up1(second)], 1)))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = F.silu(self.conv(x))
        weight = F.silu(self.reduce(made.mean((2, 3), keepdim=True)))
        return x + made * F.hardsigmoid(self.expand(weight))


def squeeze_excite() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish(), SqueezeExcite(16), SqueezeExcite(16),
        *pooled_head(16),
    )  # fmt: skip


def time_series() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1),
        nn.GELU(), nn.Conv1d(16, 24, 3, 2, 2, dilation=2), nn.ELU(), nn.AdaptiveAvgPool1d(4),
        nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.recurrent = cell(16, 24, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(48, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        states = self.recurrent(F.relu(self.embed(x)))[0]
        return self.head(F.relu(self.hidden(states[:, -1])))


class PackedAttention(nn.Module):
    """`nn.MultiheadAttention` beside layers that can be compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class EncoderStack(nn.Module):
    """PyTorch's own encoder, which reads its layers' weights itself when it can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Functional(nn.Module):
    """Convolves and multiplies with parameters of its own, beside one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 3, 3, 3) / 5)
        self.scale = nn.Parameter(torch.rand(16, 1, 1))
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.matrix = nn.Parameter(torch.randn(5, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, stride=2, padding=1) * self.scale)
        return F.linear(F.relu(self.conv(x)).mean((2, 3)), self.matrix)


class Detector(nn.Module):
    """Two scales, and at each two heads with shared weights; four outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.lateral = nn.Conv2d(16, 16, 1)
        self.tower = nn.Conv2d(16, 16, 3, padding=1)
        self.classes, self.boxes = nn.Conv2d(16, 6, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fine = F.relu(self.stem(x))
        coarse = F.relu(self.deep(fine))
        fine = self.lateral(fine) + F.interpolate(coarse, scale_factor=2.0)
        towers = [F.relu(self.tower(level)) for level in (fine, coarse)]
        return (*map(self.classes, towers), *(self.boxes(t).exp() for t in towers))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x).transpose(1, 2)


def activations() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(),
        nn.Conv2d(16, 16, 3, 2, 1), nn.Hardswish(), nn.Conv2d(16, 16, 1), nn.PReLU(),
        nn.Conv2d(16, 16, 1), nn.LeakyReLU(), nn.Conv2d(16, 16, 1), nn.Mish(), *pooled_head(16),
    )  # fmt: skip


def group_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(1, 16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), *pooled_head(24),
    )  # fmt: skip


class LayerNormMixer(nn.Module):
    """Mixes tokens and channels in turn: the same axis is features, then positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.tokens = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))


class StandardizedConv2d(nn.Conv2d):
    """Weight standardization (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return self._conv_forward(x, (self.weight - mean) / deviation, self.bias)


class SamePaddedConv2d(nn.Conv2d):
    """Pads as TensorFlow does, on the right more than on the left."""

    def forward(self, x: Tensor) -> Tensor:
        extra = [
            max((-(-s // st) - 1) * st + k - s, 0)
            for s, st, k in zip(x.shape[:1:-1], self.stride[::-1], self.kernel_size[::-1],
                                strict=True)
        ]  # fmt: skip
        sides = [side for e in extra for side in (e // 2, e - e // 2)]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride)


class RenamedLinear(nn.Linear):
    """A subclass that computes what its base does."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def own_layers() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 1))
    return nn.Sequential(
        SamePaddedConv2d(3, 16, 3, 2), nn.ReLU(), StandardizedConv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), normed, nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), RenamedLinear(24, 32), nn.ReLU(),
        nn.Linear(32, 5),
    )  # fmt: skip


class Repeated(nn.Module):
    """One layer called three times, one registered under two names, and two equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.shared = nn.Linear(16, 16)
        self.first = nn.Linear(16, 16)
        self.second = self.first
        self.twins = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.twins[1].load_state_dict(self.twins[0].state_dict())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = x + F.gelu(self.shared(x))
        x = self.second(F.relu(self.first(x)))
        for twin in self.twins:
            x = F.relu(twin(x))
        return self.head(x.mean(1))


class Detached(nn.Module):
    """Leaves the graph of gradients half way, so that no dependencies can be traced there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(x)


class Volumes(nn.Module):
    """Three-dimensional convolutions, which no technique takes, before linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.norm(self.conv(x))), 3)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Siamese(nn.Module):
    """One branch for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.branch(left), self.branch(right)], 1))


class PixelShuffled(nn.Module):
    """Channels become pixels (super-resolution), and are shuffled between groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.channel_shuffle(F.relu(self.grouped(F.relu(self.stem(x)))), 4)
        return F.pixel_shuffle(self.up(F.relu(self.body(y))), 2)


_IMAGE, _SEQUENCE = ((3, 16, 16),), ((8, 6),)
# By name how a network is made, and its inputs: the shape of a sample, or its number of tokens.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...] | int, ...]]] = {
    "resnext": (resnext, _IMAGE),
    "densenet": (DenseNet, _IMAGE),
    "unet": (UNet, _IMAGE),
    "squeeze_excite": (squeeze_excite, _IMAGE),
    "time_series": (time_series, ((4, 32),)),
    "lstm": (lambda: Recurrent(nn.LSTM), _SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), _SEQUENCE),
    "multihead_attention": (PackedAttention, _SEQUENCE),
    "transformer_encoder": (EncoderStack, _SEQUENCE),
    "functional": (Functional, _IMAGE),
    "detector": (Detector, _IMAGE),
    "tied_embedding": (TiedLanguageModel, (8,)),
    "activations": (activations, _IMAGE),
    "group_norms": (group_norms, _IMAGE),
    "mixer": (LayerNormMixer, _SEQUENCE),
    "own_layers": (own_layers, _IMAGE),
    "repeated": (Repeated, _SEQUENCE),
    "detached": (Detached, ((6,),)),
    "volumes": (Volumes, ((1, 6, 6, 6),)),
    "siamese": (Siamese, ((3, 16, 16), (3, 16, 16))),
    "pixel_shuffle": (PixelShuffled, _IMAGE),
}
VOCABULARY = 40
