"""The bank: what is solved once per layer and shared by every candidate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import cast, final

from torch import Tensor, nn

from autocompress.bank.gradients import collect_gradients
from autocompress.bank.statistics import collect_statistics
from autocompress.bank.store import VariantStore, make_key, network_hash, tensors_hash
from autocompress.bank.usage import count_usage
from autocompress.config import CalibrationSettings
from autocompress.graph import ChannelGroup, Member, NetworkGraph
from autocompress.graph.groups import dense_consumers, dense_producers
from autocompress.plan import Decision
from autocompress.techniques.reconstruction import refit
from autocompress.techniques.technique import (
    GroupProblem,
    GroupTechnique,
    LayerGradients,
    LayerProblem,
    LayerStatistics,
    LayerTechnique,
    Variant,
    bias_of,
)

_STATISTICS = "statistics"
_STATISTICS_FIELDS = tuple(field.name for field in fields(LayerStatistics))
_GRADIENTS = "gradients"
_USAGE = "usage"
# Gradients cost a backward pass, and importance needs no more samples.
_GRADIENT_SAMPLES = 512
# Counted up whenever a solver changes, so that no run goes on with what an older one solved.
_SOLVERS = 4


@final
@dataclass(frozen=True)
class BankState:
    """What a bank has gathered and solved, to be used by another process."""

    identity: str
    statistics: Mapping[str, LayerStatistics]
    usage: Mapping[str, Tensor]
    gradients: Mapping[str, LayerGradients] | None
    inputs: tuple[Tensor, ...]
    variants: Mapping[str, Variant]


@final
class Bank:
    """Calibration statistics and solved variants of one network, on disk in a folder.

    Args:
        network: in evaluation mode; not changed.
        graph: its structure.
        multiple: channel counts that the device rewards are multiples of this.
        folder: where variants are kept; those of another network or calibration are not read.
    """

    def __init__(
        self, network: nn.Module, graph: NetworkGraph, multiple: int, folder: Path
    ) -> None:
        self.network = network
        self.graph = graph
        self.multiple = multiple
        self._store = VariantStore(folder)
        self._identity = ""
        self._statistics: dict[str, LayerStatistics] = {}
        self._usage: dict[str, Tensor] = {}
        self._gradients: dict[str, LayerGradients] | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def calibrate(
        self,
        inputs: tuple[Tensor, ...],
        settings: CalibrationSettings,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Gather the statistics from calibration inputs, or read them if they are on disk."""
        inputs = tuple(x[: settings.statistics_samples] for x in inputs)
        self._identity = make_key(
            _SOLVERS, network_hash(self.network), tensors_hash(inputs), settings.rows_per_layer
        )
        self._inputs = tuple(x[:_GRADIENT_SAMPLES] for x in inputs)

        def solve() -> Variant:
            found = collect_statistics(
                self.network, self.graph.layers, inputs, settings.rows_per_layer, advance
            )
            return {
                f"{name}|{field}": getattr(statistics, field)
                for name, statistics in found.items()
                for field in _STATISTICS_FIELDS
            }

        stored = self._cached(self._key(_STATISTICS), solve, lasting=True)
        self._statistics = {
            name: LayerStatistics(*(stored[f"{name}|{field}"] for field in _STATISTICS_FIELDS))
            for name in {key.rpartition("|")[0] for key in stored}
        }
        if any(layer.kind == "embedding" for layer in self.graph.layers):
            self._usage = dict(self._cached(self._key(_USAGE), self._count, lasting=True))

    def _count(self) -> Variant:
        return count_usage(self.network, self.graph.layers, self._inputs)

    def state(self) -> BankState:
        """What was gathered and solved so far."""
        return BankState(
            self._identity,
            self._statistics,
            self._usage,
            self._gradients,
            self._inputs,
            self._store.held(),
        )

    def take(self, state: BankState) -> None:
        """Go on with what a bank of the same network has gathered and solved."""
        self._identity, self._inputs = state.identity, state.inputs
        self._statistics, self._usage = dict(state.statistics), dict(state.usage)
        self._gradients = None if state.gradients is None else dict(state.gradients)
        for key, variant in state.variants.items():
            self._store.put(key, variant, lasting=False)

    def statistics(self, layer: str) -> LayerStatistics | None:
        """Input moments of a layer; None for grouped convolutions."""
        return self._statistics.get(layer)

    def gradients(self, layer: str) -> LayerGradients | None:
        """Squared gradients of a layer, taken on first use; None for grouped convolutions."""
        if self._gradients is None:

            def solve() -> Variant:
                found = collect_gradients(self.network, self.graph.layers, self._inputs)
                return {f"{n}|fisher": g.fisher for n, g in found.items()} | {
                    f"{n}|taylor": g.taylor for n, g in found.items()
                }

            stored = self._cached(self._key(_GRADIENTS), solve, lasting=True)
            self._gradients = {
                name: LayerGradients(stored[f"{name}|fisher"], stored[f"{name}|taylor"])
                for name in {key.rpartition("|")[0] for key in stored}
            }
        return self._gradients.get(layer)

    def problem(self, layer: str, *, gradients: bool = False) -> LayerProblem:
        """The problem of an unchanged layer."""
        return self.folded_problem(layer, self.network.get_submodule(layer), gradients=gradients)

    def folded_problem(
        self, layer: str, module: nn.Module, *, gradients: bool = False
    ) -> LayerProblem:
        """The problem of a layer as a module has it, whose batch norm may be part of it."""
        weight = cast(Tensor, module.weight).detach()
        bias = bias_of(module)
        return LayerProblem(
            layer=self.graph.layer(layer),
            weight=weight.reshape(weight.shape[0], -1),
            bias=None if bias is None else bias.detach(),
            statistics=self.statistics(layer),
            free_bias=self.has_free_bias(layer),
            multiple=self.multiple,
            gradients=self.gradients(layer) if gradients else None,
            usage=self._usage.get(layer),
        )

    def has_free_bias(self, layer: str) -> bool:
        """Whether a constant shift of the layer's output is absorbed by a bias or batch norm."""
        module = self.network.get_submodule(layer)
        return bias_of(module) is not None or layer in self.graph.norms

    def order(self, group: ChannelGroup, technique: GroupTechnique, decision: Decision) -> Tensor:
        """The group's channels in the order of removal, shape (size,), int64."""
        gradients = technique.uses_gradients(decision)

        def problems(members: tuple[Member, ...]) -> tuple[tuple[LayerProblem, Member], ...]:
            return tuple((self.problem(m.module, gradients=gradients), m) for m in members)

        def solve() -> Variant:
            problem = GroupProblem(
                group,
                problems(dense_producers(self.network, group)),
                problems(dense_consumers(self.network, group)),
            )
            return {"order": technique.order(problem, decision)}

        values = decision.model_dump(mode="json", exclude=set(technique.levels))
        key = self._key(technique.name, group.name, values)
        return self._cached(key, solve, lasting=True)["order"]

    def refit(self, layer: str, keep: tuple[int, ...], *, lasting: bool) -> Variant:
        """`weight` (out, kept columns) and `shift` (out,) of a layer that lost input columns."""

        def solve() -> Variant:
            weight, shift = refit(self.problem(layer), keep)
            return {"weight": weight, "shift": shift}

        return self._cached(self._key("refit", layer, keep), solve, lasting=lasting)

    def solve(
        self,
        technique: LayerTechnique,
        decision: Decision,
        layer: str,
        problem: Callable[[], LayerProblem],
        context: str,
    ) -> Variant:
        """A technique's solved tensors for a layer.

        Args:
            problem: gives the layer's problem; only called if it was not solved before.
            context: what earlier stages made of the layer; empty for the original layer, whose
                variants are kept on disk.
        """
        ignored = technique.levels if technique.shares_solve(decision) else ()
        values = decision.model_dump(mode="json", exclude=set(ignored))
        key = self._key(technique.name, layer, values, context)
        return self._cached(key, lambda: technique.solve(problem(), decision), lasting=not context)

    def solve_unchanged(self, technique: LayerTechnique, decision: Decision, layer: str) -> Variant:
        """A technique's solved tensors for a layer of the original network."""
        gradients = technique.uses_gradients(decision)
        problem = partial(self.problem, layer, gradients=gradients)
        return self.solve(technique, decision, layer, problem, "")

    def copy_network(self) -> nn.Module:
        """A copy of the original network that may be changed."""
        return copy.deepcopy(self.network)

    def _key(self, *parts: object) -> str:
        return make_key(self._identity, self.multiple, *parts)

    def _cached(self, key: str, solve: Callable[[], Variant], *, lasting: bool) -> Variant:
        variant = self._store.get(key)
        if variant is None:
            variant = solve()
            self._store.put(key, variant, lasting=lasting)
        return variant
