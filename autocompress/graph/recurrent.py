"""Recurrent layers whose matrices are modules of their own, which techniques can take one by one.

The arithmetic stays PyTorch's own, so exported files hold one operator per layer as before.
"""

from __future__ import annotations

import copy
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from autocompress.graph.layers import copy_settings

_KINDS: tuple[type[nn.RNNBase], ...] = (nn.LSTM, nn.GRU, nn.RNN)


def is_recurrent(module: nn.Module) -> bool:
    """Whether `Recurrent` can stand for a module."""
    return type(module) in _KINDS and not cast(nn.RNNBase, module).proj_size


@final
class Recurrent(nn.Module):
    """Computes what an `nn.LSTM`, `nn.GRU` or `nn.RNN` does, from the same parameters.

    Its children are the matrices, by the names that the parameters had: tables of which all rows
    are read, in their order.

    Args:
        module: one that `is_recurrent`; gives its parameters and settings, and is not changed.
    """

    rows: Tensor
    input_size: int
    hidden_size: int
    bidirectional: bool

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        copy_settings(module, self)
        self._kind = cast("type[nn.LSTM]", type(module))
        self._names = tuple(name for name, _ in module.named_parameters(recurse=False))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                self.add_module(name, RecurrentMatrix(parameter))
            else:
                self.register_parameter(name, parameter)
        first = next(module.parameters())
        self.register_buffer("rows", torch.arange(len(first), device=first.device), False)

    def forward(self, x: Any, hx: Any = None) -> Any:
        """As the module's own, which finds here all that it reads."""
        return self._kind.forward(cast(nn.LSTM, self), x, hx)

    def flatten_parameters(self) -> None:
        """Do nothing: the parameters are not in one piece of memory."""

    def permute_hidden(self, hidden: Any, order: Tensor | None) -> Any:
        """A state with its samples in another order."""
        return self._kind.permute_hidden(cast(nn.LSTM, self), hidden, order)

    def check_forward_args(self, *args: Any) -> None:
        """Do nothing: what does not fit makes the operator fail."""

    def _update_flat_weights(self) -> None:
        """Do nothing: they are read anew each time."""

    @property
    def _flat_weights(self) -> list[Tensor]:
        """Matrices and biases in the operator's order."""
        parts = [getattr(self, name) for name in self._names]
        return [part(self.rows) if isinstance(part, nn.Module) else part for part in parts]


@final
class RecurrentMatrix(nn.Embedding):
    """A matrix of a recurrent layer as a table of its rows."""

    def __init__(self, parameter: nn.Parameter) -> None:
        rows, columns = parameter.shape
        super().__init__(rows, columns, device=torch.device("meta"))
        self.weight = parameter


@final
class StandIn(nn.Module):
    """A layer with a recurrent one's inputs and outputs, through which channels can be followed.

    It computes something else, and no gradient goes through its state.

    Args:
        module: what it stands for.
    """

    def __init__(self, module: Recurrent) -> None:
        super().__init__()
        self.__dict__["_module"] = module
        directions = 2 if module.bidirectional else 1
        self.mix = nn.Linear(module.input_size, directions * module.hidden_size)

    def forward(self, x: Any, hx: Any = None) -> Any:
        """Outputs of the right shape."""
        module = cast(Recurrent, self.__dict__["_module"])
        with torch.no_grad():
            outputs, state = module(x, hx)
        return (self.mix(x) if isinstance(x, Tensor) else outputs), state

    def flatten_parameters(self) -> None:
        """Do nothing."""


def with_stand_ins(network: nn.Module) -> tuple[nn.Module, frozenset[str]]:
    """A copy with stand-ins for recurrent layers, and the names of these; itself if it has none."""
    names = [name for name, m in network.named_modules() if isinstance(m, Recurrent)]
    if not names:
        return network, frozenset()
    changed = copy.deepcopy(network)
    for name in names:
        changed.set_submodule(name, StandIn(cast(Recurrent, changed.get_submodule(name))))
    return changed, frozenset(names)
