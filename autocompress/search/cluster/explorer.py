"""The search on a cluster: the same agenda as on one machine, worked off by Ray Tune.

Trials of Tune are candidates that are built and measured. Further actors judge plans meanwhile, so
that the most promising ones are measured.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError

from autocompress.evaluation import Evaluation
from autocompress.search.agenda import Agenda, Task
from autocompress.search.cluster.candidate import (
    BROKEN,
    FAILURE,
    FIGURES,
    NODE,
    PLAN,
    RUNTIME,
    TASK,
    Candidate,
    PlanJudge,
    SharedReference,
)
from autocompress.search.cluster.connect import Cluster
from autocompress.search.cluster.own_folder import TUNE, OwnFolder
from autocompress.search.cluster.study_search import FINISHED
from autocompress.search.cluster.tuning import MOST_LOST, Race, modes_of, run_trials
from autocompress.search.cluster.workshop import Broken, Failure
from autocompress.search.context import SearchContext
from autocompress.search.study import Proposal

# Candidates under way for each node that measures: one is built while another one is measured.
_AHEAD, _AHEAD_CODED = 2, 6
# Judging actors for each of these.
_JUDGES = 4
# Plans that wait at each judging actor, so that it is never idle.
_QUEUED = 2
_LOOK_ROUND_S = 10.0


@final
@dataclass(frozen=True)
class Crew:
    """How a cluster's CPUs are shared out.

    Attributes:
        judges: actors that judge.
        trials: candidates under way at a time.
        cpus: of each of them; below 1 where there are few CPUs.
    """

    judges: int
    trials: int
    cpus: float

    @staticmethod
    def of(cpus: float, nodes: int, *, coded: bool) -> Crew:
        """For a cluster of so many CPUs and nodes that measure.

        Args:
            coded: whether a candidate's container is made, which takes longer than measuring it.
        """
        trials = (_AHEAD_CODED if coded else _AHEAD) * nodes
        judges = _judges_beside(trials, cpus)
        return Crew(judges, trials, min(1.0, int(100 * cpus / (judges + trials)) / 100))

    def judges_now(self, cpus: float) -> int:
        """How many judge while the cluster has so many CPUs: nodes come and go.

        One candidate at least must find room beside them.
        """
        room = int(cpus / self.cpus + 1e-6) - 1
        return max(1, min(_judges_beside(self.trials, cpus), room))


def _judges_beside(trials: int, cpus: float) -> int:
    # More would only judge what is never measured.
    return max(1, min(int(cpus) - trials, _JUDGES * trials))


@final
@dataclass
class _Look:
    """A plan that is being judged."""

    proposal: Proposal
    judge: ActorHandle | None = None
    lost: int = 0


@final
class ClusterExplorer:
    """Keeps the devices of a cluster busy with the most promising plans.

    Args:
        agenda: says what is next.
        cluster: where it is done.
        shared: what the processes of the cluster need.
        context: the search.
        bring: called with a measured candidate's evaluation before it counts; fetches its files.
    """

    def __init__(
        self,
        agenda: Agenda,
        cluster: Cluster,
        shared: SharedReference,
        context: SearchContext,
        bring: Callable[[Evaluation], None],
    ) -> None:
        self._agenda, self._cluster, self._shared = agenda, cluster, shared
        self._bring, self._note = bring, context.progress.note
        self._objectives = modes_of(context.objectives)
        coded = context.evaluator.extras.coded
        self._crew = Crew.of(cluster.cpus, len(cluster.nodes), coded=coded)
        self._judges: list[ActorHandle] = []
        self._looks: dict[ObjectRef, _Look] = {}
        self._again: deque[_Look] = deque()
        self._tasks: dict[str, tuple[Task, int]] = {}
        self._error: BaseException | None = None
        self._seen_s = time.monotonic()
        self._away = self._short = False

    def run(self) -> None:
        """Search until nothing is allowed any more or no new plan is found.

        Raises:
            SearchError: too many candidates failed in a row.
        """
        # No checkpoints are written, so nobody else need see the folder.
        folder = OwnFolder(TUNE)
        try:
            race = Race(
                "search",
                self._objectives,
                {"cpu": self._crew.cpus},
                str(folder.path),
                workers=self._workers,
                abandoned=lambda: self._error is not None,
            )
            run_trials(Candidate, self._shared, self, race)
        finally:
            folder.remove()
            for judge in self._judges:
                ray.kill(judge)
        if self._error is not None:
            raise self._error
        self._agenda.close()

    # --- what Tune asks

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See `TrialSource.suggest`."""
        found: dict[str, Any] | str | None = self._kept(lambda: self._suggest(trial_id))
        return found

    def complete(self, trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        """See `TrialSource.complete`."""
        self._kept(lambda: self._complete(trial_id, result, error))

    def pump(self) -> None:
        """Take in what was judged, and hand out what is to be judged."""
        self._kept(self._pump)

    def _kept(self, call: Callable[[], Any]) -> Any:
        """What a call returns; its error ends the search and is raised by `run`, not by Tune."""
        if self._error is not None:
            return FINISHED
        try:
            return call()
        except BaseException as error:
            self._error = error
            return FINISHED

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        self._pump()
        if len(self._tasks) >= self._crew.trials:
            return None
        task = self._agenda.next_to_build()
        if task is None:
            return FINISHED if self._over() else None
        node = self._least_busy()
        self._tasks[trial_id] = (task, node)
        return {
            TASK: task.proposal.number,
            PLAN: task.proposal.plan.to_rows(),
            RUNTIME: task.proposal.runtime,
            NODE: node,
        }

    def _complete(self, trial_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        task, _ = self._tasks.pop(trial_id)
        if result and FIGURES in result:
            evaluation = Evaluation.from_dict(json.loads(result[FIGURES]))
            self._bring(evaluation)
            self._agenda.measured(task, evaluation)
        elif result and BROKEN in result:
            raise result[BROKEN]
        elif result and FAILURE in result:
            self._agenda.failed(task, result[FAILURE])
        elif error:
            lost = f"the workers that tried it were lost {MOST_LOST + 1} times"
            self._agenda.failed(task, lost)
        # Else it was stopped: its trial stays open in the study and is tried again.

    def _over(self) -> bool:
        if not self._agenda.over:
            return False
        # What is still being judged matters only while something may yet be built.
        return not self._agenda.allowed or not (self._looks or self._again)

    def _least_busy(self) -> int:
        busy = [node for _, node in self._tasks.values()]
        return min(range(len(self._cluster.nodes)), key=busy.count)

    # --- judging

    def _pump(self) -> None:
        if not self._judges or time.monotonic() - self._seen_s > _LOOK_ROUND_S:
            self._seen_s = time.monotonic()
            self._staff()
            self._watch_devices()
        if self._looks:
            ready, _ = ray.wait(list(self._looks), num_returns=len(self._looks), timeout=0)
            for reference in ready:
                # Those of a judge that was dismissed meanwhile are handed out anew.
                if reference in self._looks:
                    self._take_in(reference, self._looks.pop(reference))
        while len(self._looks) < _QUEUED * len(self._judges):
            if self._again:
                self._hand_out(self._again.popleft())
                continue
            proposal = self._agenda.next_to_judge()
            if proposal is None:
                break
            self._hand_out(_Look(proposal))

    def _hand_out(self, look: _Look) -> None:
        queued = [other.judge for other in self._looks.values()]
        look.judge = min(self._judges, key=queued.count)
        reference = look.judge.look.remote(look.proposal.plan)
        self._looks[reference] = look

    def _take_in(self, reference: ObjectRef, look: _Look) -> None:
        try:
            seen = ray.get(reference)
        except RayError as cause:
            self._lost(look, cause)
            return
        if isinstance(seen, Broken):
            raise seen.error
        if isinstance(seen, Failure):
            self._agenda.unjudgeable(look.proposal, seen.reason)
            return
        self._agenda.judged(look.proposal, self._agenda.judge(look.proposal, seen))

    def _lost(self, look: _Look, cause: RayError) -> None:
        """Judge a plan anew whose actor died."""
        if look.judge in self._judges:
            self._judges.remove(look.judge)
            self._staff()
        look.lost += 1
        if look.lost > MOST_LOST:
            reason = f"the workers that judged it were lost {look.lost} times: {cause}"
            self._agenda.unjudgeable(look.proposal, reason)
        else:
            self._again.append(look)

    def _staff(self) -> None:
        """Have as many judges as the cluster has room for at present."""
        cpus = float(ray.cluster_resources().get("CPU", 0.0))
        self._short = cpus < self._cluster.cpus
        wanted = self._crew.judges_now(cpus)
        while len(self._judges) > wanted:
            self._dismiss(self._judges.pop())
        while len(self._judges) < wanted:
            options = {"num_cpus": self._crew.cpus}
            self._judges.append(ray.remote(PlanJudge).options(**options).remote(self._shared))

    def _workers(self) -> int:
        # With nodes away, what idles must make room for judges.
        return 0 if self._short else self._crew.trials

    def _dismiss(self, judge: ActorHandle) -> None:
        ray.kill(judge)
        for reference in [r for r, look in self._looks.items() if look.judge == judge]:
            self._again.append(self._looks.pop(reference))

    def _watch_devices(self) -> None:
        """Say so if the device is away: the search waits for it."""
        away = self._cluster.away()
        if away and not self._away:
            self._note(f"{away} of {len(self._cluster.nodes)} devices are away; waiting for them")
        if self._away and not away:
            self._note("all devices are back")
        self._away = bool(away)
