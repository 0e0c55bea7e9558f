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
from autocompress.evaluate import SHARE, Evaluation
from autocompress.files import write_whole
from autocompress.pareto import non_dominated
from autocompress.search.columns import COLUMNS, ORIGINAL, REFERENCES

MAXIMISE: Mapping[Objective, bool] = {
    "metric": True,
    "latency": False,
    "file_bytes": False,
    "download_bytes": False,
    "peak_memory": False,
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
        "file_bytes": float(evaluation.file_bytes),
        "download_bytes": float(evaluation.download_bytes or math.inf),
        "peak_memory": float(evaluation.peak_memory_bytes),
    }
    return [values[name] for name in objectives]


def front_mask(
    evaluations: Sequence[Evaluation], objectives: Sequence[Objective]
) -> NDArray[np.bool_]:
    """Which evaluations are on the front of all given ones, shape (n,)."""
    if not evaluations:
        return np.zeros(0, dtype=np.bool_)
    values = np.array([objective_values(e, objectives) for e in evaluations])
    return non_dominated(values, maximise=[MAXIMISE[name] for name in objectives])


def build_front(
    run: Path,
    objectives: Sequence[Objective],
    searched: Sequence[Evaluation],
    judged: Sequence[Evaluation],
    *,
    complete: bool = False,
) -> Front:
    """Join what the search measured with what the final judging did.

    Finalists were measured again; once all are judged (`complete`), only they can be on the front.
    The metric that decides is always the search split's: choosing by the test split would spoil its
    verdict. `drop_test_pp` is in percentage points for accuracy and agreement, and in the metric's
    own unit for a user's metric.

    Args:
        searched: evaluations on the search split, the reference points first.
        judged: evaluations of reference points and finalists on the test split.
    """
    by_name = {e.candidate: e for e in searched}
    final = {e.candidate: e for e in judged}
    eligible = [
        replace(final.get(name, e), metric=e.metric)
        for name, e in by_name.items()
        if not complete or name in final
    ]
    mask = front_mask(eligible, objectives)
    members = {e.candidate for e, on in zip(eligible, mask, strict=True) if on}
    original = final.get(ORIGINAL)
    points = 100 if original and original.metric.unit == SHARE else 1
    rows = []
    for name, evaluation in by_name.items():
        last = final.get(name, evaluation)
        tested = last.metric.value if name in final else np.nan
        drop = points * (original.metric.value - tested) if original else np.nan
        rows.append(
            {
                "candidate": name,
                "role": name
                if not _is_ours(last)
                else "finalist"
                if name in final
                else "candidate",
                "on_front": name in members,
                "metric_search": evaluation.metric.value,
                "metric_test": tested,
                "drop_test_pp": drop,
                "latency_ms": last.latency.value,
                "speedup": last.speedup.value,
                "speedup_low": last.speedup.ci_low,
                "speedup_high": last.speedup.ci_high,
                "file_bytes": last.file_bytes,
                "download_bytes": last.download_bytes,
                "peak_memory_bytes": last.peak_memory_bytes,
                "trusted": last.trusted,
                "artifact": last.artifact,
                "plan_hash": "" if not _is_ours(last) else name,
            }
        )
    return Front(run, tuple(rows))


def _is_ours(evaluation: Evaluation) -> bool:
    return evaluation.candidate not in REFERENCES
