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
from torch import Tensor, nn

from autocompress.config import Objective
from autocompress.evaluate import Evaluation
from autocompress.recover.autocast import bf16_pays
from autocompress.search.front import MAXIMISE, objective_values
from autocompress.search.sensitivity import output_loss
from autocompress.workload import Split, Workload, network_outputs, score
from autocompress.workload.types import Array

_CHUNK = 64
_CHUNKS = 4
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
        loss: how far the outputs are from the original's, see `sensitivity.output_loss`.
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
class Sample:
    """The first samples of the search split in a random order, with the original's outputs.

    Args:
        workload: its network is in evaluation mode.
        seed: of the order.
    """

    def __init__(self, workload: Workload, seed: int) -> None:
        split = workload.search_split
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        self._workload = workload
        self._chunks = [
            split.subset(part) for part in torch.split(order[: _CHUNK * _CHUNKS], _CHUNK)
        ]
        self._originals = [rough_outputs(workload.network, c.inputs) for c in self._chunks]
        self._scores = [
            self._score(o, c, o) for o, c in zip(self._originals, self._chunks, strict=True)
        ]

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self._chunks)

    def run(self, network: nn.Module, chunk: int) -> tuple[NDArray[np.float64], float]:
        """What a network loses against the original on a chunk.

        Returns:
            Differences of the metric, a value per sample or, for a user's metric, one for all;
            and the loss of the outputs.

        Raises:
            WorkloadError: the network or the metric fails.
        """
        split, original = self._chunks[chunk], self._originals[chunk]
        outputs = rough_outputs(network, split.inputs)
        lost = self._score(outputs, split, original) - self._scores[chunk]
        before, now = ([torch.from_numpy(o) for o in side] for side in (original, outputs))
        scores = not callable(self._workload.metric)
        return lost, output_loss(before, now, class_scores=scores)

    def _score(
        self, outputs: Sequence[Any], split: Split, original: tuple[Any, ...]
    ) -> NDArray[np.float64]:
        metric = self._workload.metric
        if callable(metric):
            return np.array([score(metric, tuple(outputs), split.targets, original)])
        wanted = original[0].argmax(1) if metric == "agreement" else np.asarray(split.targets)
        right = (outputs[0].argmax(1) == wanted).reshape(len(split), -1)
        return np.asarray(right.mean(1), dtype=np.float64)


def rough_outputs(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Array, ...]:
    """As `network_outputs`, in bf16 where that pays: good enough to judge by."""
    device = inputs[0].device
    with torch.autocast(device.type, torch.bfloat16, bf16_pays(device)):
        return network_outputs(network, inputs)


def mean_difference(differences: NDArray[np.float64]) -> Interval:
    """The mean of paired differences.

    A pseudo-observation of one unit is added to the variance: few samples without any difference
    do not show that there is none.

    Args:
        differences: shape (n,); of chunks or of single samples.
    """
    count = len(differences)
    mean = float(differences.mean())
    variance = (float(np.square(differences - mean).sum()) + 1.0) / count
    return Interval.around(mean, math.sqrt(variance / count))


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
    """Judges plans by running their networks on a sample.

    Args:
        sample: of the search split.
        objectives: what the search goes by.
        original: the original network's figures on the search split.
    """

    def __init__(
        self, sample: Sample, objectives: Sequence[Objective], original: Evaluation
    ) -> None:
        self._sample = sample
        self._objectives = tuple(objectives)
        self._original = original
        self._losses = LossModel()

    def judge(
        self,
        network: nn.Module,
        costs: Mapping[Objective, Interval],
        measured: Sequence[Evaluation],
    ) -> Judgement:
        """Run a plan's network chunk by chunk until it is dominated beyond doubt, or to the end.

        Args:
            network: the plan's, in evaluation mode.
            costs: what is predicted of other objectives than the metric.
            measured: the points that it must not be dominated by.
        """
        differences: list[NDArray[np.float64]] = []
        losses: list[float] = []
        dominated, estimates = False, dict(costs)
        for chunk in range(self._sample.chunks):
            lost, loss = self._sample.run(network, chunk)
            differences.append(lost)
            losses.append(loss)
            estimates = {**costs, "metric": self._metric(differences, losses)}
            dominated = is_dominated(estimates, measured, self._objectives)
            if dominated:
                break
        samples = len(losses) * _CHUNK
        return Judgement(estimates, float(np.mean(losses)), samples, dominated)

    def learn(self, judgement: Judgement, evaluation: Evaluation) -> None:
        """Take in what a judged plan turned out to be."""
        lost = evaluation.metric.value - self._original.metric.value
        self._losses.observe(judgement.loss, lost)

    def _metric(
        self, differences: Sequence[NDArray[np.float64]], losses: Sequence[float]
    ) -> Interval:
        """The metric on the whole split: what the sample says, joined with what the loss says.

        The ends are the sample's alone: they are a bound, the model is none.
        """
        level = self._original.metric.value
        sample = mean_difference(np.concatenate(differences))
        value, predicted = sample.value, self._losses.predict(float(np.mean(losses)))
        if predicted is not None:
            mean, spread = predicted
            own, other = 1 / sample.deviation**2, 1 / max(spread, 1e-6) ** 2
            value = (own * value + other * mean) / (own + other)
        return Interval(level + value, level + sample.low, level + sample.high)


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
