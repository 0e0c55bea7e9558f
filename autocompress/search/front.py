"""The front of a run: rows with stable columns, kept current on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autocompress.config import Objective
from autocompress.errors import RunFolderError
from autocompress.evaluation import Evaluation, drop_unit
from autocompress.files import write_whole
from autocompress.measure.measurement import Measurement
from autocompress.pareto import non_dominated, surely_dominated
from autocompress.plan import file_of
from autocompress.search.columns import COLUMNS, ORIGINAL, REFERENCES

MAXIMISE: Mapping[Objective, bool] = {
    "metric": True,
    "latency": False,
    "energy": False,
    "file_bytes": False,
    "download_bytes": False,
    "peak_memory": False,
    "gpu_memory": False,
}


@final
@dataclass(frozen=True)
class Front:
    """All points of a run.

    Attributes:
        run: the run folder.
        rows: one mapping per point, keys as in `COLUMNS`.
    """

    run: Path
    rows: tuple[Mapping[str, Any], ...]

    def table(self) -> pd.DataFrame:
        """The points as a DataFrame with the stable columns, by latency."""
        frame: pd.DataFrame = pd.DataFrame(list(self.rows), columns=list(COLUMNS))
        ordered: pd.DataFrame = frame.sort_values("latency_ms", kind="stable", ignore_index=True)
        return ordered

    def save(self) -> None:
        """Write `front.csv`, whole or not at all."""
        write_whole(self.run / "front.csv", self.table().to_csv(index=False).encode())


def objective_values(evaluation: Evaluation, objectives: Sequence[Objective]) -> list[float]:
    """The figures that the search is judged by.

    Latency counts as a share of the baseline's, measured in turn with it: milliseconds of different
    minutes are not comparable on a shared machine.
    """
    values: dict[Objective, float] = {
        "metric": evaluation.metric.value,
        "latency": 1.0 / evaluation.speedup.value,
        "energy": math.inf if evaluation.energy is None else evaluation.energy.value,
        "file_bytes": float(evaluation.file_bytes),
        "download_bytes": float(evaluation.download_bytes or math.inf),
        "peak_memory": float(evaluation.peak_memory_bytes or math.inf),
        "gpu_memory": float(evaluation.gpu_memory_bytes or math.inf),
    }
    return [values[name] for name in objectives]


def objective_ends(
    evaluation: Evaluation, objectives: Sequence[Objective]
) -> tuple[list[float], list[float]]:
    """Lower and upper ends of the figures of `objective_values`.

    Latency and energy have their 95 % intervals. The metric counts as exact, for all candidates
    are judged on the same samples; so do sizes.
    """
    exact = objective_values(evaluation, objectives)
    ends = {"latency": _inverse_ends(evaluation.speedup)}
    if evaluation.energy is not None:
        ends["energy"] = (evaluation.energy.ci_low, evaluation.energy.ci_high)
    pairs = [ends.get(name, (value, value)) for name, value in zip(objectives, exact, strict=True)]
    return [low for low, _ in pairs], [high for _, high in pairs]


def metric_scale(original: Evaluation, evaluations: Sequence[Evaluation]) -> float:
    """What a share of the original's metric is a share of; positive.

    Of the metric's own size; where it is exactly 0, of how far all metrics spread.

    Args:
        original: the original network.
        evaluations: measured candidates.
    """
    level = original.metric.value
    return abs(level) or float(np.ptp([level, *(e.metric.value for e in evaluations)])) or 1.0


def front_mask(
    evaluations: Sequence[Evaluation], objectives: Sequence[Objective]
) -> NDArray[np.bool_]:
    """Which evaluations are on the front of all given ones, shape (n,)."""
    if not evaluations:
        return np.zeros(0, dtype=np.bool_)
    values = np.array([objective_values(e, objectives) for e in evaluations])
    return non_dominated(values, maximise=[MAXIMISE[name] for name in objectives])


def undoubted_front_mask(
    evaluations: Sequence[Evaluation], objectives: Sequence[Objective]
) -> NDArray[np.bool_]:
    """Which evaluations no other one dominates beyond doubt, shape (n,).

    Of two points that cannot be told apart both are kept: it would be chance to drop one.
    """
    if not evaluations:
        return np.zeros(0, dtype=np.bool_)
    low, high = (np.array(side) for side in _all_ends(evaluations, objectives))
    maximise = [MAXIMISE[name] for name in objectives]
    unknown = np.isnan(low).any(axis=1) | np.isnan(high).any(axis=1)
    mask: NDArray[np.bool_] = ~(surely_dominated(low, high, maximise=maximise) | unknown)
    return mask


def build_front(
    run: Path,
    objectives: Sequence[Objective],
    searched: Sequence[Evaluation],
    judged: Sequence[Evaluation],
    *,
    complete: bool = False,
) -> Front:
    """Join what the search measured with what the final judging did.

    Finalists were measured again; once all are judged (`complete`), only they can be on the front,
    and all are that no other one dominates beyond doubt. Before, the figures themselves decide.
    The metric that decides is always the search split's: choosing by the test split would spoil its
    verdict. `drop_test_pp` is in percentage points for accuracy and agreement, and in the metric's
    own unit for a user's metric.

    Args:
        searched: evaluations on the search split, the reference points first.
        judged: evaluations of reference points and finalists on the test split.

    Raises:
        RunFolderError: the figures are of different devices or sources.
    """
    check_comparable([*searched, *judged])
    by_name = {e.candidate: e for e in searched}
    final = {e.candidate: e for e in judged}
    eligible = [
        replace(final.get(name, e), metric=e.metric)
        for name, e in by_name.items()
        if not complete or name in final
    ]
    mask = (undoubted_front_mask if complete else front_mask)(eligible, objectives)
    members = {e.candidate for e, on in zip(eligible, mask, strict=True) if on}
    original = final.get(ORIGINAL)
    points = drop_unit(original.metric.unit)[1] if original else np.nan
    rows = []
    for name, evaluation in by_name.items():
        last = final.get(name, evaluation)
        tested = last.metric.value if name in final else np.nan
        drop = points * (original.metric.value - tested) if original else np.nan
        rows.append(_row(evaluation, last, name in members, name in final) | {"drop_test_pp": drop})
    return Front(run, tuple(rows))


def check_comparable(evaluations: Sequence[Evaluation]) -> None:
    """Check that figures may stand in one front: one device, all measured or all estimated.

    A device is its fingerprint: the machine, threads and batch size; runtimes may differ.

    Raises:
        RunFolderError: they may not.
    """
    figures = [f for e in evaluations for f in (e.metric, e.latency, e.speedup)]
    for what, found in (
        ("device", {f.device for f in figures}),
        ("source", {f.source for f in figures}),
    ):
        if len(found) > 1:
            raise RunFolderError(
                f"Figures of more than one {what} cannot be on one front.",
                given=", ".join(sorted(found)),
                allowed=f"one {what}; runtimes of one device may differ",
                advice="give each device a run folder of its own with --run",
            )


def _all_ends(
    evaluations: Sequence[Evaluation], objectives: Sequence[Objective]
) -> tuple[list[list[float]], list[list[float]]]:
    ends = [objective_ends(e, objectives) for e in evaluations]
    return [low for low, _ in ends], [high for _, high in ends]


def _inverse_ends(ratio: Measurement) -> tuple[float, float]:
    """Ends of one over a ratio; a ratio that may be zero has no upper end."""
    return 1.0 / ratio.ci_high, 1.0 / ratio.ci_low if ratio.ci_low > 0 else math.inf


def _row(searched: Evaluation, last: Evaluation, on_front: bool, judged: bool) -> dict[str, Any]:
    """A point's row but for the drop; `last` is the latest measurement."""
    file = file_of(last.candidate)
    ours = file not in REFERENCES
    energy = last.energy
    return {
        "candidate": last.candidate,
        "role": file if not ours else "finalist" if judged else "candidate",
        "runtime": last.runtime,
        "on_front": on_front,
        "metric_search": searched.metric.value,
        "metric_test": last.metric.value if judged else np.nan,
        "metric_unit": searched.metric.unit,
        "latency_ms": last.latency.value,
        "speedup": last.speedup.value,
        "speedup_low": last.speedup.ci_low,
        "speedup_high": last.speedup.ci_high,
        "energy_mj": energy.value if energy else np.nan,
        "energy_low_mj": energy.ci_low if energy else np.nan,
        "energy_high_mj": energy.ci_high if energy else np.nan,
        "file_bytes": last.file_bytes,
        "download_bytes": last.download_bytes,
        "peak_memory_bytes": last.peak_memory_bytes,
        "gpu_memory_bytes": last.gpu_memory_bytes,
        "trusted": last.trusted,
        "artifact": last.artifact,
        "plan_hash": file if ours else "",
    }
