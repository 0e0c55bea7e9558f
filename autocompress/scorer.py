"""A file's metric by the device's runtime, and how far its outputs are from the original's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, final

import torch

from autocompress.evaluation import CHANGED, OUTPUT_LOSS, OWN_UNIT, SAMPLES, SHARE, SplitName
from autocompress.measure.client import Subject, Worker
from autocompress.measure.measurement import CONFIDENCE_SIGMAS, Measurement
from autocompress.measure.scoring import ScoringPool
from autocompress.workload import Split, Workload, network_outputs, score, score_standard_error
from autocompress.workload.output_loss import changed_share, output_loss
from autocompress.workload.types import Array

_BATCH = 64
# Of the baseline's outputs, with which all others are compared.
_KEPT_BYTES = 2**26


@final
class Scorer:
    """Judges files of one workload; for the thread that measures only.

    Args:
        workload: checked; its network is in evaluation mode.
        worker: keeps inputs, and says which device figures are of.
        baseline: the original network's file; it need not be there yet.
    """

    def __init__(self, workload: Workload, worker: Worker, baseline: Subject) -> None:
        self._workload, self._worker, self._baseline = workload, worker, baseline
        self._inputs: dict[SplitName, Path] = {}
        self._originals: dict[SplitName, tuple[Array, ...]] = {}
        self._baseline_outputs: tuple[Array, ...] | None = None

    def score(
        self, subject: Subject, split: SplitName, pool: ScoringPool
    ) -> tuple[Measurement, dict[str, Any]]:
        """The metric, and on the search split the details of `evaluation` beside it.

        Raises:
            MeasurementError: the file crashes or hangs the runtime.
            WorkloadError: the metric fails or is not finite.
        """
        data, wanted = self._split(split), self._workload.metric
        outputs = pool.predict(subject, self._stored(split), _BATCH)
        value = score(wanted, outputs, data.targets, self._original_outputs(split))
        error = score_standard_error(wanted, value, len(data))
        spread = math.nan if error is None else CONFIDENCE_SIGMAS * error
        unit = SHARE if self._workload.class_scores else OWN_UNIT
        device = self._worker.fingerprint.id
        metric = Measurement(value, value - spread, value + spread, unit, "measured", device)
        return metric, self._distance(subject, outputs, pool) if split == "search" else {}

    def _distance(
        self, subject: Subject, outputs: tuple[Array, ...], pool: ScoringPool
    ) -> dict[str, Any]:
        """How far outputs on the search split are from the baseline's."""
        if self._baseline_outputs is None:
            own = subject == self._baseline
            first = outputs if own else pool.predict(self._baseline, self._stored("search"), _BATCH)
            few = max(_KEPT_BYTES // max(sum(o[:1].nbytes for o in first), 1), 1)
            self._baseline_outputs = tuple(o[:few] for o in first)
        before = self._baseline_outputs
        now = tuple(o[: len(before[0])] for o in outputs)
        tensors = ([torch.from_numpy(o) for o in side] for side in (before, now))
        scores = self._workload.class_scores
        found = {OUTPUT_LOSS: output_loss(*tensors, class_scores=scores), SAMPLES: len(now[0])}
        return found | ({CHANGED: changed_share(before[0], now[0])} if scores else {})

    def _stored(self, split: SplitName) -> Path:
        if split not in self._inputs:
            self._inputs[split] = self._worker.store(self._split(split).numpy_inputs())
        return self._inputs[split]

    def _original_outputs(self, split: SplitName) -> tuple[Array, ...] | None:
        """What the metric compares with, if that is the original network's outputs."""
        if self._workload.metric != "agreement":
            return None
        if split not in self._originals:
            inputs = self._split(split).inputs
            self._originals[split] = network_outputs(self._workload.network, inputs)
        return self._originals[split]

    def _split(self, split: SplitName) -> Split:
        return self._workload.search_split if split == "search" else self._workload.test_split
