from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autocompress.errors import ConfigError, NoFitError, RunFolderError
from autocompress.plan import Plan, Step, candidate_name
from autocompress.search.costs.corrected import CorrectedCost
from autocompress.search.costs.factored import Factor, FactoredSum
from autocompress.search.costs.models import CostModels
from autocompress.search.kept_models import keep_models, observations, read_models
from autocompress.search.measure_solved import measure_solved
from autocompress.search.record import EVALUATION, TrialRecord
from autocompress.search.run_folder import RunFolder
from autocompress.search.solve import solve, solved_path
from autocompress.search.solve_limits import Limits
from autocompress.search.space import Parameter, Space
from autocompress.search.storage import storage_of
from autocompress.techniques import NETWORK, Stage
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.precision import Precision
from autocompress.techniques.recovery import Recover

RATIOS = tuple(FilterPrune(pruning_ratio=r) for r in (0.2, 0.4, 0.6))
INT8 = (Precision(weight_bits=8, activation_bits=8),)
LAYERS = ("a", "b", "c")
SPACE = Space(
    tuple(Parameter(Stage.PRUNE, name, RATIOS) for name in LAYERS)
    + tuple(Parameter(Stage.QUANTIZE, f"{name}.conv", INT8) for name in LAYERS)
)
PLANS = [
    dict(zip([p.name for p in SPACE.parameters], values, strict=True))
    for values in itertools.product(*(range(p.highest + 1) for p in SPACE.parameters))
]
FIRST, FAST = "onnxruntime", "fast"
SLOWER = 1.3  # than predicted, in the first runtime


def pairs(constant, unit, int8):
    """A term per layer: linear in the channels that stay, and a factor for int8."""
    kept = np.array([1.0, 0.8, 0.6, 0.4])
    terms = [
        Factor(name, (f"{name}|prune", f"{name}.conv|quantize"),
               np.outer(kept * (k + 1) * unit, [1.0, int8]))
        for k, name in enumerate(LAYERS)
    ]  # fmt: skip
    return FactoredSum(constant, tuple(terms))


def losses():
    levels = [
        Factor(name, (f"{name}|prune",), np.array([0.0, 0.01, 0.03, 0.1]) / (k + 1))
        for k, name in enumerate(LAYERS)
    ]
    bits = [
        Factor(name, (f"{name}.conv|quantize",), np.array([0.0, 0.004 * (k + 1)]))
        for k, name in enumerate(LAYERS)
    ]
    return FactoredSum(0.0, (*levels, *bits))


LATENCY = {FIRST: pairs(0.1, 0.15, 0.4), FAST: pairs(0.05, 0.12, 0.9)}
BYTES = pairs(100.0, 200.0, 0.25)
LOSS = losses()
ORIGINAL_METRIC = 0.9


def measured(make_evaluation, indices, runtime):
    """A stand-in for measuring: the drop is a tenth of the root of the loss, as a model has it."""
    plan = SPACE.plan(indices)
    true_ms = LATENCY[runtime].value(indices) * (SLOWER if runtime == FIRST else 1.0)
    evaluation = make_evaluation(
        candidate_name(plan.hash, runtime, FIRST),
        ORIGINAL_METRIC - 0.1 * LOSS.value(indices) ** 0.5,
        1.0 / true_ms,
        plan=plan,
        file_bytes=round(BYTES.value(indices)),
    )
    return evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_evaluation):
    """A folder as a search leaves it: models, reference points, and two dozen candidates."""
    folder = tmp_path_factory.mktemp("run")
    original = make_evaluation("original", ORIGINAL_METRIC, 1.0, file_bytes=5000)
    costs = CostModels(
        {name: CorrectedCost(prior) for name, prior in LATENCY.items()},
        {"file_bytes": CorrectedCost(BYTES)},
        1.0,
    )
    keep_models(folder, SPACE, LOSS, costs, original)
    (folder / "finals").mkdir()
    RunFolder(folder).save_evaluation(original)
    chosen = np.random.default_rng(0).choice(len(PLANS) - 1, 24, replace=False) + 1
    found = [
        measured(make_evaluation, PLANS[i], FAST if k % 3 == 0 else FIRST)
        for k, i in enumerate(chosen)
    ]
    plain = SPACE.plan({"a|prune": 1})
    trained = Plan((*plain.steps, Step(NETWORK, Recover(epochs=1.0))))
    found.append(make_evaluation("trained", 0.899, 4.0, plan=trained))
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    record = TrialRecord(storage_of(folder), directions)
    for evaluation in found:
        number = record.begin({}, {}, {"candidate": evaluation.candidate})
        values = [evaluation.metric.value, 1 / evaluation.speedup.value]
        text = json.dumps(evaluation.to_dict())
        record.finish(number, TrialState.COMPLETE, values, {EVALUATION: text})
    return folder, found


def best_loss(run, limits, runtimes=(FIRST, FAST)):
    """The least loss by trying all plans in all runtimes."""
    folder, found = run
    kept = read_models(folder)
    costs = kept.cost_models(observations(kept.space, found))
    best = np.inf
    for runtime in runtimes:
        latency, size = costs.sum_of("latency", runtime), costs.sum_of("file_bytes", runtime)
        for plan in PLANS:
            keeps = (
                latency.value(plan) <= (limits.max_latency_ms or np.inf)
                and latency.value(plan) <= 1.0 / (limits.min_speedup or 1e-9)
                and size.value(plan) <= (limits.max_bytes or np.inf)
            )
            best = min(best, kept.loss.value(plan)) if keeps else best
    return best


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_latency_ms=0.6),
        Limits(min_speedup=2.2),
        Limits(max_bytes=600),
        Limits(max_latency_ms=0.7, min_speedup=1.5, max_bytes=700),
        Limits(max_latency_ms=100.0),
    ],
)
def test_the_solved_plan_is_the_best_of_all(run, limits):
    solved = solve(run[0], limits)
    assert solved.proven and solved.gap == 0
    assert solved.loss == pytest.approx(best_loss(run, limits))
    predicted = solved.predicted
    assert predicted.latency.value <= (limits.max_latency_ms or np.inf) * 1.001
    assert predicted.speedup.value >= (limits.min_speedup or 0) * 0.999
    assert predicted.file_bytes.value <= (limits.max_bytes or np.inf) * 1.001
    figures = (predicted.latency, predicted.speedup, predicted.drop, predicted.file_bytes)
    assert all(f.source == "estimated" and f.ci_low <= f.value <= f.ci_high for f in figures)


def test_predictions_have_learnt_from_the_candidates(run, make_evaluation):
    for budget in (0.5, 0.6, 0.7):
        solved = solve(run[0], Limits(max_latency_ms=budget), (FIRST,))
        true = measured(make_evaluation, _indices(solved), FIRST)
        predicted = solved.predicted
        assert predicted.latency.value == pytest.approx(true.latency.value, rel=0.04)
        assert predicted.latency.ci_low <= true.latency.value <= predicted.latency.ci_high
        drop = 100 * (ORIGINAL_METRIC - true.metric.value)
        assert predicted.drop.value == pytest.approx(drop, rel=0.02)
        assert solved.learnt_from == 24


def test_runtimes_can_be_chosen(run):
    limits = Limits(max_latency_ms=0.6)
    losses = [solve(run[0], limits, (name,)).loss for name in (FIRST, FAST)]
    free = solve(run[0], limits)
    assert losses[0] != losses[1]
    assert free.loss == min(losses)
    assert free.runtime == (FIRST, FAST)[int(np.argmin(losses))]
    with pytest.raises(ConfigError, match="onnxruntime, fast"):
        solve(run[0], limits, ("tensorrt",))


def test_measured_candidates_within_the_limits_stand_apart(run):
    folder, found = run
    limits = Limits(max_latency_ms=0.6)
    within = solve(folder, limits).within
    fitting = [e for e in found if e.latency.value <= 0.6]
    assert [c.candidate for c in within] == [
        e.candidate for e in sorted(fitting, key=lambda e: -e.metric.value)[:5]
    ]
    assert [c.trained for c in within] == [c.candidate == "trained" for c in within]
    assert within[0].candidate == "trained"
    assert all(c.figures.latency.source == "measured" for c in within)


def test_a_plan_that_was_measured_comes_with_its_figures(run, make_evaluation):
    folder, _ = run
    limits = Limits(max_bytes=800)
    before = solve(folder, limits)
    assert before.measured is None
    true = measured(make_evaluation, _indices(before), before.runtime)
    path = solved_path(folder, before.candidate)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(true.to_dict()))
    try:
        after = solve(folder, limits)
        assert after.candidate == before.candidate
        assert after.measured.latency == true.latency
        assert after.measured.file_bytes.value == true.file_bytes
        assert measure_solved(after) is after
        path.write_text("{}")
        with pytest.raises(RunFolderError, match="--measure"):
            solve(folder, limits)
    finally:
        path.unlink()


def test_the_original_is_the_answer_where_it_keeps_the_limits(run):
    solved = solve(run[0], Limits(max_latency_ms=100.0), (FIRST,))
    assert (solved.candidate, solved.plan, solved.loss) == ("original", Plan(), 0.0)
    assert solved.measured is not None and solved.measured.speedup.value == 1.0


@pytest.mark.parametrize("option", ["max_latency_ms", "min_speedup", "max_bytes"])
def test_what_cannot_be_kept_is_answered_by_what_can(run, option):
    hopeless = 1e6 if option == "min_speedup" else 1
    if option == "max_latency_ms":
        hopeless = 1e-3
    with pytest.raises(NoFitError) as refused:
        solve(run[0], Limits(**{option: hopeless}))
    found = re.fullmatch(r"--[a-z-]+ ([\d.]+) or (more|less)", refused.value.allowed)
    least = float(found[1])
    assert solve(run[0], Limits(**{option: int(least) if option == "max_bytes" else least}))
    stricter = least * (1.003 if option == "min_speedup" else 0.997)
    # Whole bytes, and a little for the rounding of the solver.
    stricter = least - 2 if option == "max_bytes" else stricter
    with pytest.raises(NoFitError):
        solve(run[0], Limits(**{option: stricter}))


def test_limits_that_exclude_each_other_say_what_each_can_be(run, tmp_path, make_evaluation):
    # Here int8 is small and slow: either limit can be kept alone.
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "study.sqlite3").unlink()
    TrialRecord(storage_of(folder), [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE])
    slow = CostModels(
        {FIRST: CorrectedCost(pairs(0.1, 0.15, 3.0))}, {"file_bytes": CorrectedCost(BYTES)}, 1.0
    )
    keep_models(folder, SPACE, LOSS, slow, make_evaluation("original", ORIGINAL_METRIC, 1.0))
    tight = {"max_latency_ms": 0.5, "max_bytes": 250}
    for option, value in tight.items():
        assert solve(folder, Limits(**{option: value}))
    with pytest.raises(NoFitError) as refused:
        solve(folder, Limits(**tight))
    latency, size = re.findall(r"--[a-z-]+ ([\d.]+) or more", refused.value.allowed)
    assert float(latency) > 0.5 and int(size) > 250
    assert solve(folder, Limits(**{**tight, "max_latency_ms": float(latency)}))
    assert solve(folder, Limits(**{**tight, "max_bytes": int(size)}))


@pytest.mark.parametrize(
    "limits",
    [{"max_latency_ms": 0.0}, {"min_speedup": -1.0}, {"max_bytes": 0}, {"min_speedup": np.nan}],
)
def test_limits_must_be_above_zero(limits):
    with pytest.raises(ConfigError, match="above zero"):
        Limits(**limits)


def test_solving_needs_a_limit_and_a_model_of_it(run, tmp_path):
    with pytest.raises(ConfigError, match="--max-latency-ms"):
        solve(run[0], Limits())
    with pytest.raises(ConfigError, match="download_bytes"):
        solve(run[0], Limits(max_download_bytes=1000))
    with pytest.raises(RunFolderError, match="models"):
        solve(tmp_path, Limits(max_bytes=1000))


def test_measuring_needs_the_experiment_file(run):
    solved = replace(solve(run[0], Limits(max_latency_ms=0.6)), measured=None)
    with pytest.raises(RunFolderError, match="--experiment"):
        measure_solved(solved)


def test_json_holds_no_number_that_json_has_not(run):
    data = solve(run[0], Limits(max_latency_ms=0.6)).to_dict()
    text = json.loads(json.dumps(data, allow_nan=False))
    assert text["limits"] == {"--max-latency-ms": 0.6}
    assert text["predicted"]["latency"]["source"] == "estimated"
    assert text["measured_within_limits"][0]["measured"]["drop"]["source"] == "measured"


def _indices(solved):
    return next(p for p in PLANS if SPACE.plan(p) == solved.plan)
