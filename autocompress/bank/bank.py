"""The bank: what is solved once per layer and shared by every candidate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast, final

from torch import Tensor, nn

from autocompress.bank.observations import Counter, Observations, Observed
from autocompress.bank.statistics import Gathering
from autocompress.bank.store import VariantStore, make_key, network_hash, tensors_hash
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
from autocompress.workload import NO_PADDING, Padding

# Of Gram matrices that are summed up together (1.5 GiB): those of BERT-base need one pass over the
# data then, and with all else that a search holds of a network like that stay far below 8 GB.
_MEMORY_BYTES = 3 << 29
# Counted up whenever a solver changes, so that no run goes on with what an older one solved.
_SOLVERS = 4
_UNCOUNTED = Counter()


@final
@dataclass(frozen=True)
class BankState:
    """What a bank has gathered and solved, to be used by another process."""

    identity: str
    observed: Observed
    variants: Mapping[str, Variant]


@final
class Bank:
    """Calibration statistics and solved variants of one network, on disk in a folder.

    Args:
        network: in evaluation mode; not changed.
        graph: its structure.
        multiple: channel counts that the device rewards are multiples of this.
        folder: where statistics and variants are kept; those of another network or calibration are
            not read.
        memory_bytes: of the sums that are gathered in one pass over the data; a third as many are
            held of what is in the folder. No figure depends on it.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: NetworkGraph,
        multiple: int,
        folder: Path,
        *,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        self.network = network
        self.graph = graph
        self.multiple = multiple
        self._store = VariantStore(folder, memory_bytes // 3)
        self._memory_bytes = memory_bytes
        self._identity = ""
        self._observations: Observations | None = None

    def calibrate(
        self,
        inputs: tuple[Tensor, ...],
        settings: CalibrationSettings,
        counter: Counter = _UNCOUNTED,
        padding: Padding = NO_PADDING,
    ) -> None:
        """Gather the statistics from calibration inputs, as far as they are not on disk.

        Args:
            padding: of the inputs, which is left out.
        """
        inputs = tuple(x[: settings.statistics_samples] for x in inputs)
        self._identity = make_key(
            _SOLVERS, network_hash(self.network), tensors_hash(inputs), settings.rows_per_layer,
            *padding.key,
        )  # fmt: skip
        self._observations = self._observing(inputs, settings.rows_per_layer, padding)
        self._observations.gather(counter)

    def gather_gradients(self, counter: Counter = _UNCOUNTED) -> None:
        """Gather the gradients of a calibrated bank, unless they are on disk.

        Raises:
            WorkloadError: the network cannot be differentiated.
        """
        assert self._observations is not None
        self._observations.gather_gradients(counter)

    def _observing(self, inputs: tuple[Tensor, ...], rows: int, padding: Padding) -> Observations:
        gathering = Gathering(self.network, self.graph.layers, inputs, rows, padding)
        return Observations(gathering, self._store, self._key, self._memory_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of the statistics and variants that are in memory."""
        return self._store.held_bytes

    def state(self) -> BankState:
        """What a calibrated bank has gathered and solved; all layers' statistics are in memory."""
        assert self._observations is not None
        return BankState(self._identity, self._observations.state(), self._store.held())

    def take(self, state: BankState) -> None:
        """Go on with what a bank of the same network has gathered and solved."""
        self._identity = state.identity
        observed = state.observed
        self._observations = self._observing(observed.inputs, observed.rows, observed.padding)
        self._observations.take(state.observed)
        for key, variant in state.variants.items():
            self._store.put(key, variant, lasting=False)

    def statistics(self, layer: str) -> LayerStatistics | None:
        """Input moments of a layer, read from disk; None for grouped convolutions."""
        return self._observations and self._observations.statistics(layer)

    def gradients(self, layer: str) -> LayerGradients | None:
        """Squared gradients of a layer, taken on first use; None for grouped convolutions."""
        return self._observations and self._observations.gradients(layer)

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
            usage=self._observations and self._observations.usage(layer),
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
