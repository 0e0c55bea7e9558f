"""What a plan is likely to be worth, from a small sample and cost models, before it is built.

Estimates decide what is measured; they never stand among measured figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit
from torch import Tensor, nn

from autocompress.build import Builder, Tried
from autocompress.config import Objective
from autocompress.evaluation import Evaluation, drop_unit
from autocompress.recover.autocast import takes_bf16
from autocompress.search.front import MAXIMISE, objective_values
from autocompress.search.limits import Figure, Limit, estimated_violations
from autocompress.workload import Split, Workload, network_outputs, score
from autocompress.workload.output_loss import output_loss
from autocompress.workload.types import Array

_FURTHER = 192
# A user's metric is taken on so many parts of the samples, to see how it varies.
_PARTS = 8
# "Beyond doubt": a true value outside so many standard deviations is rarer than one in 700.
_SIGMAS = 3.0
_FEW_MEASURED = 8


@final
@dataclass(frozen=True)
class Interval:
    """An estimate and the ends between which the true value lies beyond doubt."""

    value: float
    low: float
    high: float

    @staticmethod
    def around(value: float, deviation: float) -> Interval:
        """From a mean and its standard deviation."""
        return Interval(value, value - _SIGMAS * deviation, value + _SIGMAS * deviation)

    @staticmethod
    def unknown() -> Interval:
        """Nothing is known."""
        return Interval(math.nan, -math.inf, math.inf)

    @property
    def deviation(self) -> float:
        """The standard deviation that it was made of."""
        return (self.high - self.low) / (2 * _SIGMAS)


@final
@dataclass(frozen=True)
class Judgement:
    """What is thought of a plan.

    Attributes:
        estimates: by objective, in the objective's unit as `objective_values` has it.
        loss: how far the outputs are from the original's, see `output_loss`.
        samples: of the search split that it was run on.
        dominated: whether a measured point is better beyond doubt.
    """

    estimates: Mapping[Objective, Interval]
    loss: float
    samples: int
    dominated: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is unknown is left out."""
        known = {k: asdict(v) for k, v in self.estimates.items() if math.isfinite(v.value)}
        return {
            "estimates": known, "loss": self.loss, "samples": self.samples,
            "dominated": self.dominated,
        }  # fmt: skip


@final
@dataclass(frozen=True)
class Seen:
    """What a network lost against the original on some samples.

    Attributes:
        differences: of the metric, a value per labelled sample; for a user's metric per part.
        loss: of the outputs, see `output_loss`.
        samples: how many it was.
        unit: what a labelled sample can change of a value, for metrics between 0 and 1.
    """

    differences: NDArray[np.float64]
    loss: float
    samples: int
    unit: float


@final
class Sample:
    """Samples that plans are judged on, with what the original network makes of them.

    The first ones every network passes anyway while it is repaired; the rest costs a pass more.

    Args:
        workload: its network is in evaluation mode.
        builder: runs networks on its own sample in passing.
        seed: of the order of the further samples.
    """

    def __init__(self, workload: Workload, builder: Builder, seed: int) -> None:
        split = workload.search_split
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed + 1))
        self._metric, self._class_scores = workload.metric, workload.class_scores
        self._splits = (builder.sample, split.subset(order[:_FURTHER]))
        self._inputs, further = builder.sample_inputs, self._splits[1].inputs
        self._originals = [rough_outputs(workload.network, x) for x in (self._inputs, further)]
        own = len(builder.sample)
        self._labelled = [tuple(o[-own:] for o in self._originals[0]), self._originals[1]]
        self._scores = [
            self._score(o, s, o) for o, s in zip(self._labelled, self._splits, strict=True)
        ]

    def first(self, tried: Tried) -> Seen:
        """What a network loses on the samples that it has passed.

        Raises:
            WorkloadError: the network or the metric fails.
        """
        outputs = (
            rough_outputs(tried.network, self._inputs)
            if tried.outputs is None
            else tuple(o.float().numpy() for o in tried.outputs)
        )
        own = len(self._splits[0])
        return self._seen(0, outputs, tuple(o[-own:] for o in outputs))

    def further(self, network: nn.Module) -> Seen:
        """What a network loses on the rest.

        Raises:
            WorkloadError: the network or the metric fails.
        """
        outputs = rough_outputs(network, self._splits[1].inputs)
        return self._seen(1, outputs, outputs)

    def _seen(self, part: int, outputs: tuple[Array, ...], labelled: tuple[Array, ...]) -> Seen:
        lost = self._score(labelled, self._splits[part], self._labelled[part])
        sides = (self._originals[part], outputs)
        before, now = ([torch.from_numpy(o) for o in side] for side in sides)
        loss = output_loss(before, now, class_scores=self._class_scores)
        unit = len(lost) / len(labelled[0])
        return Seen(lost - self._scores[part], loss, len(outputs[0]), unit)

    def _score(
        self, outputs: tuple[Array, ...], split: Split, original: tuple[Array, ...]
    ) -> NDArray[np.float64]:
        if callable(self._metric):
            parts = np.array_split(np.arange(len(split)), min(_PARTS, len(split)))
            return np.array([self._part_score(outputs, split, original, p) for p in parts])
        wanted = original[0].argmax(1) if self._metric == "agreement" else np.asarray(split.targets)
        right = (outputs[0].argmax(1) == wanted).reshape(len(split), -1)
        return np.asarray(right.mean(1), dtype=np.float64)

    def _part_score(
        self,
        outputs: tuple[Array, ...],
        split: Split,
        original: tuple[Array, ...],
        part: NDArray[np.intp],
    ) -> float:
        mine, theirs = (tuple(o[part] for o in side) for side in (outputs, original))
        return score(self._metric, mine, split.subset(torch.from_numpy(part)).targets, theirs)


def rough_outputs(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Array, ...]:
    """As `network_outputs`, in bf16 where that works: good enough to judge by."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, takes_bf16(network, inputs)):
        return network_outputs(network, inputs)


def rough_tensors(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """As `rough_outputs`, as tensors."""
    return [torch.from_numpy(output) for output in rough_outputs(network, inputs)]


def mean_difference(differences: NDArray[np.float64], unit: float = 1.0) -> Interval:
    """The mean of paired differences.

    Two samples that gained a unit and two that lost it are added to the squares (as Agresti & Coull
    1998 add to counts): few samples without any difference do not show that there is none. Few
    parts have the quantile of Student's distribution.

    Args:
        differences: shape (n,); of parts or of single samples.
        unit: what one sample can change of a value.
    """
    count, free = len(differences), max(len(differences) - 1, 1)
    mean = float(differences.mean())
    squares = float(np.square(differences - mean).sum()) + 4.0 * unit**2
    wider = float(stdtrit(free, ndtr(_SIGMAS))) / _SIGMAS
    return Interval.around(mean, wider * math.sqrt(squares / free / count))


@final
class LossModel:
    """The metric's loss by the outputs' loss, learned from measured plans.

    The straight line through the origin in the root of the loss: for small changes the share of
    decisions that flip grows with the size of the outputs' change, whose square the loss is.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._lost: list[float] = []

    def observe(self, loss: float, lost: float) -> None:
        """A measured plan: its outputs' loss on the sample, and the metric's on the whole split."""
        self._losses.append(loss)
        self._lost.append(lost)

    def predict(self, loss: float) -> tuple[float, float] | None:
        """Mean and standard deviation of the metric's difference; None while little is known."""
        if len(self._losses) < _FEW_MEASURED:
            return None
        known = np.sqrt(np.array(self._losses))
        # The nearest ones count most: the line is straight only near by.
        weights = 1.0 / (np.square(np.log((known + 1e-3) / (math.sqrt(loss) + 1e-3))) + 0.1)
        lost = np.array(self._lost)
        slope = float((weights * known * lost).sum() / max((weights * known**2).sum(), 1e-12))
        left = lost - slope * known
        spread = math.sqrt(float((weights * left**2).sum() / weights.sum()))
        return slope * math.sqrt(loss), spread


@final
class Judge:
    """Says what plans are likely to be worth by what their networks made of a sample.

    Args:
        objectives: what the search goes by.
        original: the original network's figures on the search split.
    """

    def __init__(self, objectives: Sequence[Objective], original: Evaluation) -> None:
        self.objectives = tuple(objectives)
        self._original = original
        self._losses = LossModel()

    def judge(
        self,
        seen: Sequence[Seen],
        costs: Mapping[Objective, Interval],
        measured: Sequence[Evaluation],
    ) -> Judgement:
        """Join what is known of a plan.

        Args:
            seen: what its network made of samples; at least one.
            costs: what is predicted of other objectives than the metric.
            measured: the points that it must not be dominated by.
        """
        estimates = {**costs, "metric": self._metric(seen)}
        dominated = is_dominated(estimates, measured, self.objectives)
        return Judgement(estimates, _mean_loss(seen), sum(s.samples for s in seen), dominated)

    def learn(self, judgement: Judgement, evaluation: Evaluation) -> None:
        """Take in what a judged plan turned out to be."""
        lost = evaluation.metric.value - self._original.metric.value
        self._losses.observe(judgement.loss, lost)

    def _metric(self, seen: Sequence[Seen]) -> Interval:
        """The metric on the whole split: what the sample says, joined with what the loss says.

        The ends are the sample's alone: they are a bound, the model is none.
        """
        level = self._original.metric.value
        differences = np.concatenate([s.differences for s in seen])
        sample = mean_difference(differences, max(s.unit for s in seen))
        value, predicted = sample.value, self._losses.predict(_mean_loss(seen))
        if predicted is not None:
            mean, spread = predicted
            own, other = 1 / sample.deviation**2, 1 / max(spread, 1e-6) ** 2
            value = (own * value + other * mean) / (own + other)
        return Interval(level + value, level + sample.low, level + sample.high)


def _mean_loss(seen: Sequence[Seen]) -> float:
    return sum(s.loss * s.samples for s in seen) / sum(s.samples for s in seen)


def expected_excess(
    limits: Sequence[Limit], estimates: Mapping[Objective, Interval], original: Evaluation
) -> float:
    """By how much a plan is expected to miss hard limits in all, as shares of the bounds.

    Args:
        estimates: by objective, in the objective's unit.
        original: the original network on the search split.
    """
    values = {name: interval.value for name, interval in estimates.items()}
    figures: dict[Figure, float] = {}
    if "metric" in values:
        _, points = drop_unit(original.metric.unit)
        figures["metric"] = values["metric"]
        figures["drop"] = points * (original.metric.value - values["metric"])
    if values.get("latency", 0.0) > 0:
        figures["latency_ms"] = original.latency.value * values["latency"]
        figures["speedup"] = 1 / values["latency"]
    if "file_bytes" in values:
        figures["file_bytes"] = values["file_bytes"]
    if "download_bytes" in values:
        figures["download_bytes"] = values["download_bytes"]
    return sum(max(excess, 0.0) for excess in estimated_violations(limits, figures))


def is_dominated(
    estimates: Mapping[Objective, Interval],
    measured: Sequence[Evaluation],
    objectives: Sequence[Objective],
) -> bool:
    """Whether some measured point is no worse than the best that the estimates leave open."""
    best = np.array([_best(estimates.get(name), name) for name in objectives])
    if not len(measured):
        return False
    values = np.array([objective_values(e, objectives) for e in measured])
    sign = np.array([1.0 if MAXIMISE[name] else -1.0 for name in objectives])
    no_worse = (sign * values >= sign * best).all(axis=1)
    return bool(no_worse.any())


def _best(interval: Interval | None, objective: Objective) -> float:
    if interval is None:
        return math.inf if MAXIMISE[objective] else -math.inf
    return interval.high if MAXIMISE[objective] else interval.low
