"""The bank: what is solved once per layer and shared by every candidate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import cast, final

from torch import Tensor, nn

from autocompress.bank.statistics import collect_statistics
from autocompress.bank.store import VariantStore, make_key, network_hash, tensors_hash
from autocompress.config import CalibrationSettings
from autocompress.graph import ChannelGroup, NetworkGraph
from autocompress.graph.groups import dense_consumers
from autocompress.plan import Decision
from autocompress.techniques.reconstruction import refit
from autocompress.techniques.technique import (
    GroupProblem,
    GroupTechnique,
    LayerProblem,
    LayerStatistics,
    LayerTechnique,
    Variant,
)

_STATISTICS = "statistics"
# Counted up whenever a solver changes, so that no run goes on with what an older one solved.
_SOLVERS = 1


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
        key = self._key(_STATISTICS)
        stored = self._store.get(key)
        if stored is None:
            found = collect_statistics(
                self.network, self.graph.layers, inputs, settings.rows_per_layer, advance
            )
            stored = {f"{name}|moment": s.moment for name, s in found.items()}
            stored |= {f"{name}|mean": s.mean for name, s in found.items()}
            self._store.put(key, stored, lasting=True)
        names = {key.rpartition("|")[0] for key in stored}
        self._statistics = {
            n: LayerStatistics(stored[f"{n}|moment"], stored[f"{n}|mean"]) for n in names
        }

    def statistics(self, layer: str) -> LayerStatistics | None:
        """Input moments of a layer; None for grouped convolutions."""
        return self._statistics.get(layer)

    def problem(self, layer: str) -> LayerProblem:
        """The problem of an unchanged layer."""
        module = self.network.get_submodule(layer)
        weight = cast(Tensor, module.weight).detach()
        bias = cast("Tensor | None", module.bias)
        return LayerProblem(
            layer=self.graph.layer(layer),
            weight=weight.reshape(weight.shape[0], -1),
            bias=None if bias is None else bias.detach(),
            statistics=self.statistics(layer),
            free_bias=self.has_free_bias(layer),
            multiple=self.multiple,
        )

    def has_free_bias(self, layer: str) -> bool:
        """Whether a constant shift of the layer's output is absorbed by a bias or batch norm."""
        module = self.network.get_submodule(layer)
        return module.bias is not None or layer in self.graph.norms

    def order(self, group: ChannelGroup, technique: GroupTechnique) -> Tensor:
        """The group's channels in the order of removal, shape (size,), int64."""

        def solve() -> Variant:
            consumers = tuple(
                (self.problem(member.module), member)
                for member in dense_consumers(self.network, group)
            )
            return {"order": technique.order(GroupProblem(group, consumers))}

        return self._cached(self._key(technique.name, group.name), solve, lasting=True)["order"]

    def refit(self, layer: str, keep: tuple[int, ...], *, lasting: bool) -> Variant:
        """`weight` (out, kept columns) and `shift` (out,) of a layer that lost input columns."""

        def solve() -> Variant:
            weight, shift = refit(self.problem(layer), keep)
            return {"weight": weight, "shift": shift}

        return self._cached(self._key("refit", layer, keep), solve, lasting=lasting)

    def solve(
        self, technique: LayerTechnique, decision: Decision, problem: LayerProblem, context: str
    ) -> Variant:
        """A technique's solved tensors.

        Args:
            context: what an earlier stage did to the layer; empty for the original layer, whose
                variants are kept on disk.
        """
        fields = decision.model_dump(mode="json", exclude=set(technique.levels))
        key = self._key(technique.name, problem.layer.name, fields, context)
        return self._cached(key, lambda: technique.solve(problem, decision), lasting=not context)

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
