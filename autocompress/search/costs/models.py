"""What is predicted of a plan's costs, corrected by every candidate that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from autocompress.config import Objective
from autocompress.evaluation import Evaluation
from autocompress.search.costs.corrected import CorrectedCost
from autocompress.search.costs.factored import FactoredSum, Indices
from autocompress.search.judge import Interval


@final
@dataclass
class CostModels:
    """Predictions of latency by runtime, and of sizes.

    Attributes:
        latency_ms: by the full name of a runtime.
        sizes: in bytes, for `file_bytes` and `download_bytes`.
        original_ms: the original's latency in the device's first runtime: latency counts as a
            share of it.
    """

    latency_ms: Mapping[str, CorrectedCost] = field(default_factory=dict)
    sizes: Mapping[Objective, CorrectedCost] = field(default_factory=dict)
    original_ms: float = 1.0

    def predict(self, indices: Indices, runtime: str) -> dict[Objective, Interval]:
        """What is known of each cost; objectives without a model are left out.

        Latency is a share of the original's, as `front.objective_values` has it.

        Args:
            indices: values by parameter.
            runtime: full name.
        """
        found: dict[Objective, Interval] = {}
        if runtime in self.latency_ms:
            mean, deviation = self.latency_ms[runtime].predict(indices)
            found["latency"] = Interval.around(
                mean / self.original_ms, deviation / self.original_ms
            )
        for name, model in self.sizes.items():
            found[name] = Interval.around(*model.predict(indices))
        return found

    def observe(self, indices: Indices, evaluation: Evaluation) -> None:
        """Take in a measured candidate."""
        if evaluation.runtime in self.latency_ms:
            share_ms = self.original_ms / evaluation.speedup.value
            self.latency_ms[evaluation.runtime].observe(indices, share_ms)
        sizes = {
            "file_bytes": evaluation.file_bytes,
            "download_bytes": evaluation.download_bytes,
        }
        for name, model in self.sizes.items():
            size = sizes.get(name)
            if size:
                model.observe(indices, float(size))

    def sum_of(self, objective: Objective, runtime: str) -> FactoredSum | None:
        """The model of an objective as a sum over few parameters each; None if there is none.

        Latency is in ms here.
        """
        model = (
            self.latency_ms.get(runtime) if objective == "latency" else self.sizes.get(objective)
        )
        return None if model is None else model.corrected()
