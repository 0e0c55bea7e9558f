"""Any network as the tool calls it: with tensors by position, for a tensor or a tuple of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, final

import torch
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.workload.inputs import Axes, describe, resized

# Of a network's inputs, where it is tried at other sizes.
_FEW = 2
_FACTORS = (Fraction(1, 2), Fraction(2), Fraction(3, 4))


@final
class Positional(nn.Module):
    """A network that takes its inputs by position and gives a tensor or a flat tuple of them.

    It has the wrapped network's own parameters and children under their own names, so that nothing
    shows of the wrapping in the names of layers, weights or exported inputs.

    Args:
        network: changed with this one; both hold the same children.
        names: keywords for the inputs, in order; none to hand them on by position.
    """

    network: nn.Module
    names: tuple[str, ...]

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        own = self.__dict__
        # The same dictionaries: a layer that is replaced in one is replaced in both.
        for store in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            own[store] = network.__dict__[store]
        # Past `__setattr__`, which would make children of them.
        own |= {"network": network, "names": names, "forward": _forward(network, names)}
        self.training = network.training

    def train(self, mode: bool = True) -> Positional:
        """Set the mode of the wrapped network too, which is no child."""
        self.network.training = mode
        return super().train(mode)

    def extra_repr(self) -> str:
        """What is wrapped, and how it is called."""
        return ", ".join([type(self.network).__name__, *self.names])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are wrapped anew: shared dictionaries would come apart."""
        return Positional, (self.network, self.names)


def as_positional(
    network: nn.Module, names: tuple[str, ...], example_inputs: tuple[Tensor, ...]
) -> nn.Module:
    """The network itself if it is called by position and gives tensors; else it wrapped.

    What it gives is found by running it on one sample. A network that does not run, or that is
    in training mode, stays as it is: `check_workload` says what is wrong with it.
    """
    if isinstance(network, Positional):
        same = not names or names == network.names
        return network if same else Positional(network.network, names)
    if names:
        return Positional(network, names)
    if any(module.training for module in network.modules()):
        return network
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = network(*(tensor[:1] for tensor in example_inputs))
        flat = flatten_tensors(outputs)
    except Exception:
        # A user's network may raise anything.
        return network
    several = [outputs] if isinstance(outputs, Tensor) else outputs
    plain = type(several) in (tuple, list) and all(isinstance(o, Tensor) for o in several)
    return network if plain or not flat else Positional(network, ())


def flatten_tensors(outputs: object) -> list[Tensor]:
    """The tensors of nested outputs, in their order; those that are None are left out.

    Args:
        outputs: a tensor, or a tuple, list or mapping of such, as `transformers` gives them.

    Raises:
        WorkloadError: something else is among them.
    """
    if outputs is None:
        return []
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for value in outputs for tensor in flatten_tensors(value)]
    raise WorkloadError(
        "The network's outputs hold something that is no tensor.",
        given=describe(outputs),
        allowed="tensors, and tuples, lists and mappings of them",
        advice="for a transformers network that gives a cache: network.config.use_cache = False",
    )


def other_sizes(
    network: nn.Module, inputs: tuple[Tensor, ...], axes: Sequence[Axes]
) -> tuple[Tensor, ...] | None:
    """Inputs of another size along the open axes that the network takes; None if there is none.

    Args:
        inputs: at most a few samples are taken of them.
    """
    few = tuple(tensor[:_FEW] for tensor in inputs)
    for factor in _FACTORS if axes else ():
        other = resized(few, axes, factor)
        if other is None:
            continue
        try:
            with torch.no_grad():
                network(*other)
        except Exception:
            # A size that the network cannot have: it may need multiples, or allow no more.
            continue
        return other
    return None


def _forward(network: nn.Module, names: tuple[str, ...]) -> Callable[..., Any]:
    """A forward function whose signature names the inputs: exported files have these names."""

    def forward(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        named = dict(zip(names, tensors, strict=True)) if names else {}
        flat = tuple(flatten_tensors(network(**named) if names else network(*tensors)))
        return flat[0] if len(flat) == 1 else flat

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    own = signature if names else inspect.signature(network.forward)
    forward.__signature__ = own  # type: ignore[attr-defined]
    return forward
