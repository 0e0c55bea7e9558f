"""Sensitivity: how much the outputs change with a single decision, everything else unchanged.

Many changed networks run in one pass, see `beside`. With changes and passes both growing with the
depth, the cost would grow with its square. So fewer samples are taken the more there is to do, and
where few are left, fewer levels of each choice are measured, always the strongest among them:
between them the loss follows a power law.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autocompress.bank import Bank
from autocompress.bank.changes import changed_layers
from autocompress.bank.store import make_key, network_hash, tensors_hash
from autocompress.files import user_cache, write_json
from autocompress.plan import Decision
from autocompress.search.beside import run_beside
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.space import Parameter, Space
from autocompress.techniques import NETWORK
from autocompress.workload.output_loss import output_loss

# Multiply-accumulates of all passes together, as far as the limits of the samples allow.
_WORK = 3e11
_SAMPLES = (16, 64)
# With the fewest samples they may come to so many times as much before levels are left out.
_MOST_WORK = 4.0
# Of losses by level, where a single level was measured.
_POWER = 2.0
# Smaller losses are none, between which there is nothing to follow.
_LEAST = 1e-6
# Samples of a pass: more do not make it more efficient.
_PASS = 512
# Values that a layer may give in a pass: several such tensors are held at a time.
_PASS_VALUES = 1.5e8
_TINY = 1e-12
_VERSION = 4


@final
@dataclass(frozen=True)
class Change:
    """A single decision for a single target."""

    target: str
    decision: Decision

    @property
    def key(self) -> str:
        """Tells it from others."""
        row = {"technique": self.decision.technique, **self.decision.model_dump(mode="json")}
        return make_key(self.target, row)


@final
@dataclass(frozen=True)
class Sensitivities:
    """The loss of every single decision.

    Attributes:
        losses: by `Change.key`: the mean Kullback-Leibler divergence of the class probabilities
            from the original's, in nats; for other outputs the mean squared error as a share of
            their mean square. At least 0.
        samples: that each was measured on.
    """

    losses: Mapping[str, float]
    samples: int

    def of(self, space: Space) -> FactoredSum:
        """The summed loss of a plan, one term per parameter; techniques not measured cost nothing.

        Within a parameter a stronger level of one technique never costs less than a milder one.
        """
        return FactoredSum(0.0, tuple(self._factor(p) for p in space.parameters))

    def _factor(self, parameter: Parameter) -> Factor:
        values = np.zeros(parameter.highest + 1)
        for technique in {d.technique for d in parameter.decisions}:
            levels = [
                (i, d) for i, d in enumerate(parameter.decisions, 1) if d.technique == technique
            ]
            for target in parameter.targets:
                found = [self.losses.get(Change(target, d).key) for _, d in levels]
                values[[i for i, _ in levels]] += filled_levels(found)
        return Factor(parameter.name, (parameter.name,), values)


def filled_levels(losses: Sequence[float | None]) -> NDArray[np.float64]:
    """Losses of a technique's levels, from the mildest to the strongest, with no gaps.

    Args:
        losses: None where a level was not measured; all of them: they cost nothing.
    """
    known = [(i, max(loss, _LEAST)) for i, loss in enumerate(losses, 1) if loss is not None]
    if not known:
        return np.zeros(len(losses))
    positions, values = np.log([i for i, _ in known]), np.log([loss for _, loss in known])
    levels = np.log(np.arange(1, len(losses) + 1))
    found = np.interp(levels, positions, values)
    # Milder than all that were measured: along the power law of the mildest two.
    slope = _POWER
    if len(known) > 1:
        slope = max((values[1] - values[0]) / (positions[1] - positions[0]), 0.0)
    mild = levels < positions[0]
    found[mild] = values[0] + slope * (levels[mild] - positions[0])
    filled = np.exp(found)
    # What was measured stays as it was.
    for index, loss in enumerate(losses):
        filled[index] = filled[index] if loss is None else loss
    return np.asarray(np.maximum.accumulate(filled), dtype=np.float64)


def thinned(levels: Sequence[Change], share: float) -> list[Change]:
    """About a share of a technique's levels for one target, evenly, the strongest among them."""
    count = max(1, round(share * len(levels)))
    # From the end in equal steps, which stop one step before the mildest would repeat.
    picks = {len(levels) - 1 - (k * len(levels)) // count for k in range(count)}
    return [levels[i] for i in sorted(picks)]


@final
class SensitivityRun:
    """Measures what is not known yet, pass by pass.

    Args:
        bank: calibrated.
        space: whose decisions are measured; those for the network as a whole are not.
        inputs: samples in random order that no layer was solved with; the first few are used.
        folder: where finished passes are kept, by network, data and technique.
        class_scores: whether the first output is class scores along axis 1.
    """

    def __init__(
        self,
        bank: Bank,
        space: Space,
        inputs: tuple[Tensor, ...],
        folder: Path,
        *,
        class_scores: bool,
    ) -> None:
        self._bank = bank
        # A copy of its own: hooks on the original would be in every copy that is made meanwhile.
        self._network = bank.copy_network()
        self._class_scores = class_scores
        levels = _levels(space)
        count = max(1, sum(len(changes) for changes in levels.values()))
        macs = max(1, sum(layer.macs for layer in bank.graph.layers))
        wanted = int(_WORK / count / macs)
        self.samples = min(len(inputs[0]), max(_SAMPLES[0], min(wanted, _SAMPLES[1])))
        share = min(1.0, _MOST_WORK * _WORK / (count * macs * self.samples))
        by_technique: dict[str, list[Change]] = {}
        for (_, technique), changes in levels.items():
            by_technique.setdefault(technique, []).extend(thinned(changes, share))
        self._inputs = tuple(x[: self.samples] for x in inputs)
        largest = max((x.out_channels * x.positions for x in bank.graph.layers), default=1)
        each = max(1, int(min(_PASS, _PASS_VALUES / largest)) // self.samples - 1)
        identity = make_key(
            _VERSION, network_hash(bank.network), tensors_hash(self._inputs), class_scores,
            torch.get_num_threads(), bank.multiple,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self._passes: list[tuple[Path, list[Change]]] = []
        for technique, known in by_technique.items():
            for start in range(0, len(known), each):
                part = known[start : start + each]
                # Sums depend on the batch: a pass is kept as a whole.
                key = make_key(identity, technique, each, [c.key for c in part])
                digest = hashlib.sha256(key.encode()).hexdigest()[:20]
                self._passes.append((folder / f"{technique}-{digest}.json", part))

    @property
    def passes(self) -> int:
        """How many passes there are in all."""
        return len(self._passes)

    def steps(self) -> Iterator[None]:
        """Measure pass by pass; what is on disk is not measured again."""
        for path, changes in self._passes:
            if _read(path) is None:
                losses = self._measure(changes)
                write_json(path, dict(zip((c.key for c in changes), losses, strict=True)))
            yield

    def result(self) -> Sensitivities:
        """What is known so far."""
        losses: dict[str, float] = {}
        for path, _ in self._passes:
            losses |= _read(path) or {}
        return Sensitivities(losses, self.samples)

    def _measure(self, changes: Sequence[Change]) -> list[float]:
        modules = [changed_layers(self._bank, c.target, c.decision) for c in changes]
        outputs = run_beside(self._network, modules, self._inputs)
        original = outputs[0]
        return [self._loss(original, changed) for changed in outputs[1:]]

    def _loss(self, original: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
        return output_loss(original, changed, class_scores=self._class_scores)


def _levels(space: Space) -> dict[tuple[str, str], list[Change]]:
    """Every level of each technique by target, from the mildest to the strongest."""
    found: dict[tuple[str, str], list[Change]] = {}
    for parameter in space.parameters:
        for target in parameter.targets if parameter.target != NETWORK else ():
            for decision in parameter.decisions:
                changes = found.setdefault((target, decision.technique), [])
                changes.append(Change(target, decision))
    return found


def sensitivity_folder() -> Path:
    """Where sensitivities are kept for later searches of the same network and data."""
    return user_cache() / "sensitivity"


def _read(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {str(k): float(v) for k, v in found.items()} if isinstance(found, dict) else None
