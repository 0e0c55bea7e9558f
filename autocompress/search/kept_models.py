"""What a run folder keeps for `solve`: the space, the summed loss and the predicted costs.

`models.json` holds the models as they were before the first candidate was measured. Whoever reads
it lets them learn from the run's measured candidates anew, so that nothing has to be written while
a search goes on, and a killed search loses nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final, get_args

import numpy as np

from autocompress.config import Objective
from autocompress.errors import PlanError, RunFolderError
from autocompress.evaluation import Evaluation
from autocompress.files import write_json, write_whole
from autocompress.plan import Decision, Plan
from autocompress.search.costs.corrected import CorrectedCost, CorrectionSettings
from autocompress.search.costs.factored import Factor, FactoredSum, Indices
from autocompress.search.costs.models import CostModels
from autocompress.search.space import Parameter, Space
from autocompress.techniques import Stage, read_plan

_FILE, _SOURCE = "models.json", "source.json"
_VERSION = 1
_SEARCH_ANEW = "search with `seeds: true` (the default) in the experiment's `search` section"


@final
@dataclass(frozen=True, eq=False)
class KeptModels:
    """All that a plan for a new budget is solved from.

    Attributes:
        space: what may be chosen.
        loss: summed sensitivities, in nats (see `output_loss`).
        latency_ms: by the full name of a runtime, the baseline's first.
        sizes: in bytes.
        deviations: by runtime or size, how far a predicted cost may be off before anything is
            measured: standard deviation of the unchanged plan's, as a share of it.
        original_ms: latency of the original in the first runtime.
        original_metric: the original's metric on the search split.
        metric_unit: `share` for accuracy and agreement.
        device: id of the fingerprint of the device that it all holds for.
    """

    space: Space
    loss: FactoredSum
    latency_ms: Mapping[str, FactoredSum]
    sizes: Mapping[Objective, FactoredSum]
    deviations: Mapping[str, float]
    original_ms: float
    original_metric: float
    metric_unit: str
    device: str

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Full names; the first is the baseline's."""
        return tuple(self.latency_ms)

    def cost_models(self, observed: Iterable[tuple[Indices, Evaluation]]) -> CostModels:
        """The costs' models, corrected by measured candidates (see `observations`)."""
        costs = CostModels(
            {name: self._cost(name, prior) for name, prior in self.latency_ms.items()},
            {name: self._cost(name, prior) for name, prior in self.sizes.items()},
            self.original_ms,
        )
        for indices, evaluation in observed:
            costs.observe(indices, evaluation)
        return costs

    def _cost(self, name: str, prior: FactoredSum) -> CorrectedCost:
        return CorrectedCost(prior, CorrectionSettings(common_sd=self.deviations[name]))


def keep_models(
    folder: Path, space: Space, loss: FactoredSum, costs: CostModels, original: Evaluation
) -> None:
    """Write `models.json`, whole or not at all.

    Args:
        folder: the run folder.
        space: the search's, without the levels that were left out.
        loss: summed sensitivities over it.
        costs: before they take in any candidate; those in the folder are taken in by the reader.
        original: figures of the original network in the first runtime, on the search split.
    """
    models = [*costs.latency_ms.items(), *costs.sizes.items()]
    data = {
        "version": _VERSION,
        "original_ms": costs.original_ms,
        "original_metric": original.metric.value,
        "metric_unit": original.metric.unit,
        "device": original.latency.device,
        "parameters": [_parameter_row(p) for p in space.parameters],
        "fixed": Plan(space.fixed).to_rows(),
        "loss": _sum_row(loss),
        "latency_ms": {name: _sum_row(m.corrected()) for name, m in costs.latency_ms.items()},
        "sizes": {name: _sum_row(m.corrected()) for name, m in costs.sizes.items()},
        "deviations": {name: _deviation(model) for name, model in models},
    }
    write_whole(folder / _FILE, json.dumps(data, separators=(",", ":")).encode())


def read_models(run: Path) -> KeptModels:
    """Read what `keep_models` wrote.

    Raises:
        RunFolderError: the file is missing, of another version, or cannot be read.
    """
    path = run / _FILE
    if not path.is_file():
        raise RunFolderError(
            "The run folder holds no models to solve from.", given=path, advice=_SEARCH_ANEW
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if version != _VERSION:
            raise RunFolderError(
                "The run's models are of another version of autocompress.",
                given=f"version {version} in {path}",
                allowed=f"version {_VERSION}",
                advice=_SEARCH_ANEW,
            )
        return _models(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, PlanError) as cause:
        raise RunFolderError(
            f"The run's models cannot be read: {cause}", given=path, advice=_SEARCH_ANEW
        ) from cause


def keep_source(folder: Path, experiment: Path) -> None:
    """Note which file an experiment was read from: its workload is found by it."""
    write_json(folder / _SOURCE, {"experiment": str(experiment.resolve())})


def read_source(run: Path) -> Path:
    """The experiment file that `keep_source` noted.

    Raises:
        RunFolderError: it was not noted, or is not there any more.
    """
    try:
        path = Path(json.loads((run / _SOURCE).read_text(encoding="utf-8"))["experiment"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise RunFolderError(
            "The run folder does not say which file its experiment was read from.",
            given=run / _SOURCE,
            advice="name the file with --experiment",
        ) from cause
    if not path.is_file():
        raise RunFolderError(
            "The run's experiment file is gone.",
            given=path,
            advice="say where it is now with --experiment",
        )
    return path


def indices_of(space: Space, plan: Plan) -> dict[str, int] | None:
    """The parameter values that a plan stands for, zeros left out; None for another space's plan.

    Inverse of `Space.plan`, but for values that it leaves out of the plan.
    """
    return _read_back(space, _values(space), plan)


def observations(
    space: Space, evaluations: Iterable[Evaluation]
) -> list[tuple[dict[str, int], Evaluation]]:
    """Candidates with their parameter values; references and plans not of the space are left out.

    Their own plans count: what another step makes void is not in them. Training is no choice of
    most spaces, so that trained candidates are left out there.
    """
    values = _values(space)
    pairs = [
        (_read_back(space, values, read_plan(evaluation.plan)), evaluation)
        for evaluation in evaluations
        if evaluation.plan
    ]
    return [(indices, evaluation) for indices, evaluation in pairs if indices is not None]


_Values = Mapping[tuple[str, Decision], tuple[str, int]]


def _values(space: Space) -> _Values:
    """The parameter and its value that stand for a decision about a target."""
    return {
        (target, decision): (parameter.name, index)
        for parameter in space.parameters
        for target in parameter.targets
        for index, decision in enumerate(parameter.decisions, start=1)
    }


def _read_back(space: Space, values: _Values, plan: Plan) -> dict[str, int] | None:
    found: dict[str, int] = {}
    for step in plan.steps:
        if step in space.fixed:
            continue
        name, index = values.get((step.target, step.decision), ("", 0))
        if not index or found.setdefault(name, index) != index:
            return None
    return found


def _deviation(model: CorrectedCost) -> float:
    mean, deviation = model.predict({})
    return deviation / abs(mean) if mean else 1.0


def _parameter_row(parameter: Parameter) -> dict[str, Any]:
    return {
        "stage": parameter.stage.name.lower(),
        "target": parameter.target,
        "tied": list(parameter.tied),
        "decisions": [
            {"technique": d.technique, **d.model_dump(mode="json")} for d in parameter.decisions
        ],
    }


def _parameter(row: Mapping[str, Any]) -> Parameter:
    target = str(row["target"])
    decisions = tuple(_decision(target, fields) for fields in row["decisions"])
    stage = Stage[str(row["stage"]).upper()]
    return Parameter(stage, target, decisions, tuple(map(str, row["tied"])))


def _decision(target: str, fields: Mapping[str, Any]) -> Decision:
    return read_plan([{"target": target, **fields}]).steps[0].decision


def _sum_row(terms: FactoredSum) -> dict[str, Any]:
    return {
        "constant": terms.constant,
        "factors": [
            {"name": f.name, "parameters": list(f.parameters), "values": f.values.tolist()}
            for f in terms.factors
        ],
    }


def _models(data: Mapping[str, Any]) -> KeptModels:
    parameters = tuple(_parameter(row) for row in data["parameters"])
    entries = {p.name: p.highest + 1 for p in parameters}
    latency = {str(name): _sum(row, entries) for name, row in data["latency_ms"].items()}
    sizes: dict[Objective, FactoredSum] = {
        name: _sum(data["sizes"][name], entries)
        for name in get_args(Objective)
        if name in data["sizes"]
    }
    deviations = {name: _positive(data["deviations"][name]) for name in (*latency, *sizes)}
    if not latency:
        raise ValueError("no runtime is known")
    return KeptModels(
        space=Space(parameters, read_plan(data["fixed"]).steps),
        loss=_sum(data["loss"], entries),
        latency_ms=latency,
        sizes=sizes,
        deviations=deviations,
        original_ms=_positive(data["original_ms"]),
        original_metric=float(data["original_metric"]),
        metric_unit=str(data["metric_unit"]),
        device=str(data["device"]),
    )


def _positive(value: Any) -> float:
    if not (math.isfinite(float(value)) and float(value) > 0):
        raise ValueError(f"{value} is not above zero")
    return float(value)


def _sum(row: Mapping[str, Any], entries: Mapping[str, int]) -> FactoredSum:
    return FactoredSum(float(row["constant"]), tuple(_factor(f, entries) for f in row["factors"]))


def _factor(row: Mapping[str, Any], entries: Mapping[str, int]) -> Factor:
    names = tuple(map(str, row["parameters"]))
    values = np.array(row["values"], dtype=np.float64)
    if values.shape != tuple(entries[name] for name in names):
        raise ValueError(f"table {row['name']} does not have an entry per value of its parameters")
    return Factor(str(row["name"]), names, values)
