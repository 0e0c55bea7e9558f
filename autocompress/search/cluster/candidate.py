"""A candidate as a trial of Ray Tune, and what judges plans beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, final

import ray
from ray import ObjectRef, tune

from autocompress.errors import AutocompressError
from autocompress.plan import Plan
from autocompress.search.cluster.workshop import Broken, Failure, Workshop, guarded, workshop_of
from autocompress.search.judge import Seen
from autocompress.techniques import read_plan

# Keys of a trial's configuration and of its result.
TASK, PLAN, RUNTIME, NODE = "task", "plan", "runtime", "node"
FIGURES, FAILURE, BROKEN = "figures", "failure", "broken"
ResultT = TypeVar("ResultT")


@final
@dataclass(frozen=True)
class SharedReference:
    """Where in Ray's object store a search's `Shared` lies."""

    token: str
    reference: ObjectRef

    def attempt(self, call: Callable[[Workshop], ResultT]) -> ResultT | Failure | Broken:
        """What a call makes of this process's workshop; see `guarded`."""
        try:
            workshop = workshop_of(self.token, lambda: ray.get(self.reference))
        except AutocompressError as error:
            return Broken(error)
        return guarded(lambda: call(workshop))


@final
class Candidate(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Builds a plan's file and has it measured; one step, one result.

    A worker that dies has Tune start the trial again elsewhere. What is the plan's own fault comes
    back as a result, and is not tried again.
    """

    def setup(self, config: Mapping[str, Any], shared: SharedReference | None = None) -> None:
        """Take a trial's configuration; see `step`."""
        assert shared is not None
        self._shared, self._config = shared, dict(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Workers are used again: making one takes seconds."""
        self._config = dict(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The figures of the candidate, or why it has none."""
        plan, runtime = read_plan(self._config[PLAN]), self._config[RUNTIME]
        found = self._shared.attempt(lambda w: w.measure(plan, runtime, self._config[NODE]))
        if isinstance(found, Broken):
            return {"done": True, BROKEN: found.error}
        if isinstance(found, Failure):
            return {"done": True, FAILURE: found.reason}
        return {"done": True, FIGURES: json.dumps(found.to_dict())}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: a candidate is built anew in less time than a checkpoint takes."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""


@final
class PlanJudge:
    """An actor that runs plans' networks on the sample that they are judged on."""

    def __init__(self, shared: SharedReference) -> None:
        self._shared = shared

    def look(self, plan: Plan) -> tuple[Seen, ...] | Failure | Broken:
        """What the plan's network makes of the samples, or why it cannot be made."""
        return self._shared.attempt(lambda workshop: workshop.look(plan))
