"""What the layers of a network saw on calibration data: gathered in passes, kept layer by layer.

The Gram matrices of a large network are several times its weights. They are on disk, each layer's
in a file of its own, and are read when the layer is solved; the store holds the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from autocompress.bank.gradients import batch_size, collect_gradients
from autocompress.bank.statistics import Gathering, collect_statistics, plan_passes
from autocompress.bank.store import VariantStore
from autocompress.bank.usage import count_usage
from autocompress.techniques.technique import LayerGradients, LayerStatistics, Variant
from autocompress.workload import Padding

_STATISTICS = "statistics"
_GRADIENTS = "gradients"
_USAGE = "usage"
# Gradients cost a backward pass, and importance needs no more samples.
_GRADIENT_SAMPLES = 512


@final
@dataclass(frozen=True)
class Counter:
    """Who is told how far a passage over the calibration data has come.

    Attributes:
        begin: called with the number of batches to come, all passes together.
        advance: called after every batch.
    """

    begin: Callable[[int], None] = lambda batches: None
    advance: Callable[[], None] = lambda: None


@final
@dataclass(frozen=True)
class Observed:
    """Everything that was gathered, to be used by another process.

    Attributes:
        inputs: calibration inputs, n samples in dimension 0.
        rows: as in `Gathering`, and the padding.
        found: by kind and layer name what was gathered.
    """

    inputs: tuple[Tensor, ...]
    rows: int
    padding: Padding
    found: Mapping[tuple[str, str], Variant]


@final
class Observations:
    """Statistics, gradients and usage of the layers of one network, in a store.

    Args:
        gathering: what they are gathered from.
        key: makes the store's key of some parts.
        memory_bytes: of the sums of the layers that are gathered in one pass over the data.
    """

    def __init__(
        self,
        gathering: Gathering,
        store: VariantStore,
        key: Callable[..., str],
        memory_bytes: int,
    ) -> None:
        self._gathering = gathering
        self._store = store
        self._key = key
        self._memory_bytes = memory_bytes
        self._names = frozenset(layer.name for layer in gathering.observed)
        self._usage: dict[str, Tensor] | None = None

    def gather(self, counter: Counter) -> None:
        """Gather the statistics, as far as they are not on disk."""
        missing = [
            layer
            for layer in self._gathering.observed
            if not self._store.has(self._key(_STATISTICS, layer.name))
        ]
        passes = plan_passes(missing, self._memory_bytes)
        counter.begin(len(passes) * self._gathering.batches)
        for layers in passes:
            for name, found in collect_statistics(self._gathering, layers, counter.advance):
                self._store.put(self._key(_STATISTICS, name), vars(found), lasting=True)
                # Nothing of a layer stays here while the next one's moments are made.
                del found
        # Layers that the data never reaches have none.
        self._names = frozenset(
            name for name in self._names if self._store.has(self._key(_STATISTICS, name))
        )

    def gather_gradients(self, counter: Counter) -> None:
        """Gather the gradients, unless they are all on disk.

        Raises:
            WorkloadError: the network cannot be differentiated.
        """
        keys = {x.name: self._key(_GRADIENTS, x.name) for x in self._gathering.observed}
        if all(self._store.has(key) for key in keys.values()):
            counter.begin(0)
            return
        layers, inputs = self._gathering.layers, self._some_inputs()
        counter.begin(-(-len(inputs[0]) // batch_size(layers)))
        network, padding = self._gathering.network, self._gathering.padding
        found = collect_gradients(network, layers, inputs, counter.advance, padding)
        for name in list(found):
            self._store.put(keys[name], vars(found.pop(name)), lasting=True)

    def statistics(self, layer: str) -> LayerStatistics | None:
        """Input moments of a layer; None for grouped convolutions and what is left as it is."""
        if layer not in self._names:
            return None
        # Gathered already, unless the file was damaged since.
        variant = self._kept(_STATISTICS, layer, self.gather)
        return None if variant is None else LayerStatistics(**variant)

    def gradients(self, layer: str) -> LayerGradients | None:
        """Squared gradients of a layer, taken on first use; None where there are no statistics."""
        if not any(x.name == layer for x in self._gathering.observed):
            return None
        variant = self._kept(_GRADIENTS, layer, self.gather_gradients)
        return None if variant is None else LayerGradients(**variant)

    def usage(self, layer: str) -> Tensor | None:
        """How often the entries of an embedding are read; None for other layers."""
        if self._usage is None:
            self._usage = dict(self._count())
        return self._usage.get(layer)

    def state(self) -> Observed:
        """What was gathered so far; that of all layers is in memory then."""
        found = {(_USAGE, ""): self._count()}
        for name in sorted(self._names):
            for kind in (_STATISTICS, _GRADIENTS):
                variant = self._store.get(self._key(kind, name))
                if variant is not None:
                    found[kind, name] = variant
        gathering = self._gathering
        return Observed(gathering.inputs, gathering.rows, gathering.padding, found)

    def take(self, observed: Observed) -> None:
        """Keep what another process has gathered for the same network and inputs."""
        for (kind, name), variant in observed.found.items():
            # On disk: to gather it again would take passes over the data.
            self._store.put(self._key(kind, name), variant, lasting=True)
        self._names = frozenset(name for kind, name in observed.found if kind == _STATISTICS)

    def _kept(self, kind: str, layer: str, gather: Callable[[Counter], None]) -> Variant | None:
        key = self._key(kind, layer)
        variant = self._store.get(key)
        if variant is None:
            gather(Counter())
            variant = self._store.get(key)
        return variant

    def _count(self) -> Variant:
        layers = self._gathering.layers
        if not any(layer.kind == "embedding" for layer in layers):
            return {}
        key = self._key(_USAGE, "")
        variant = self._store.get(key)
        if variant is None:
            network, padding = self._gathering.network, self._gathering.padding
            variant = count_usage(network, layers, self._some_inputs(), padding)
            self._store.put(key, variant, lasting=True)
        return variant

    def _some_inputs(self) -> tuple[Tensor, ...]:
        return tuple(x[:_GRADIENT_SAMPLES] for x in self._gathering.inputs)
