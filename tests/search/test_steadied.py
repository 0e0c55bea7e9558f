from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.evaluation import CHANGED, OUTPUT_LOSS, SAMPLES
from autocompress.search.finals import choose_finalists
from autocompress.search.steadied import shrunk, steadied

OBJECTIVES = ("metric", "latency")
LEVEL = 0.9


def point(make_evaluation, name, metric, speedup, loss, changed=0.1, samples=100):
    found = make_evaluation(name, metric, speedup)
    details = {OUTPUT_LOSS: loss, CHANGED: changed, SAMPLES: samples}
    return replace(found, details={**found.details, **details})


def test_certain_figures_stay_and_uncertain_ones_go_by_the_loss() -> None:
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.01, 0.5, 60)
    lost = 0.2 * losses + rng.normal(0, 0.03, 60)
    np.testing.assert_allclose(shrunk(lost, losses, np.full(60, 1e-9)), lost, atol=1e-6)
    found = shrunk(lost, losses, np.full(60, 1.0))
    order = np.argsort(losses)
    # By the fitted curve alone: nothing says that candidates of one loss differ.
    assert (np.diff(found[order]) >= 0).all()
    np.testing.assert_allclose(found, 0.2 * losses, atol=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(50, 400), st.floats(0.0, 0.01))
def test_steadied_figures_are_nearer_to_the_truth(seed: int, samples: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    losses = np.exp(rng.uniform(np.log(0.003), np.log(0.5), 80))
    truth = 0.3 * losses + rng.normal(0, spread, 80)
    changed = np.clip(2 * np.abs(truth), 0.02, 0.4)
    lost = truth + rng.normal(0, np.sqrt(changed / samples))
    found = shrunk(lost, losses, (changed + 4 / samples) / samples)
    assert np.square(found - truth).mean() < np.square(lost - truth).mean()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1e6)), min_size=1, max_size=30))
def test_any_figures_give_finite_ones(pairs: list[tuple[float, float]]) -> None:
    lost, losses = np.array(pairs).T
    assert np.isfinite(shrunk(lost, losses, np.full(len(pairs), 1e-4))).all()


def test_few_candidates_and_unknown_uncertainties_stay(make_evaluation) -> None:
    original = point(make_evaluation, "original", LEVEL, 1.0, 0.0)
    few = [point(make_evaluation, f"p{i}", 0.8, 2.0, 0.1) for i in range(4)]
    assert steadied(few, original) == few
    many = [point(make_evaluation, f"p{i}", LEVEL - 0.01 * i, 2.0, 0.05 * i) for i in range(12)]
    plain = make_evaluation("plain", 0.7, 2.0)
    found = steadied([*many, plain], original)
    assert [e.candidate for e in found] == [e.candidate for e in (*many, plain)]
    assert found[-1] is plain
    for before, after in zip(many, found, strict=False):
        assert replace(after, metric=before.metric) == before


@pytest.mark.parametrize("samples", [100, 1_000_000])
def test_the_luckiest_is_no_finalist_unless_it_is_certain(make_evaluation, samples: int) -> None:
    original = point(make_evaluation, "original", LEVEL, 1.0, 0.0)
    honest = [
        point(make_evaluation, f"p{i}", LEVEL - 0.2 * loss, 1.5 + i / 10, loss, samples=samples)
        for i, loss in enumerate(np.linspace(0.01, 0.2, 12).tolist())
    ]
    lucky = point(make_evaluation, "lucky", LEVEL + 0.01, 2.6, 0.25, samples=samples)
    chosen = choose_finalists([*honest, lucky], original, OBJECTIVES, 4)
    names = [e.candidate for e in chosen]
    assert (names[0] == "lucky") == (samples > 100)
    # Figures are those that were measured.
    assert all(e in [*honest, lucky] for e in chosen)
