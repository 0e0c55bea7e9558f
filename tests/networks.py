"""Small networks of every structure that the tests of the compression pipeline need."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.bank import Bank, stitch
from autocompress.bank.statistics import Gathering, collect_statistics
from autocompress.bank.stitch import Stitched, apply_stage
from autocompress.config import CalibrationSettings
from autocompress.device import DeviceProfile, MeasuringSettings, OnnxRuntimeCpuSettings
from autocompress.export.exporter import Exporter
from autocompress.graph import Layer, NetworkGraph, trace
from autocompress.measure.abilities import find_abilities, settled
from autocompress.measure.session import Placement
from autocompress.plan import Decision, Plan
from autocompress.search.space_rules import on_device
from autocompress.techniques import technique_of
from autocompress.techniques.technique import LayerStatistics, Stage

SAMPLES = 96


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = stride == 1 and width == out
        self.shortcut = None if same else nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + (x if self.shortcut is None else self.shortcut(x)))


class Residual(nn.Module):
    """Groups: stem+block1 (a sum), block1's inner, block2's inner, block2's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block1 = Block(8, 8, 1)
        self.block2 = Block(8, 12, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.head(self.block2(self.block1(x)).mean((2, 3)))


class Concat(nn.Module):
    """Two branches that one convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 6, 3, padding=1)
        self.right = nn.Conv2d(2, 8, 1)
        self.join = nn.Conv2d(14, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(F.relu(self.join(both)).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(2, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.expand(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        return self.head(self.bn3(self.project(x)).mean((2, 3)))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 9, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Signal(nn.Module):
    """One-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 8, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 12, 3, stride=2, dilation=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.bn1(self.conv1(x))))).mean(2))


class Tokens(nn.Module):
    """Linear layers on three-dimensional inputs, with layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm1 = nn.LayerNorm(8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.norm2 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.head(self.norm2(x).mean(1))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 8, 3, padding=1)
        self.classes = nn.Linear(8, 5)
        self.boxes = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.body(x)).mean((2, 3))
        return self.classes(x), self.boxes(x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(2, 8, 3, padding=1)
        self.side = nn.Linear(3, 6)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pooled = F.relu(self.image(x)).mean((2, 3))
        return self.head(torch.cat([pooled, F.relu(self.side(y))], 1))


class Reshaped(nn.Module):
    """Reads its channel count from a shape: PyTorch follows a pruning, an ONNX graph does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.after = nn.Conv1d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(self.after(x.reshape(x.shape[0], x.shape[1], -1)).mean(2))


class SelfAttention(nn.Module):
    """Separate queries, keys and values, all as wide as the tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.all_head_size = width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], self.num_heads, -1)
        q, k, v = (m(x).reshape(shape).transpose(1, 2) for m in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.project(mixed.reshape(x.shape[0], x.shape[1], self.all_head_size))


class FusedAttention(nn.Module):
    """One layer for queries, keys and values; heads together are wider than the tokens."""

    def __init__(self, width: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = head_size**-0.5
        self.qkv = nn.Linear(width, 3 * heads * head_size, bias=False)
        self.out = nn.Linear(heads * head_size, width)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.heads, -1)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A pre-norm block around an attention module."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 20)
        self.down = nn.Linear(20, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class Words(nn.Module):
    """A table of 40 words, and one of positions that is smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 12, padding_idx=0)
        self.places = nn.Embedding(7, 12)
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = self.words(tokens) + self.places(places)
        return self.head(F.relu(self.hidden(x)).mean(1))


class Stacked(nn.Module):
    """Post-norm blocks that give tuples, between layers that are as wide and no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.layers = nn.ModuleList(TupleBlock(8, 12) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.embed(x))
        for layer in self.layers:
            x = layer(hidden=x, mask=None)[0]
        return self.head(x.mean(1))


class TupleBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        assert mask is None
        return self.norm(hidden + self.down(F.gelu(self.up(hidden)))), None


_KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "residual": (Residual, ((2, 8, 8),)),
    "concat": (Concat, ((2, 6, 6),)),
    "depthwise": (Depthwise, ((2, 6, 6),)),
    "flatten": (Flatten, ((2, 6, 6),)),
    "signal": (Signal, ((3, 20),)),
    "tokens": (Tokens, ((7, 6),)),
    "two_outputs": (TwoOutputs, ((2, 6, 6),)),
    "two_inputs": (TwoInputs, ((2, 6, 6), (3,))),
    "reshaped": (Reshaped, ((2, 6, 6),)),
    "attention": (lambda: Transformer(12, SelfAttention(12, 4)), ((7, 6),)),
    "words": (Words, ((7,),)),
    "fused_attention": (lambda: Transformer(10, FusedAttention(10, 4, 3)), ((7, 6),)),
    "stacked": (Stacked, ((7, 6),)),
}
NAMES = tuple(_KINDS)
# Those all of whose layers are convolutions and matrix products.
DENSE = tuple(name for name in NAMES if name != "words")


@dataclass(frozen=True, eq=False)
class Case:
    """A network with lively batch norms, in evaluation mode, and calibration inputs."""

    name: str
    network: nn.Module
    inputs: tuple[Tensor, ...]

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        return tuple(x[:2] for x in self.inputs)


@cache
def make_case(name: str) -> Case:
    """One case per name and session: tests must not change it."""
    kind, shapes = _KINDS[name]
    generator = torch.Generator().manual_seed(NAMES.index(name))
    with torch.random.fork_rng():
        torch.manual_seed(NAMES.index(name))
        network = kind()
        drawn = [torch.randn(SAMPLES, *s, generator=generator) for s in shapes]
        # Words, some of which are frequent and some of which are never read.
        words = [(x.abs() * 12).long().clamp(max=39) for x in drawn]
        inputs = tuple(words if name == "words" else map(correlated, drawn))
        enliven(network, inputs)
    return Case(name, network, inputs)


def correlated(noise: Tensor) -> Tensor:
    """Inputs whose features share a part and have a mean, as real data do."""
    shared = noise.reshape(len(noise), -1).mean(1).reshape(-1, *(1 for _ in noise.shape[1:]))
    return noise + 4 * shared + 0.3


def enliven(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Give norms random scales and `set_statistics`."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    set_statistics(network, inputs)


def set_statistics(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Give batch norms the mean and variance of the data; leaves evaluation mode.

    The variance is the biased one, by which PyTorch divides in training.
    """

    def unbiased_to_biased(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        count = args[0].numel() // args[0].shape[1]
        norm.running_var *= (count - 1) / count

    network.train()
    handles = []
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.track_running_stats:
            module.momentum = None
            module.reset_running_stats()
            handles.append(module.register_forward_hook(unbiased_to_biased))
    with torch.no_grad():
        network(*inputs)
    for handle in handles:
        handle.remove()
    network.eval()


def run(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs, always as a tuple."""
    with torch.no_grad():
        outputs = network(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


_FOLDER = tempfile.TemporaryDirectory(prefix="autocompress-tests-")


@cache
def graph_of(name: str) -> NetworkGraph:
    case = make_case(name)
    return trace(case.network, case.example_inputs)


def new_bank(name: str, folder: Path, multiple: int = 1) -> Bank:
    """A calibrated bank of a case's network in a folder."""
    case = make_case(name)
    bank = Bank(case.network, graph_of(name), multiple, folder)
    bank.calibrate(case.inputs, CalibrationSettings())
    return bank


@cache
def bank_of(name: str) -> Bank:
    """One calibrated bank per case and session, for channel counts of any number."""
    return new_bank(name, Path(_FOLDER.name) / name)


def gathered(
    network: nn.Module, layers: Sequence[Layer], inputs: tuple[Tensor, ...], rows: int
) -> dict[str, LayerStatistics]:
    """The statistics of all layers, gathered in one pass."""
    gathering = Gathering(network, layers, inputs, rows)
    return dict(collect_statistics(gathering, gathering.observed))


def assemble(bank: Bank, plan: Plan) -> Stitched:
    """A candidate with everything that needs no training, quantization included."""
    stitched = stitch(bank, plan)
    apply_stage(bank, stitched, plan, Stage.QUANTIZE)
    return stitched


@cache
def exporter_of(name: str) -> Exporter:
    """One exporter per case and session: exporting costs a second."""
    case = make_case(name)
    parity = tuple(x[:8] for x in case.inputs)
    return Exporter(case.network, graph_of(name), case.example_inputs, parity)


def make_device(
    kernels: dict[str, tuple[int, ...]] | None = None, channel_multiple: int = 1
) -> DeviceProfile:
    """A device with 8-bit kernels for everything, unless told otherwise."""
    return DeviceProfile(
        version=2,
        name="test",
        kind="cpu",
        runtimes=(OnnxRuntimeCpuSettings(name="onnxruntime"),),
        channel_multiple=channel_multiple,
        kernels=dict.fromkeys(("Conv", "Gemm", "MatMul"), (32, 8)) if kernels is None else kernels,
        measuring=MeasuringSettings(
            target_half_width=0.2,
            time_limit_s=1,
            final_target_half_width=0.1,
            final_time_limit_s=1,
            hang_limit_s=10,
        ),
    )


@cache
def this_device() -> DeviceProfile:
    """`make_device` as this machine turns out to be: some CPUs' integer kernels cut large sums."""
    device = make_device()
    return settled(device, find_abilities(device, Placement(threads=1, gpu=0)))[0]


def as_run_here(decision: Decision) -> Decision:
    """A decision as this machine's kernels need it."""
    return on_device(technique_of(decision), decision, this_device())
