"""Every module that owns parameters: what it is, what it costs, and why it is left alone if so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from autocompress.graph.layers import LAYER_TYPES, NORM_TYPES, run_hooked, sharing_modules
from autocompress.graph.recurrent import Recurrent
from autocompress.graph.trace import NetworkGraph

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (*_TRANSPOSED, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The first type that fits tells the reason.
_REASONS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (LAYER_TYPES, "it is not called as a module, but left out or read by another"),
    (_TRANSPOSED, "no technique takes transposed convolutions"),
    ((nn.Conv3d,), "no technique takes three-dimensional convolutions"),
    ((nn.Embedding,), "it is not called as a module, or does more than to look entries up"),
    ((nn.EmbeddingBag,), "no technique takes tables whose entries are summed"),
    ((Recurrent,), "only biases: its matrices stand below it"),
    (
        (nn.RNNBase, nn.RNNCellBase),
        "a recurrent layer that cannot be taken apart: a cell, or with projections, or read by "
        "more than its outputs",
    ),
    (
        (nn.MultiheadAttention,),
        "it packs its projections into one parameter, and has further keys, or is read by more "
        "than its outputs",
    ),
    ((*NORM_TYPES, nn.LayerNorm), "a normalization: it follows the channels of its layers"),
    ((nn.PReLU,), "an activation: it follows the channels of its layers"),
)


@final
@dataclass(frozen=True)
class Owner:
    """A module with parameters of its own.

    Attributes:
        name: in `network.named_modules()`; empty for the network itself.
        kind: its type's name.
        shape: of its largest parameter.
        weights: numbers in its own parameters.
        macs: multiply-accumulates per sample of all its calls; None where they are not known.
        reason: why no technique may change it; empty if they may.
        undivided: why it can't be replaced by several layers; empty if it can.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    macs: int | None
    reason: str
    undivided: str = ""


def find_owners(
    network: nn.Module, example_inputs: tuple[Tensor, ...], graph: NetworkGraph
) -> tuple[Owner, ...]:
    """Every module that owns parameters, in the network's order.

    Args:
        network: in evaluation mode; left as it was.
        example_inputs: batch in dimension 0.
        graph: of the network.
    """
    layers = {layer.name: layer for layer in graph.layers}
    names = {module: name for name, module in network.named_modules()}
    work = _observe_macs(network, example_inputs)
    shared = sharing_modules(network)
    folded = {norm: layer for layer, norm in graph.norms.items()}
    owners = []
    for module, name in names.items():
        parameters = list(module.parameters(recurse=False))
        if not parameters:
            continue
        layer = layers.get(name)
        reason = layer.reason if layer else _reason(module, name, shared, folded)
        owners.append(
            Owner(
                name,
                type(module).__name__,
                tuple(max(parameters, key=Tensor.numel).shape),
                sum(p.numel() for p in parameters),
                layer.macs if layer else work.get(module),
                reason,
                layer.undivided if layer else "",
            )
        )
    return tuple(owners)


def _reason(
    module: nn.Module, name: str, shared: Mapping[str, Sequence[str]], folded: Mapping[str, str]
) -> str:
    """Why a module that is no layer of the graph is left alone."""
    if name in shared:
        return f"it shares a weight with {', '.join(shared[name])}"
    if name in folded:
        return f"a normalization: it becomes part of {folded[name]}"
    for kinds, text in _REASONS:
        if isinstance(module, kinds):
            return text
    if "norm" in type(module).__name__.lower():
        return "a normalization, with few weights"
    return f"no technique takes the parameters of {type(module).__name__} itself"


def _observe_macs(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> dict[nn.Module, int]:
    """Multiply-accumulates per sample of modules that multiply with their matrices."""
    samples = len(example_inputs[0])
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or isinstance(module, nn.Embedding):
            return
        inner = isinstance(module, Recurrent)
        matrices = sum(p.numel() for p in module.parameters(recurse=inner) if p.dim() > 1)
        # A transposed convolution spreads its inputs, every other gathers for its outputs.
        tensor = output if isinstance(module, _CONVOLUTIONS[3:]) else args[0]
        axis = 1 if isinstance(module, _CONVOLUTIONS) else -1
        rows = tensor.numel() // max(1, tensor.shape[axis]) if tensor.dim() > 1 else 1
        if matrices:
            found[module] = found.get(module, 0) + rows * matrices // samples

    handles = [
        module.register_forward_hook(note)
        for module in network.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    run_hooked(network, example_inputs, handles)
    return found
