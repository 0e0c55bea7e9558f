from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autocompress.build import Tried
from autocompress.config import Objective
from autocompress.errors import PlanError
from autocompress.plan import Plan
from autocompress.search.costs.corrected import CorrectedCost
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.costs.models import CostModels
from autocompress.search.refinement import Refinement, refine_seeds
from autocompress.search.seeding.lagrangian import Solution
from autocompress.search.space import Parameter, Space
from autocompress.search.starting import (
    Start,
    _useful,
    coarse_to_fine,
    frontier_seeds,
)
from autocompress.search.study import RUNTIME
from autocompress.techniques import Stage
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.workload import Split


@given(st.integers(0, 300))
def test_coarse_to_fine_is_a_permutation(count: int) -> None:
    assert sorted(coarse_to_fine(count)) == list(range(count))


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_first_few_cover_the_whole_range(count: int, taken: int) -> None:
    """No gap is wider than the range over the largest whole power of two that was taken."""
    first = sorted(coarse_to_fine(count)[:taken])
    ends = [-1, *first, count]
    widest = max(b - a for a, b in itertools.pairwise(ends))
    halvings = math.floor(math.log2(min(taken, count) + 1))
    assert widest <= math.ceil((count + 1) / 2**halvings)


def test_coarse_to_fine_by_hand() -> None:
    assert coarse_to_fine(7) == [3, 1, 5, 0, 2, 4, 6]
    assert coarse_to_fine(1) == [0]


def solution(loss: float, cost: float) -> Solution:
    return Solution({"p": round(1000 * loss)}, loss, cost, feasible=True)


def test_useful_are_the_cheapest_free_plan_and_those_of_a_bearable_loss() -> None:
    found = [
        solution(x, c) for x, c in ((0, 10), (1e-4, 9), (9e-4, 8), (0.01, 7), (0.7, 2), (2, 1))
    ]
    useful = _useful(found)
    assert sorted((s.loss, s.cost) for s in useful) == [(9e-4, 8), (0.01, 7), (0.7, 2)]
    assert [s.loss for s in useful] == [0.01, 9e-4, 0.7]
    # Of equal losses the cheaper.
    assert _useful([solution(0, 5), solution(0, 3)]) == [solution(0, 3)]
    assert _useful([]) == []
    assert _useful([solution(5.0, 1.0)]) == []
    assert _useful([solution(0.3, 1.0), solution(0.1, 2.0)], 0.2) == [solution(0.1, 2.0)]


PARAMETERS = ("a", "b", "c", "d")


def table(constant: float, rows: Sequence[Sequence[float]]) -> FactoredSum:
    pairs = zip(PARAMETERS, rows, strict=True)
    return FactoredSum(constant, tuple(Factor(n, (n,), np.array(r)) for n, r in pairs))


LOSS = table(0.0, [(0, 0.01, 0.05), (0, 0.02, 0.1), (0, 0.03, 0.2), (0, 0.001, 0.5)])
LATENCY = table(0.1, [(4, 2, 1), (3, 2, 1), (2, 1.5, 1), (5, 4, 1)])
OTHER = table(0.2, [(1, 0.9, 0.1), (1, 0.9, 0.1), (5, 4, 1), (5, 4, 1)])
BYTES = table(100, [(10, 9, 1), (10, 9, 1), (10, 9, 1), (500, 400, 1)])


def models() -> CostModels:
    return CostModels(
        {"one": CorrectedCost(LATENCY), "two": CorrectedCost(OTHER)},
        {"file_bytes": CorrectedCost(BYTES)},
        original_ms=14.0,
    )


def seeds_of(objectives: tuple[Objective, ...]) -> list[dict[str, int]]:
    return [dict(seed) for seed in frontier_seeds(LOSS, models(), objectives, ("one", "two"))]


def plain(seed: dict[str, int]) -> dict[str, int]:
    return {name: seed.get(name, 0) for name in PARAMETERS}


def test_seeds_are_on_the_frontier_of_their_cost() -> None:
    """No plan at all loses less and costs no more, for the runtime that a seed names."""
    every = [dict(zip(PARAMETERS, v, strict=True)) for v in np.ndindex(3, 3, 3, 3)]
    seeds = seeds_of(("metric", "latency"))
    assert {seed[RUNTIME] for seed in seeds} == {0, 1}
    for seed in seeds:
        cost = (LATENCY, OTHER)[seed[RUNTIME]]
        mine = plain(seed)
        assert LOSS.value(mine) <= 0.7
        assert not any(
            LOSS.value(p) < LOSS.value(mine) - 1e-9 and cost.value(p) <= cost.value(mine) + 1e-9
            for p in every
        )
    # Runtimes take turns, and no plan comes twice for one of them.
    assert [seed[RUNTIME] for seed in seeds[:4]] == [0, 1, 0, 1]
    assert len({tuple(sorted(seed.items())) for seed in seeds}) == len(seeds)
    # From nearly nothing lost to a good deal.
    losses = sorted(LOSS.value(plain(seed)) for seed in seeds if seed[RUNTIME] == 0)
    assert losses[0] < 0.02
    assert losses[-1] > 0.3


def test_sizes_are_solved_for_once_whatever_the_runtimes() -> None:
    sized = seeds_of(("metric", "file_bytes"))
    assert sized
    assert {seed[RUNTIME] for seed in sized} == {0}
    # Nearly all the bytes are in the last layer.
    assert all(seed["d"] > 0 for seed in sized if LOSS.value(plain(seed)) > 0.01)
    both = seeds_of(("metric", "latency", "file_bytes"))
    latency = seeds_of(("metric", "latency"))
    assert len(both) == len(sized) + len(latency)
    assert both[:3] == [latency[0], latency[1], sized[0]]


def test_what_has_no_model_gives_no_seeds() -> None:
    assert seeds_of(("metric", "energy")) == []
    assert frontier_seeds(LOSS, CostModels(), ("metric", "latency"), ("one",)) == []


SPACE = Space(
    tuple(
        Parameter(Stage.PRUNE, n, (FilterPrune(pruning_ratio=0.3), FilterPrune(pruning_ratio=0.6)))
        for n in PARAMETERS
    )
)


def in_space(terms: FactoredSum) -> FactoredSum:
    named = [Factor(f.name, (f"{f.name}|prune",), f.values) for f in terms.factors]
    return FactoredSum(terms.constant, tuple(named))


class Scene:
    """A network whose output moves with every decision; the device is kept busy in between."""

    def __init__(self, folder: Path) -> None:
        self.tried: list[str] = []
        self.busy = 0
        self.over = False
        x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
        network = nn.Identity().eval()
        self.prepared: Any = SimpleNamespace(
            space=SPACE,
            folder=SimpleNamespace(path=folder),
            experiment=SimpleNamespace(search=SimpleNamespace(seed=0)),
            workload=SimpleNamespace(network=network, class_scores=True),
        )
        self.builder: Any = SimpleNamespace(
            sample_inputs=(x,), sample=Split(x[-4:]), network=self._network
        )
        self.refinement = self.refinement_of(math.inf)

    def refinement_of(self, each_s: float) -> Refinement:
        return Refinement(self.prepared, self.builder, self.keep_busy, self.stop, each_s)

    def _network(self, plan: Plan, clock: Any) -> Tried:
        self.tried.append(plan.hash)
        total = sum(getattr(s.decision, "pruning_ratio", 0.0) for s in plan.steps)
        if total > 2.2:
            raise PlanError("Too much of it.")
        outputs = self.builder.sample_inputs[0] * (1 + total)
        # Nobody is judged by the calibration inputs, which layers are solved with.
        outputs[:8] = 1e3
        return Tried(nn.Identity(), [outputs])

    def keep_busy(self) -> None:
        self.busy += 1

    def stop(self) -> bool:
        return self.over


def test_refined_seeds_are_scored_once_and_remembered(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    loss, cost = in_space(LOSS), in_space(LATENCY)
    seeds = [dict(seed) for seed in scene.refinement.seeds(loss, cost, 1)]
    assert len(seeds) == 3
    assert {seed.pop(RUNTIME) for seed in seeds} == {1}
    assert scene.tried
    assert len(scene.tried) == len(set(scene.tried)) == scene.busy
    lines = [json.loads(x) for x in (tmp_path / "refinement.jsonl").read_text().splitlines()]
    assert len(lines) == len(scene.tried)
    again = Scene(tmp_path)
    repeated = [dict(seed) for seed in again.refinement.seeds(loss, cost, 1)]
    assert not again.tried
    assert [{k: v for k, v in seed.items() if k != RUNTIME} for seed in repeated] == seeds


def test_scores_are_of_the_search_split_and_infinite_where_nothing_is_built(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path)
    x = scene.builder.sample.inputs[0].double()
    indices = {"a|prune": 1}
    p, q = x.softmax(1), (1.3 * x).softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert scene.refinement._score(indices) == pytest.approx(expected, rel=1e-3)
    everything = {f"{name}|prune": 2 for name in PARAMETERS}
    assert scene.refinement._score(everything) == math.inf


def test_refinement_stops_when_time_is_up(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    seeds = scene.refinement.seeds(in_space(LOSS), in_space(LATENCY), 0)
    next(seeds)
    tried = len(scene.tried)
    assert tried
    scene.over = True
    assert list(seeds) == []
    assert len(scene.tried) == tried


def test_each_plan_has_its_own_time(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    seeds = list(scene.refinement_of(-1.0).seeds(in_space(LOSS), in_space(LATENCY), 0))
    assert len(seeds) == 3
    assert len(scene.tried) == 3


@pytest.mark.parametrize("reason", ["no loss", "no latency", "over"])
def test_nothing_is_refined_without_need(tmp_path: Path, reason: str) -> None:
    scene = Scene(tmp_path)
    objectives = ("metric", "file_bytes") if reason == "no latency" else ("metric", "latency")
    context: Any = SimpleNamespace(
        objectives=objectives, prepared=scene.prepared, runtimes=("one", "two"),
        evaluator=SimpleNamespace(builder=scene.builder),
    )  # fmt: skip
    enqueued: list[Any] = []
    study: Any = SimpleNamespace(enqueue=enqueued.extend)
    start = Start(None if reason == "no loss" else in_space(LOSS), models())
    refine_seeds(context, study, start, scene.keep_busy, lambda: 0.0 if reason == "over" else 9.0)
    assert not enqueued
    assert not scene.tried


def test_every_runtime_with_a_model_gets_refined_seeds(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    context: Any = SimpleNamespace(
        objectives=("metric", "latency"), prepared=scene.prepared,
        runtimes=("one", "unknown", "two"), evaluator=SimpleNamespace(builder=scene.builder),
    )  # fmt: skip
    enqueued: list[Any] = []
    study: Any = SimpleNamespace(enqueue=enqueued.extend)
    costs = CostModels(
        {"one": CorrectedCost(in_space(LATENCY)), "two": CorrectedCost(in_space(OTHER))}
    )
    refine_seeds(context, study, Start(in_space(LOSS), costs), scene.keep_busy, lambda: math.inf)
    assert [seed[RUNTIME] for seed in enqueued] == [0, 0, 0, 2, 2, 2]
