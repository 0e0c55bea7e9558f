from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import RunFolderError
from autocompress.plan import Plan, Step
from autocompress.search.costs.corrected import CorrectedCost, CorrectionSettings
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.costs.models import CostModels
from autocompress.search.kept_models import (
    indices_of,
    keep_models,
    keep_source,
    observations,
    read_models,
    read_source,
)
from autocompress.search.space import Parameter, Space
from autocompress.techniques import NETWORK, Stage
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.precision import Precision
from autocompress.techniques.recovery import Recover

RATIOS = tuple(FilterPrune(pruning_ratio=r) for r in (0.25, 0.5))
INT8 = (Precision(weight_bits=8, activation_bits=8),)
FIXED = Step("head", Precision(weight_bits=4, activation_bits=32))
SPACE = Space(
    (
        Parameter(Stage.PRUNE, "a", RATIOS),
        Parameter(Stage.PRUNE, "b", RATIOS, ("c", "d")),
        Parameter(Stage.QUANTIZE, "a.conv", INT8),
    ),
    (FIXED,),
)
NAMES = [p.name for p in SPACE.parameters]
finite = st.floats(-1e6, 1e6)


def table(name, parameters, values):
    return Factor(name, parameters, np.array(values, dtype=np.float64))


def costs_of(latency):
    guess = CorrectedCost(latency, CorrectionSettings(common_sd=0.5))
    return CostModels({"onnxruntime": CorrectedCost(latency), "other@one": guess}, {}, 2.0)


LATENCY = FactoredSum(
    0.1, (table("a", ("a|prune", "a.conv|quantize"), [[1.0, 0.5], [0.7, 0.4], [0.5, 0.3]]),)
)


def keep(folder, make_evaluation, loss=LATENCY, costs=None):
    original = make_evaluation("original", 0.9, 1.0)
    keep_models(folder, SPACE, loss, costs or costs_of(LATENCY), original)
    return read_models(folder)


@settings(max_examples=20, deadline=None)
@given(st.lists(finite, min_size=7, max_size=7))
def test_what_is_kept_is_read_back_bit_for_bit(tmp_path_factory, make_evaluation, values):
    loss = FactoredSum(
        values[0],
        (table("x", ("a|prune", "a.conv|quantize"), np.reshape(values[1:], (3, 2))),),
    )
    kept = keep(tmp_path_factory.mktemp("run"), make_evaluation, loss)
    assert kept.space == SPACE
    assert kept.loss.constant == loss.constant
    (found,), (wanted,) = kept.loss.factors, loss.factors
    assert (found.name, found.parameters) == (wanted.name, wanted.parameters)
    assert np.array_equal(found.values, wanted.values)
    assert kept.runtimes == ("onnxruntime", "other@one")
    assert (kept.original_ms, kept.original_metric, kept.metric_unit) == (2.0, 0.9, "share")


def test_a_guess_is_kept_as_less_sure(tmp_path, make_evaluation):
    kept = keep(tmp_path, make_evaluation)
    assert kept.deviations["other@one"] > 2 * kept.deviations["onnxruntime"] > 0


def test_kept_models_learn_from_measured_candidates(tmp_path, make_evaluation):
    kept = keep(tmp_path, make_evaluation)
    measured = []
    for a, q in itertools.product(range(3), range(2)):
        plan = SPACE.plan({"a|prune": a, "a.conv|quantize": q})
        true_ms = 1.6 * LATENCY.value({"a|prune": a, "a.conv|quantize": q})
        measured.append(make_evaluation(plan.hash, 0.9, 2.0 / true_ms, plan=plan))
    costs = kept.cost_models(observations(SPACE, measured))
    wanted = {"a|prune": 2, "a.conv|quantize": 1}
    found = costs.predict(wanted, "onnxruntime")["latency"].value * costs.original_ms
    assert found == pytest.approx(1.6 * LATENCY.value(wanted), rel=0.03)
    untouched = costs.predict(wanted, "other@one")["latency"].value * costs.original_ms
    assert untouched == pytest.approx(LATENCY.value(wanted))


def test_indices_are_read_back_from_every_plan():
    for values in itertools.product(*(range(p.highest + 1) for p in SPACE.parameters)):
        indices = {name: i for name, i in zip(NAMES, values, strict=True) if i}
        assert indices_of(SPACE, SPACE.plan(indices)) == indices


def test_plans_of_other_spaces_have_no_indices():
    inside = SPACE.plan({"b|prune": 1})
    trained = Plan((*inside.steps, Step(NETWORK, Recover(epochs=1.0))))
    torn = Plan((Step("b", RATIOS[0]), Step("c", RATIOS[1])))
    assert indices_of(SPACE, inside) == {"b|prune": 1}
    assert indices_of(SPACE, trained) is None
    assert indices_of(SPACE, torn) is None


def test_references_are_not_taken_for_the_unchanged_plan(make_evaluation):
    plan = SPACE.plan({"a|prune": 1})
    measured = [
        make_evaluation("stock_int8", 0.9, 3.0),
        make_evaluation("x", 0.9, 1.0, plan=plan),
        make_evaluation("y", 0.9, 1.0, plan=SPACE.plan({})),
    ]
    found = [(indices, e.candidate) for indices, e in observations(SPACE, measured)]
    assert found == [({"a|prune": 1}, "x"), ({}, "y")]


def test_missing_models_say_how_to_get_them(tmp_path):
    with pytest.raises(RunFolderError, match="seeds"):
        read_models(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.pop("loss"), "loss"),
        (lambda d: d["loss"]["factors"][0].update(values=[[1.0, 2.0]]), "entry"),
        (lambda d: d["loss"]["factors"][0].update(parameters=["a|prune", "gone"]), "gone"),
        (lambda d: d["parameters"][0]["decisions"][0].update(pruning_ratio=7), "pruning_ratio"),
        (lambda d: d.update(original_ms=0), "zero"),
        (lambda d: d.update(latency_ms={}), "runtime"),
    ],
)
def test_damaged_models_are_refused(tmp_path, make_evaluation, change, said):
    keep(tmp_path, make_evaluation)
    path = tmp_path / "models.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(RunFolderError, match=said):
        read_models(tmp_path)


def test_half_a_file_is_refused(tmp_path, make_evaluation):
    keep(tmp_path, make_evaluation)
    path = tmp_path / "models.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_models(tmp_path)


def test_the_source_is_read_back_while_it_is_there(tmp_path):
    experiment = tmp_path / "one.yaml"
    experiment.write_text("version: 1")
    with pytest.raises(RunFolderError, match="--experiment"):
        read_source(tmp_path)
    keep_source(tmp_path, experiment)
    assert read_source(tmp_path) == experiment
    experiment.unlink()
    with pytest.raises(RunFolderError, match="gone"):
        read_source(tmp_path)
