"""Residual blocks that a network can do without: what is read from them is then what they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from torch import Tensor, nn

from autocompress.graph.layers import copy_settings

Container = Literal["tensor", "tuple", "list"]


@final
@dataclass(frozen=True)
class Block:
    """A residual block whose output has the shape of its first input.

    Attributes:
        name: the module's name in `network.named_modules()`.
        layers: names of the layers in it, in order of their first call.
        other_weights: numbers in parameters of all else in it; batch norms that become part of a
            layer are left out.
        container: what it gives: the tensor itself, or a tuple or list that it stands first in.
        length: of that tuple or list; all but the tensor is None.
    """

    name: str
    layers: tuple[str, ...]
    other_weights: int = 0
    container: Container = "tensor"
    length: int = 1


@final
class PassThrough(nn.Module):
    """Takes a block's place and gives its first tensor input.

    It has the block's plain attributes, which some networks read from outside.
    """

    def __init__(self, module: nn.Module, block: Block) -> None:
        super().__init__()
        self._container, self._length = block.container, block.length
        copy_settings(module, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Any inputs, a tensor among them."""
        x = first_tensor(args, kwargs)
        if self._container == "tensor":
            return x
        values = [x, *[None] * (self._length - 1)]
        return values if self._container == "list" else tuple(values)


def drop_blocks(network: nn.Module, blocks: Iterable[Block]) -> None:
    """Take blocks out of a network, in place."""
    for block in blocks:
        network.set_submodule(block.name, PassThrough(network.get_submodule(block.name), block))


def dropped_blocks(network: nn.Module) -> tuple[str, ...]:
    """Names of the blocks that were taken out of a network."""
    return tuple(name for name, m in network.named_modules() if isinstance(m, PassThrough))


def is_within(name: str, blocks: Iterable[str]) -> bool:
    """Whether a layer, a norm or what a channel group is called by stands in one of some blocks."""
    return any(name.startswith(f"{block}.") for block in blocks)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module was called with."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def first_output(output: Any) -> tuple[Tensor, Container, int] | None:
    """The tensor that a block gives, and what holds it; None if it gives something else."""
    if isinstance(output, Tensor):
        return output, "tensor", 1
    if type(output) not in (tuple, list) or not output or not isinstance(output[0], Tensor):
        return None
    if any(value is not None for value in output[1:]):
        return None
    return output[0], "tuple" if isinstance(output, tuple) else "list", len(output)
