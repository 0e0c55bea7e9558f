"""One decision at a time: modules that take a layer's place and keep the shapes of everything.

A removed channel is a column of zeros in the layers that read it, and layer norms pass it over, so
that the changed network runs beside the original one in the same batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.bank.bank import Bank
from autocompress.bank.stitch import block_of, channels_to_remove, kept_columns
from autocompress.graph.blocks import PassThrough
from autocompress.graph.groups import dense_consumers, removed_sides
from autocompress.graph.norms import fold_batch_norm
from autocompress.plan import Decision
from autocompress.techniques import BlockTechnique, GroupTechnique, LayerTechnique, technique_of


def changed_layers(bank: Bank, target: str, decision: Decision) -> Mapping[str, nn.Module]:
    """The modules that a decision changes, by their names; the network is left as it is.

    Args:
        target: a channel group for techniques that remove channels, a block for those that take it
            out, else a layer.

    Raises:
        PlanError: there is no such target, or it can't be pruned.
    """
    technique = technique_of(decision)
    if isinstance(technique, BlockTechnique):
        block = block_of(bank, target)
        drops = decision != technique.identity
        return {target: PassThrough(bank.network.get_submodule(target), block)} if drops else {}
    if isinstance(technique, GroupTechnique):
        return _readers(bank, technique, target, decision)
    assert isinstance(technique, LayerTechnique)
    return {target: _layer(bank, technique, target, decision)}


def _readers(
    bank: Bank, technique: GroupTechnique, target: str, decision: Decision
) -> dict[str, nn.Module]:
    removal = channels_to_remove(bank, technique, target, decision)
    if removal is None:
        return {}
    group, _ = removal
    sides = removed_sides([removal])
    changed: dict[str, nn.Module] = {}
    for name in dict.fromkeys(m.module for m in dense_consumers(bank.network, group)):
        module = copy.deepcopy(bank.network.get_submodule(name))
        weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
        columns = kept_columns(bank, name, sides)
        rows = weight.detach().reshape(len(weight), -1)
        kept, shift = rows[:, list(columns)], torch.zeros(len(rows))
        if decision.model_dump()["refit"]:
            fitted = bank.refit(name, columns, lasting=True)
            kept, shift = fitted["weight"], fitted["shift"]
        with torch.no_grad():
            sparse = torch.zeros_like(rows)
            sparse[:, list(columns)] = kept
            weight.copy_(sparse.reshape(weight.shape))
            if bias is not None:
                bias.add_(shift)
        changed[name] = module
    for (name, _), removed in sides.items():
        norm = bank.network.get_submodule(name)
        if isinstance(norm, nn.LayerNorm):
            changed[name] = _NarrowNorm(norm, removed).eval()
    return changed


def _layer(bank: Bank, technique: LayerTechnique, target: str, decision: Decision) -> nn.Module:
    folds = technique.folds_norm(decision) and target in bank.graph.norms
    if not folds:
        variant = bank.solve_unchanged(technique, decision, target)
        module = copy.deepcopy(bank.network.get_submodule(target))
        return technique.install(module, variant, decision, bank.multiple).eval()
    network = bank.copy_network()
    norm = cast(nn.BatchNorm2d, network.get_submodule(bank.graph.norms[target]))
    unfold = _Unfold(norm)
    fold_batch_norm(network, bank.graph.norms, target)
    module = network.get_submodule(target)
    problem = bank.folded_problem(target, module, gradients=technique.uses_gradients(decision))
    variant = technique.solve(problem, decision)
    return nn.Sequential(technique.install(module, variant, decision, bank.multiple), unfold).eval()


@final
class _NarrowNorm(nn.Module):
    """A layer norm that removed channels have no part in; they become zero."""

    def __init__(self, norm: nn.LayerNorm, removed: Sequence[int]) -> None:
        super().__init__()
        gone = set(removed)
        kept = [i for i in range(norm.normalized_shape[-1]) if i not in gone]
        self._shape, self._eps = (*norm.normalized_shape[:-1], len(kept)), norm.eps
        self.register_buffer("kept", torch.tensor(kept))
        for name in ("weight", "bias"):
            value = cast("Tensor | None", getattr(norm, name))
            self.register_buffer(name, None if value is None else value.detach()[..., kept])

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., channels)."""
        kept = cast(Tensor, self.kept)
        weight, bias = (cast("Tensor | None", value) for value in (self.weight, self.bias))
        normed = F.layer_norm(x[..., kept], self._shape, weight, bias, self._eps)
        return torch.zeros_like(x).index_copy(-1, kept, normed.to(x))


@final
class _Unfold(nn.Module):
    """Undoes a batch norm, so that the one that follows gives a folded layer's output."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        factor = torch.rsqrt(variance + norm.eps)
        shift = -mean * factor
        if norm.affine:
            factor = factor * norm.weight.detach()
            shift = shift * norm.weight.detach() + norm.bias.detach()
        # A channel that the norm makes constant stays constant whatever comes in.
        self.register_buffer("factor", torch.where(factor == 0, torch.ones_like(factor), factor))
        self.register_buffer("shift", shift.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Shape (n, channels, ...)."""
        spread = (1, -1, *(1 for _ in x.shape[2:]))
        factor, shift = cast(Tensor, self.factor), cast(Tensor, self.shift)
        return (x - shift.reshape(spread)) / factor.reshape(spread)
