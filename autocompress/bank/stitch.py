"""A candidate network put together from the bank, in milliseconds and without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from torch import Tensor, nn

from autocompress.bank.bank import Bank
from autocompress.bank.store import make_key
from autocompress.errors import PlanError
from autocompress.graph.groups import (
    Removal,
    Side,
    dense_consumers,
    kept_size,
    remove_channels,
    removed_sides,
)
from autocompress.graph.layers import LAYER_TYPES, NORM_TYPES
from autocompress.plan import Decision, Plan
from autocompress.techniques import TECHNIQUES
from autocompress.techniques.technique import (
    GroupTechnique,
    LayerProblem,
    LayerTechnique,
    Stage,
)


@final
@dataclass(frozen=True)
class Stitched:
    """A candidate network in evaluation mode, its batch norms still those of the original.

    Attributes:
        kept_channels: for every batch norm that lost channels, the original numbers of those
            that it kept.
    """

    network: nn.Module
    kept_channels: Mapping[str, tuple[int, ...]]


def stitch(bank: Bank, plan: Plan) -> Stitched:
    """Put the network together that a plan describes; the original is not changed.

    Raises:
        PlanError: the plan names a layer or group that the network does not have.
    """
    network = bank.copy_network()
    removals: list[Removal] = []
    for technique in TECHNIQUES:
        if isinstance(technique, GroupTechnique):
            removals += _removals(bank, technique, plan.of(technique.name))
    sides = removed_sides(removals)
    _prune(bank, network, removals)
    for stage in (Stage.DECOMPOSE, Stage.QUANTIZE):
        for technique in TECHNIQUES:
            if isinstance(technique, LayerTechnique) and technique.stage is stage:
                for target, decision in plan.of(technique.name).items():
                    _apply(bank, network, technique, (target, decision), sides)
    return Stitched(network.eval(), _kept_norm_channels(bank.network, sides))


def _kept_norm_channels(
    network: nn.Module, sides: Mapping[tuple[str, Side], list[int]]
) -> dict[str, tuple[int, ...]]:
    kept = {}
    for (name, _), removed in sides.items():
        module = network.get_submodule(name)
        if isinstance(module, NORM_TYPES):
            kept[name] = tuple(_complement(module.num_features, removed))
    return kept


def _removals(
    bank: Bank, technique: GroupTechnique, decisions: Mapping[str, Decision]
) -> list[Removal]:
    groups = {group.name: group for group in bank.graph.groups}
    removals: list[Removal] = []
    for target, decision in decisions.items():
        group = groups.get(target)
        if group is None or not group.prunable:
            raise PlanError(
                f"Channel group '{target}' cannot be pruned.",
                given=group.reason if group else "no such group",
                allowed=", ".join(g.name for g in groups.values() if g.prunable),
            )
        ratio = cast(float, decision.model_dump()["pruning_ratio"])
        gone = group.size - kept_size(group.size, ratio, bank.multiple)
        if gone:
            removals.append((group, sorted(bank.order(group, technique)[:gone].tolist())))
    return removals


def _prune(bank: Bank, network: nn.Module, removals: Sequence[Removal]) -> None:
    """Remove channels; the layers that read them get their refitted weights."""
    sides = removed_sides(removals)
    remove_channels(network, removals)
    readers = [m.module for group, _ in removals for m in dense_consumers(bank.network, group)]
    for name in dict.fromkeys(readers):
        module = network.get_submodule(name)
        layer = bank.graph.layer(name)
        columns = kept_columns(bank, name, sides)
        # Weights that depend on one group alone come up again and again: they are kept on disk.
        fitted = bank.refit(name, columns, lasting=readers.count(name) == 1)
        rows = _complement(layer.out_channels, sides.get((name, "out"), []))
        weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
        with torch.no_grad():
            weight.copy_(fitted["weight"][rows].reshape(weight.shape))
            if bias is not None:
                bias.add_(fitted["shift"][rows])


def kept_columns(
    bank: Bank, layer: str, sides: Mapping[tuple[str, Side], list[int]]
) -> tuple[int, ...]:
    """Columns of a layer's unfolded weight that stay after its input channels were removed."""
    known = bank.graph.layer(layer)
    width = known.columns_per_channel
    channels = _complement(known.in_channels // known.groups, sides.get((layer, "in"), []))
    return tuple(c * width + i for c in channels for i in range(width))


def _complement(size: int, removed: Sequence[int]) -> list[int]:
    gone = set(removed)
    return [i for i in range(size) if i not in gone]


def _apply(
    bank: Bank,
    network: nn.Module,
    technique: LayerTechnique,
    step: tuple[str, Decision],
    sides: Mapping[tuple[str, Side], list[int]],
) -> None:
    target, decision = step
    if target not in {layer.name for layer in bank.graph.layers}:
        raise PlanError(
            f"The network has no layer '{target}'.",
            given=f"{technique.name} of {target}",
            allowed=", ".join(layer.name for layer in bank.graph.layers),
        )
    module = network.get_submodule(target)
    cut = [sides.get((target, "in"), []), sides.get((target, "out"), [])]
    if isinstance(module, LAYER_TYPES):
        context = make_key(cut) if any(cut) else ""
        problem = _current_problem(bank, target, module, sides)
        variant = bank.solve(technique, decision, problem, context)
        network.set_submodule(target, technique.install(module, variant, decision, bank.multiple))
        return
    for index, part in enumerate(cast(nn.Sequential, module)):
        weight = cast(Tensor, part.weight).detach()
        shape = tuple(weight.shape)
        problem = replace(
            _current_problem(bank, target, part, sides),
            statistics=None,
            layer=replace(
                bank.graph.layer(target), in_channels=shape[1], out_channels=shape[0],
                kernel_size=shape[2:],
            ),
        )  # fmt: skip
        variant = bank.solve(technique, decision, problem, make_key(cut, index, shape))
        installed = technique.install(part, variant, decision, bank.multiple)
        network.set_submodule(f"{target}.{index}", installed)


def _current_problem(
    bank: Bank, name: str, module: nn.Module, sides: Mapping[tuple[str, Side], list[int]]
) -> LayerProblem:
    """The problem of a layer as it stands after pruning."""
    original = bank.graph.layer(name)
    weight = cast(Tensor, module.weight).detach()
    bias = cast("Tensor | None", module.bias)
    statistics = bank.statistics(name)
    if statistics is not None and sides.get((name, "in")):
        statistics = statistics.select(kept_columns(bank, name, sides))
    out_channels, in_channels = weight.shape[0], weight.shape[1] * original.groups
    if original.groups > 1:
        in_channels = out_channels
    return LayerProblem(
        layer=replace(
            original,
            in_channels=in_channels,
            out_channels=out_channels,
            groups=original.groups if original.groups == 1 else out_channels,
        ),
        weight=weight.reshape(out_channels, -1),
        bias=None if bias is None else bias.detach(),
        statistics=statistics,
        free_bias=bank.has_free_bias(name),
        multiple=bank.multiple,
    )
