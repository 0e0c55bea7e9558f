"""Distillation of intermediate maps, through adapters where channel counts differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.errors import PlanError
from autocompress.graph.layers import flatten_outputs
from autocompress.recover.distillation import ResponseTerm, label_term, relative_error
from autocompress.recover.schedule import derived_seed
from autocompress.recover.teacher import Teacher
from autocompress.recover.training_types import Batch, Inputs

_MAPS = 3


@final
@dataclass(frozen=True)
class FeatureMap:
    """An intermediate map that network and teacher have in common.

    Attributes:
        name: of the module whose output it is, the same in both networks.
        axis: of the channels.
        channels: of the network.
        teacher_channels: of the teacher.
    """

    name: str
    axis: int
    channels: int
    teacher_channels: int


def find_maps(
    network: nn.Module, teacher: nn.Module, inputs: Inputs, count: int = _MAPS
) -> tuple[FeatureMap, ...]:
    """A few maps, evenly spaced in the order of computation: ends of stages, blocks or layers.

    Of the outermost modules first, down to where there are enough; layers only where blocks are
    too few.

    Modules count that both networks call once, and whose outputs have equal shapes but for the
    channels. The outputs of the whole network are left out: they are the response.

    Args:
        network: in evaluation mode, as is the teacher; neither is changed.
        inputs: a small batch.

    Raises:
        PlanError: there is no such module.
    """
    maps = _common_maps(network, teacher, inputs)
    if not maps:
        raise PlanError(
            "No intermediate map of the compressed network matches one of the original's.",
            allowed="modules of the same name whose outputs differ in their channels only",
            advice="recover by method 'response'",
        )
    offered = _outer_blocks(maps, teacher, count)
    count = min(count, len(offered))
    return tuple(offered[round((i + 1) * len(offered) / count) - 1] for i in range(count))


@final
class Adapters(nn.Module):
    """One linear map over the channels (a 1 x 1 convolution) for every map that needs it.

    Romero et al. 2015 (FitNets), eq. 3. First weights are drawn from the seed.
    """

    def __init__(self, maps: Sequence[FeatureMap], seed: int) -> None:
        super().__init__()
        self._maps = tuple(maps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "adapters"))
            self.layers = nn.ModuleList(
                nn.Identity()
                if m.channels == m.teacher_channels
                else nn.Linear(m.channels, m.teacher_channels)
                for m in self._maps
            )

    def forward(self, found: Sequence[Tensor]) -> list[Tensor]:
        """The network's maps with as many channels as the teacher's, in the order of the maps."""
        return [
            _adapted(layer, x, m.axis)
            for layer, x, m in zip(self.layers, found, self._maps, strict=True)
        ]


@final
@dataclass(frozen=True)
class FeatureLoss:
    """The relative squared errors of the maps, plus the response's loss, plus `alpha` times labels.

    Each map's mean squared error is taken as a share of the teacher's mean square, so that maps
    of large numbers do not outweigh the others.

    Attributes:
        extra: as many adapters as maps; of no use after the training.
        response: None leaves the response out.
        alpha: as in `ResponseLoss`.
    """

    teacher: Teacher
    maps: tuple[FeatureMap, ...]
    extra: Adapters
    response: ResponseTerm | None = None
    class_scores: bool = True
    alpha: float = 1.0

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """The loss on a batch; a scalar."""
        names = [m.name for m in self.maps]
        with captured(network, names) as mine:
            outputs = flatten_outputs(network(*batch.inputs))
        with captured(self.teacher.network, names) as wanted:
            teacher_outputs = self.teacher.run(batch.inputs)
        adapted = self.extra([mine[name] for name in names])
        errors = [relative_error(x, wanted[n]) for x, n in zip(adapted, names, strict=True)]
        loss = torch.stack(errors).mean()
        if self.response is not None:
            loss = loss + self.response(outputs, teacher_outputs)
        return loss + label_term(outputs[0], batch.targets, self.alpha, self.class_scores)


@contextmanager
def captured(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that gets the outputs of the named modules as the network runs."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    handles = [network.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _observe(network: nn.Module, inputs: Inputs) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Maps of modules that are called once, in the order of completion, and the outputs."""
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1:
                found[name] = output

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in network.named_modules() if n]
    try:
        with torch.no_grad():
            outputs = flatten_outputs(network(*inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {name: tensor for name, tensor in found.items() if calls[name] == 1}, outputs


def _common_maps(network: nn.Module, teacher: nn.Module, inputs: Inputs) -> list[FeatureMap]:
    mine, own_responses = _observe(network, inputs)
    wanted, responses = _observe(teacher, inputs)
    responses += own_responses
    outermost: dict[int, str] = {}
    for name, tensor in wanted.items():
        # The end of a stage is the end of its last block too: one name for it is enough.
        known = outermost.get(id(tensor))
        if known is None or name.count(".") < known.count("."):
            outermost[id(tensor)] = name
    return [
        found
        for name, tensor in wanted.items()
        if outermost[id(tensor)] == name
        if all(r is not tensor and r is not mine.get(name) for r in responses)
        if (found := _match(name, mine.get(name), tensor)) is not None
    ]


def _outer_blocks(
    maps: Sequence[FeatureMap], teacher: nn.Module, count: int
) -> Sequence[FeatureMap]:
    """The blocks that are least deep in the network, as long as they are enough; else all maps."""
    blocks = [m for m in maps if any(True for _ in teacher.get_submodule(m.name).children())]
    depths = sorted({m.name.count(".") for m in blocks})
    for depth in depths:
        outer = [m for m in blocks if m.name.count(".") <= depth]
        if len(outer) >= count:
            return outer
    return maps


def _match(name: str, mine: Tensor | None, wanted: Tensor) -> FeatureMap | None:
    if mine is None or mine.ndim != wanted.ndim:
        return None
    differing = [i for i in range(mine.ndim) if mine.shape[i] != wanted.shape[i]]
    axis = differing[0] if differing else 1
    if len(differing) > 1 or axis not in (1, mine.ndim - 1):
        return None
    return FeatureMap(name, axis, mine.shape[axis], wanted.shape[axis])


def _adapted(layer: nn.Module, x: Tensor, axis: int) -> Tensor:
    if not isinstance(layer, nn.Linear):
        return x
    if axis == x.ndim - 1:
        return F.linear(x, layer.weight, layer.bias)
    mixed = layer.weight @ x.flatten(2) + layer.bias[:, None]
    return mixed.reshape(*mixed.shape[:2], *x.shape[2:])
