"""Regression, detection, segmentation and time series, from the check to the scored file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import small_workloads
import torch
from candidates import Candidates, run

import autocompress
from autocompress.measure.table.cut import cut_file
from autocompress.plan import Plan, Step
from autocompress.techniques import NETWORK
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision
from autocompress.techniques.recovery import Recover
from autocompress.workload import check_workload, network_outputs, score

INT8 = Precision(weight_bits=8, activation_bits=8)
HALF = FilterPrune(pruning_ratio=0.5)
MILD = FilterPrune(pruning_ratio=0.125)
# How far int8 may fall, and an eighth of the channels, in the metric's own unit.
LOSSES = {
    "regression": (0.03, 0.2),
    "detection": (0.12, 0.5),
    "segmentation": (0.1, 0.5),
    "series": (0.15, 0.5),
}


@pytest.fixture(scope="module", params=LOSSES)
def case(request, tmp_path_factory) -> tuple[str, Candidates]:
    workload = getattr(small_workloads, request.param)()
    return request.param, Candidates(workload, tmp_path_factory.mktemp(request.param))


def scored(candidates: Candidates, name: str, plan: Plan) -> float:
    split = candidates.workload.search_split
    outputs = run(candidates.session(name, plan), split.inputs)
    return score(candidates.workload.metric, outputs, split.targets)


def test_the_workload_is_sound(case):
    name, candidates = case
    assert check_workload(candidates.workload) == ()
    assert any(group.prunable for group in candidates.graph.groups), name


def test_files_score_what_their_networks_score(case):
    name, candidates = case
    workload = candidates.workload
    split = workload.search_split
    plans = {
        "original": Plan(),
        "pruned": candidates.groups(HALF),
        "low_rank": candidates.layers(LowRank(kind="svd", rank_ratio=0.5)),
        "both": Plan((*candidates.groups(HALF).steps, *candidates.layers(INT8).steps)),
    }
    for label, plan in plans.items():
        outputs = network_outputs(candidates.network(plan), split.inputs)
        found = run(candidates.session(label, plan), split.inputs)
        assert len(outputs) == len(found) == (2 if name == "detection" else 1)
        assert [o.shape for o in outputs] == [o.shape for o in found]
        if label != "both":
            for mine, wanted in zip(found, outputs, strict=True):
                assert np.abs(mine - wanted).max() <= 1e-3 * np.abs(wanted).max()


def test_compression_costs_what_it_should(case):
    name, candidates = case
    original = scored(candidates, "original", Plan())
    plans = (candidates.layers(INT8), candidates.groups(MILD))
    losses = [original - scored(candidates, "candidate", plan) for plan in plans]
    assert all(plan.steps for plan in plans)
    assert np.less(losses, LOSSES[name]).all(), losses


def test_pruning_makes_the_file_smaller(case):
    _, candidates = case
    sizes = [
        candidates.builder.build(label, plan).path.stat().st_size
        for label, plan in (("original", Plan()), ("pruned", candidates.groups(HALF)))
    ]
    assert sizes[1] < sizes[0]


def test_the_skeleton_serves_every_kind(case):
    _, candidates = case
    for plan in (Plan(), candidates.groups(HALF), candidates.layers(INT8)):
        assert candidates.builder.build("again", plan).details["exported_afresh"] is False


def test_distillation_brings_a_pruned_network_closer(case):
    name, candidates = case
    workload = candidates.workload
    inputs = workload.search_split.inputs
    original = network_outputs(workload.network, inputs)
    pruned = candidates.groups(FilterPrune(pruning_ratio=0.25))
    recover = Recover(method="response_feature", epochs=6, learning_rate=0.02)
    recovered = Plan((*pruned.steps, Step(NETWORK, recover)))
    away = [
        sum(
            float(np.square(found - wanted).mean() / np.square(wanted).mean())
            for found, wanted in zip(
                network_outputs(candidates.network(plan), inputs), original, strict=True
            )
        )
        for plan in (pruned, recovered)
    ]
    # Class scores are taught their probabilities and labels, not their values.
    assert away[1] < (away[0] if name in ("regression", "detection") else np.inf)


def test_gradients_are_there_for_every_kind(case):
    _, candidates = case
    plan = candidates.groups(FilterPrune(pruning_ratio=0.25, criterion="taylor"))
    assert np.isfinite(scored(candidates, "taylor", plan))


def test_a_detector_takes_images_of_other_sizes(tmp_path: Path):
    candidates = Candidates(small_workloads.detection(), tmp_path)
    plan = Plan((*candidates.groups(HALF).steps, *candidates.layers(INT8).steps))
    network, session = candidates.network(Plan()), candidates.session("original", Plan())
    (entry,) = session.get_inputs()
    assert (entry.name, entry.shape) == ("image", ["batch", 3, "height", "width"])
    small = candidates.session("small", plan)
    for size in ((1, 3, 8, 24), (3, 3, 20, 12)):
        image = torch.randn(size)
        with torch.no_grad():
            wanted = [output.numpy() for output in network(image)]
        for mine, other, reference in zip(
            run(session, (image,)), run(small, (image,)), wanted, strict=True
        ):
            np.testing.assert_allclose(mine, reference, rtol=1e-3, atol=1e-4)
            assert other.shape == reference.shape
    # Layers are timed at the sizes of the example.
    file = candidates.builder.path("original")
    assert [kind.shape for kind in cut_file(file, 2).inputs] == [(2, 3, 16, 16)]
    assert len(onnx.load(file).graph.output) == 2


@pytest.mark.slow
def test_a_search_with_two_outputs_names_and_open_axes(tiny_experiment):
    path = tiny_experiment(
        workload=f"{small_workloads.__file__}:detection", search={"trials": 8, "finalists": 3}
    )
    front = autocompress.search(path, run=path.parent / "run")
    table = front.table()
    assert set(table["role"]) >= {"original", "stock_int8", "candidate", "finalist"}
    assert float(table.loc[table["role"] == "original", "metric_test"].iloc[0]) == 1.0
    for artifact in table["artifact"]:
        model = onnx.load(front.run / artifact)
        assert [entry.name for entry in model.graph.input] == ["image"]
        assert len(model.graph.output) == 2
