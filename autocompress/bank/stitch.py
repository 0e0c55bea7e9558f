"""A candidate network put together from the bank, in milliseconds and without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast, final

import torch
from torch import Tensor, nn

from autocompress.bank.bank import Bank
from autocompress.bank.parts import part_layer, part_statistics
from autocompress.bank.store import make_key, tensors_hash
from autocompress.errors import PlanError
from autocompress.graph import Block, ChannelGroup
from autocompress.graph.blocks import drop_blocks, dropped_blocks, is_within
from autocompress.graph.groups import (
    Removal,
    Side,
    dense_consumers,
    kept_size,
    remove_channels,
    removed_sides,
)
from autocompress.graph.layers import NORM_TYPES
from autocompress.graph.norms import fold_batch_norm
from autocompress.plan import Decision, Plan
from autocompress.techniques import TECHNIQUES, dropped_by, pruning_ratio_of
from autocompress.techniques.equalize import equalized
from autocompress.techniques.technique import (
    BlockTechnique,
    GroupTechnique,
    LayerProblem,
    LayerTechnique,
    Stage,
    bias_of,
    unfolded,
)


@final
@dataclass(frozen=True)
class Stitched:
    """A candidate network in evaluation mode, its batch norms still those of the original.

    Attributes:
        kept_channels: for every batch norm that lost channels, the original numbers of those
            that it kept.
        removed: indices that were removed, by module and side.
    """

    network: nn.Module
    kept_channels: Mapping[str, tuple[int, ...]]
    removed: Mapping[tuple[str, Side], list[int]]


def stitch(bank: Bank, plan: Plan) -> Stitched:
    """Put the network together that a plan describes, up to its training; no quantization yet.

    The original is not changed. Channel groups that run through a block that is taken out lose
    their channels everywhere else.

    Raises:
        PlanError: the plan names a layer, group or block that the network does not have, or decides
            two things of the same stage for one.
    """
    check_stages(bank, plan)
    network = bank.copy_network()
    gone = dropped_by(plan)
    drop_blocks(network, [b for b in bank.graph.blocks if b.name in gone])
    removals: list[Removal] = []
    refitted: list[ChannelGroup] = []
    for technique in TECHNIQUES:
        if isinstance(technique, GroupTechnique):
            for target, decision in plan.of(technique.name).items():
                removal = channels_to_remove(bank, technique, target, decision)
                if removal is not None:
                    removals.append(removal)
                    if decision.model_dump()["refit"]:
                        refitted.append(removal[0])
    sides = removed_sides(removals)
    remove_channels(network, removals)
    _refit_readers(bank, network, refitted, sides)
    stitched = Stitched(network.eval(), _kept_norm_channels(bank.network, sides), sides)
    for stage in (Stage.DECOMPOSE, Stage.SPARSIFY):
        apply_stage(bank, stitched, plan, stage)
    return stitched


def apply_stage(bank: Bank, stitched: Stitched, plan: Plan, stage: Stage) -> None:
    """Do to a stitched network, in place, what a plan's layer techniques of one stage do.

    The layers may have been trained since: what is solved depends on their present weights.
    """
    gone = dropped_blocks(stitched.network)
    for technique in TECHNIQUES:
        if isinstance(technique, LayerTechnique) and technique.stage is stage:
            for target, decision in plan.of(technique.name).items():
                if not is_within(target, gone):
                    _apply(bank, stitched, technique, (target, decision))
    stitched.network.eval()


def check_stages(bank: Bank, plan: Plan) -> None:
    """Check that a plan decides for layers and blocks that there are, one thing for each stage.

    Raises:
        PlanError: it does not.
    """
    for technique in TECHNIQUES:
        if isinstance(technique, BlockTechnique):
            for target in plan.of(technique.name):
                block_of(bank, target)
    known = [layer.name for layer in bank.graph.layers if layer.compressible]
    decided: dict[tuple[str, Stage], str] = {}
    for technique in TECHNIQUES:
        if not isinstance(technique, LayerTechnique):
            continue
        for target in plan.of(technique.name):
            if target not in known:
                raise PlanError(
                    f"The network has no layer '{target}' that may be changed.",
                    given=f"{technique.name} of {target}",
                    allowed=", ".join(known),
                )
            other = decided.setdefault((target, technique.stage), technique.name)
            if other != technique.name:
                raise PlanError(
                    "A plan decides two things of the same stage for one layer.",
                    given=f"{other} and {technique.name} of {target}",
                    allowed="one of them",
                )


def block_of(bank: Bank, target: str) -> Block:
    """The block of that name.

    Raises:
        PlanError: there is none.
    """
    for block in bank.graph.blocks:
        if block.name == target:
            return block
    raise PlanError(
        f"The network has no block '{target}' that may be taken out.",
        given=target,
        allowed=", ".join(block.name for block in bank.graph.blocks) or "none",
    )


def _kept_norm_channels(
    network: nn.Module, sides: Mapping[tuple[str, Side], list[int]]
) -> dict[str, tuple[int, ...]]:
    kept = {}
    for (name, _), removed in sides.items():
        module = network.get_submodule(name)
        if isinstance(module, NORM_TYPES):
            kept[name] = tuple(_complement(module.num_features, removed))
    return kept


def channels_to_remove(
    bank: Bank, technique: GroupTechnique, target: str, decision: Decision
) -> Removal | None:
    """The group and its channels that a decision removes; None if it removes none.

    Raises:
        PlanError: there is no such group, or it can't be pruned.
    """
    groups = {group.name: group for group in bank.graph.groups}
    group = groups.get(target)
    if group is None or not group.prunable:
        raise PlanError(
            f"Channel group '{target}' cannot be pruned.",
            given=group.reason if group else "no such group",
            allowed=", ".join(g.name for g in groups.values() if g.prunable),
        )
    gone = group.size - kept_size(group.size, pruning_ratio_of(decision), group.step(bank.multiple))
    if not gone:
        return None
    return group, sorted(bank.order(group, technique, decision)[:gone].tolist())


def _refit_readers(
    bank: Bank,
    network: nn.Module,
    refitted: Sequence[ChannelGroup],
    sides: Mapping[tuple[str, Side], list[int]],
) -> None:
    """Give the layers that read refitted groups the weights that make up best for the loss."""
    gone = dropped_blocks(network)
    readers = [
        m.module
        for group in refitted
        for m in dense_consumers(bank.network, group)
        if not is_within(m.module, gone)
    ]
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
    bank: Bank, stitched: Stitched, technique: LayerTechnique, step: tuple[str, Decision]
) -> None:
    target, decision = step
    network = stitched.network
    if technique.folds_norm(decision):
        fold_batch_norm(network, bank.graph.norms, target)
    module = network.get_submodule(target)
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    for index, part in enumerate(parts):
        weight = unfolded(part)
        unchanged = module is part and torch.equal(
            weight, unfolded(bank.network.get_submodule(target))
        )
        context = "" if unchanged else _context(stitched, target, weight, parts[:index])
        place = (target, parts, index)
        problem = partial(_current_problem, bank, stitched, place, technique, decision)
        variant = bank.solve(technique, decision, target, problem, context)
        installed = technique.install(part, variant, decision, bank.multiple)
        network.set_submodule(target if module is part else f"{target}.{index}", installed)


def _context(stitched: Stitched, layer: str, weight: Tensor, before: Sequence[nn.Module]) -> str:
    """What a solution depends on beside the original network and the decision.

    Args:
        weight: the layer's, or a part's, as it stands now.
        before: the parts whose outputs a part of a decomposed layer reads.
    """
    factor = getattr(before[0] if before else None, "input_factor", None)
    return make_key(
        tuple(weight.shape),
        tensors_hash((weight, *(unfolded(part) for part in before))),
        "" if factor is None else tensors_hash((factor,)),
        stitched.removed.get((layer, "in"), []),
    )


def _current_problem(
    bank: Bank,
    stitched: Stitched,
    place: tuple[str, list[nn.Module], int],
    technique: LayerTechnique,
    decision: Decision,
) -> LayerProblem:
    """The problem of a layer, or of a part of a decomposed one, as it stands now."""
    name, parts, index = place
    part = parts[index]
    gradients = bank.gradients(name) if technique.uses_gradients(decision) else None
    statistics = bank.statistics(name)
    rows = _complement(bank.graph.layer(name).out_channels, stitched.removed.get((name, "out"), []))
    if stitched.removed.get((name, "in")):
        columns = kept_columns(bank, name, stitched.removed)
        statistics = statistics.select(columns) if statistics else None
    else:
        columns = tuple(range(bank.graph.layer(name).in_features))
    if gradients is not None:
        gradients = gradients.select(rows, columns, bank.graph.layer(name).columns_per_channel)
    statistics, gradients = equalized(parts[0], bank.graph.layer(name), statistics, gradients)
    if len(parts) > 1:
        # A decomposition mixes channels: gradients of single weights are known no more.
        gradients = None
        layer = bank.graph.layer(name)
        statistics = statistics and part_statistics(layer, parts, index, statistics)
    bias, mask = bias_of(part), getattr(part, "weight_mask", None)
    return LayerProblem(
        layer=part_layer(bank.graph.layer(name), part),
        weight=unfolded(part),
        bias=None if bias is None else bias.detach(),
        statistics=statistics,
        free_bias=part is parts[-1] and bank.has_free_bias(name),
        multiple=bank.multiple,
        gradients=gradients,
        mask=mask.reshape(len(mask), -1) if isinstance(mask, Tensor) else None,
    )
