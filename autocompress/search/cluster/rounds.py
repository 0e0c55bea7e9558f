"""The survivors' rounds as trials of Tune: trained on any node, on a GPU where nodes have one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import ray
from ray import tune

from autocompress.errors import OutOfTimeError
from autocompress.evaluation import Evaluation
from autocompress.plan import Plan
from autocompress.recover import Watch
from autocompress.search.cluster.candidate import BROKEN, FAILURE, FIGURES, NODE, SharedReference
from autocompress.search.cluster.connect import Cluster
from autocompress.search.cluster.halving import Halving, Rungs
from autocompress.search.cluster.study_search import FINISHED
from autocompress.search.cluster.tuning import Race, run_trials
from autocompress.search.cluster.workshop import Broken, Failure, Workshop
from autocompress.search.survivors import ROUNDS, Shape, Trained, plan_of
from autocompress.techniques import read_plan

SHAPE, STEPS, EPOCHS, WAYS, DEADLINE = "shape", "steps", "epochs", "ways", "deadline_s"
_CHECKPOINT = "round.json"
# A round that the deadline ends may still measure what it has.
_GRACE_S = 60.0


@final
class Survivor(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """Trains a shape round by round; each step is a round, and gives the figures of its files.

    What a round has trained is kept in the search's location, from where any node goes on.
    """

    def setup(self, config: Mapping[str, Any], shared: SharedReference | None = None) -> None:
        """Take a trial's configuration."""
        assert shared is not None
        self._shared = shared
        self.reset_config(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Workers are used again."""
        self._config, self._number = dict(new_config), 0
        return True

    def step(self) -> dict[str, Any]:
        """Train the next round, then build and measure its files."""
        config = self._config
        shape = Shape(read_plan(config[STEPS]), 0.0, _ways(config), config[EPOCHS])
        watch = Watch(stop=lambda: time.time() > config[DEADLINE])
        found, reasons = [], []
        for way, runtime in shape.ways:
            plan = plan_of(shape, way, self._number)
            measure = partial(
                Workshop.measure, plan=plan, runtime=runtime, node=config[NODE], watch=watch
            )
            result = self._shared.attempt(measure)
            if isinstance(result, Broken):
                return {"done": True, BROKEN: result.error}
            if isinstance(result, Failure):
                reasons.append(result.reason)
                if result.reason.startswith(OutOfTimeError.__name__):
                    break
                continue
            found.append(json.dumps(result.to_dict()))
        self._number += 1
        if not found:
            return {"done": True, FAILURE: "; ".join(reasons)}
        return {"done": self._number == ROUNDS, FIGURES: found}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Which round is next; the weights are in the search's location."""
        Path(checkpoint_dir, _CHECKPOINT).write_text(json.dumps(self._number), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on with the round that was next."""
        text = Path(checkpoint, _CHECKPOINT).read_text(encoding="utf-8")
        self._number = int(json.loads(text))


def _ways(config: Mapping[str, Any]) -> tuple[tuple[Plan, str], ...]:
    return tuple((read_plan(rows), runtime) for rows, runtime in config[WAYS])


@final
@dataclass
class Rounds:
    """The race of all shapes: hands them to Tune and takes in what comes of them.

    Args:
        shapes: in the order in which they are begun.
        nodes: how many nodes measure.
        deadline_s: when training ends, in seconds since 1970.
        half: of shapes after a round those that go on.
        done: called with each shape after each round.
        over: whether time is up.
    """

    shapes: list[Shape]
    nodes: int
    deadline_s: float
    half: Callable[[list[Trained]], list[Shape]]
    done: Callable[[int, Trained], None]
    over: Callable[[], bool]

    def __post_init__(self) -> None:
        self._waiting = list(enumerate(self.shapes))
        self.rungs: Rungs[Trained] = Rungs(ROUNDS, self._better)
        self._configs: dict[str, int] = {}
        self.error: BaseException | None = None

    def _better(self, trained: Any) -> list[Trained]:
        # One alone is its own better half; a shape that cannot be compared yet waits for others.
        chosen = self.half(list(trained))
        return [t for t in trained if any(t.shape is shape for shape in chosen)]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See `TrialSource.suggest`."""
        if not self._waiting or self.over() or self.error is not None:
            return FINISHED
        index, shape = self._waiting.pop(0)
        self._configs[trial_id] = index
        return {
            SHAPE: index,
            STEPS: shape.steps.to_rows(),
            EPOCHS: shape.epochs,
            WAYS: [(way.to_rows(), runtime) for way, runtime in shape.ways],
            NODE: index % self.nodes,
            DEADLINE: self.deadline_s,
        }

    def complete(self, trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        """Every round was taken in with its result."""

    def pump(self) -> None:
        """Nothing to do between events."""

    def trained(self, config: Mapping[str, Any], result: Mapping[str, Any]) -> Trained | None:
        """What a round's result says; None if it failed."""
        if BROKEN in result:
            self.error = result[BROKEN]
        if FIGURES not in result:
            return None
        found = tuple(Evaluation.from_dict(json.loads(text)) for text in result[FIGURES])
        shape = self.shapes[config[SHAPE]]
        trained = Trained(shape, found)
        try:
            self.done(result["training_iteration"] - 1, trained)
        except BaseException as error:
            # Raised by `race`: Tune would only print it.
            self.error = error
            return None
        return trained


def race_shapes(
    rounds: Rounds,
    cluster: Cluster,
    shared: SharedReference,
    storage: str,
    modes: Mapping[str, str],
) -> None:
    """Train shapes on a cluster until all rounds or the time are over.

    Args:
        storage: where Tune keeps the trials' checkpoints: a folder that all nodes see.
    """
    gpus = ray.cluster_resources().get("GPU", 0.0)
    resources: dict[str, float] = {"cpu": 1 if cluster.cpus > 1 else 0.5}
    if gpus:
        resources["gpu"] = 1
    scheduler = Halving(rounds.rungs, rounds.trained, lambda config: str(config[SHAPE]))
    run_trials(
        Survivor,
        shared,
        rounds,
        Race(
            "survivors",
            modes,
            resources,
            storage,
            scheduler,
            rounds.over,
            lambda: rounds.error is not None or time.time() > rounds.deadline_s + _GRACE_S,
        ),
    )
    if rounds.error is not None:
        raise rounds.error
