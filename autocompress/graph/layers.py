"""The layers that carry weights, with their multiply-accumulates and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LayerKind = Literal["conv", "linear", "embedding"]
# Names that a reason lists.
MOST_LISTED = 3
LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Linear)
_PLAIN = (bool, int, float, str, type(None))
NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@final
@dataclass(frozen=True)
class Layer:
    """One layer with a weight, as seen with the example inputs.

    An embedding has a row for each entry of its table: its output channels are the entries, its
    input channels their width, and it multiplies nothing.

    Attributes:
        name: the module's name in `network.named_modules()`.
        kernel_size: spatial kernel size; empty for linear layers.
        positions: output positions (pixels, tokens) per sample, all calls together; 0 for an
            embedding.
        weights: number of weights, the bias included.
        stride: of every spatial dimension; empty for linear layers.
        reason: why no technique may change it; empty if they may.
        undivided: why it can't be replaced by several layers; empty if it can.
    """

    name: str
    kind: LayerKind
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    positions: int
    weights: int
    stride: tuple[int, ...] = ()
    reason: str = ""
    undivided: str = ""

    @property
    def compressible(self) -> bool:
        """Whether techniques may change it."""
        return not self.reason

    @property
    def in_features(self) -> int:
        """Length of one unfolded input row: channels times kernel size."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def dense(self) -> bool:
        """Whether all its outputs read all its inputs, so that moments of the inputs serve it."""
        return self.groups == 1 and self.kind != "embedding"

    @property
    def columns_per_channel(self) -> int:
        """Columns of the unfolded weight that belong to one input channel."""
        return math.prod(self.kernel_size)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.positions * self.out_channels * self.in_features

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in fp32."""
        return 4 * self.weights


def flatten_outputs(outputs: Any) -> list[Tensor]:
    """A network's outputs as a flat list of tensors."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values for tensor in flatten_outputs(value)]


def names_of(network: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of every module; most have one."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def sharing_modules(network: nn.Module) -> dict[str, list[str]]:
    """By a module's name the others that have a parameter of its too, such as a tied embedding."""
    names = {module: found[0] for module, found in names_of(network).items()}
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {
        names[module]: [names[m] or "the network" for m in sharing if m is not module][:MOST_LISTED]
        for sharing in owners.values()
        if len(sharing) > 1
        for module in sharing
    }


def run_hooked(
    network: nn.Module, inputs: Sequence[Tensor], handles: Sequence[RemovableHandle]
) -> Any:
    """A network's outputs, without gradients; its hooks are taken off again."""
    try:
        with torch.no_grad():
            return network(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def copy_settings(module: nn.Module, to: nn.Module) -> None:
    """Give a module in the place of another its plain attributes, which may be read outside."""
    for name, value in vars(module).items():
        if isinstance(value, _PLAIN) and not name.startswith("_"):
            setattr(to, name, value)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of a weight of shape (out, in) and a bias of shape (out,)."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device=torch.device("meta"))
    copied = weight.detach().clone(memory_format=torch.contiguous_format)
    layer.weight = nn.Parameter(copied, weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def same_outputs(
    network: nn.Module, changed: nn.Module, example_inputs: tuple[Tensor, ...]
) -> bool:
    """Whether a rewritten network runs, and gives what the network gives up to rounding.

    Args:
        network: in evaluation mode, and so the other.
        example_inputs: batch in dimension 0.
    """
    try:
        with torch.no_grad():
            pairs = zip(
                flatten_outputs(network(*example_inputs)),
                flatten_outputs(changed(*example_inputs)),
                strict=True,
            )
            return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
    except Exception:
        # A network that reads more of a module than its outputs cannot do without it.
        return False


def observe_layers(network: nn.Module, example_inputs: Sequence[Tensor]) -> tuple[Layer, ...]:
    """Run the network once and describe every layer that was called, in order of first call.

    Args:
        network: in evaluation mode; left as it was.
        example_inputs: inputs with the batch in dimension 0.
    """
    names = {module: name for name, module in network.named_modules()}
    samples = len(example_inputs[0])
    rows: dict[nn.Module, int] = {}
    shared = sharing_modules(network)

    def is_table(module: nn.Module) -> bool:
        # One with a forward pass of its own may read other entries than those it is given.
        plain = getattr(type(module), "forward", None) is nn.Embedding.forward
        table = isinstance(module, nn.Embedding) and module.max_norm is None
        return plain and table and names[module] not in shared

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        channels = module.out_features if isinstance(module, nn.Linear) else output.shape[1]
        rows[module] = rows.get(module, 0) + output.numel() // channels

    handles = [
        module.register_forward_hook(note)
        for module in network.modules()
        if isinstance(module, LAYER_TYPES) or is_table(module)
    ]
    run_hooked(network, example_inputs, handles)
    # Windows and tokens may have been moved into the batch: samples are those of the inputs.
    return tuple(
        _describe(names[module], module, max(1, count // samples)) for module, count in rows.items()
    )


def _describe(name: str, module: nn.Module, positions: int) -> Layer:
    weights = sum(p.numel() for p in module.parameters(recurse=False))
    if isinstance(module, nn.Linear):
        return Layer(
            name, "linear", module.in_features, module.out_features, (), 1, positions, weights
        )
    if isinstance(module, nn.Embedding):
        width, entries = module.embedding_dim, module.num_embeddings
        return Layer(name, "embedding", width, entries, (), 1, 0, weights)
    conv = cast(nn.Conv2d, module)
    return Layer(
        name,
        "conv",
        conv.in_channels,
        conv.out_channels,
        tuple(conv.kernel_size),
        conv.groups,
        positions,
        weights,
        tuple(conv.stride),
    )
