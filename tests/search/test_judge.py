from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.build import Tried
from autocompress.search.front import MAXIMISE
from autocompress.search.judge import (
    Interval,
    Judge,
    Judgement,
    LossModel,
    Sample,
    is_dominated,
    mean_difference,
)
from autocompress.workload import Split, Workload
from autocompress.workload.output_loss import output_loss

OBJECTIVES = ("metric", "latency", "file_bytes")


@pytest.mark.parametrize(
    ("count", "flips", "gain"),
    [(128, 0.03, 0.5), (128, 0.3, 0.2), (320, 0.01, 0.0), (320, 0.1, 0.9), (128, 0.03, 0.0)],
)
def test_the_interval_of_a_mean_difference_covers_the_truth(
    count: int, flips: float, gain: float
) -> None:
    """Paired right-or-wrong differences: a share flips, and `gain` of these for the better."""
    generator = np.random.default_rng(0)
    truth = flips * (2 * gain - 1)
    covered = 0
    for _ in range(300):
        flipped = generator.random(count) < flips
        sign = np.where(generator.random(count) < gain, 1.0, -1.0)
        found = mean_difference(flipped * sign)
        covered += found.low <= truth <= found.high
    assert covered >= 297


@pytest.mark.parametrize(("flips", "gain"), [(0.02, 0.0), (0.3, 0.2)])
def test_the_interval_covers_the_truth_when_there_are_parts_only(flips: float, gain: float) -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        flipped = generator.random((8, 16)) < flips
        sign = np.where(generator.random((8, 16)) < gain, 1.0, -1.0)
        found = mean_difference((flipped * sign).mean(1), unit=1 / 16)
        covered += found.low <= flips * (2 * gain - 1) <= found.high
    assert covered >= 297


def test_the_interval_of_a_mean_difference_in_closed_form() -> None:
    found = mean_difference(np.tile([1.0, 0.0, -1.0, 0.0], 1000))
    assert found.value == 0
    assert found.high == pytest.approx(3 * math.sqrt(2004 / 4000**2), rel=2e-3)
    assert found.deviation == pytest.approx(found.high / 3)
    # No difference in few samples does not show that there is none; in many it nearly does.
    few, many = (mean_difference(np.zeros(n)).high for n in (100, 10000))
    assert few == pytest.approx(0.06, rel=0.05)
    assert many == pytest.approx(0.0006, rel=0.01)
    # The mean of ten samples moves by a tenth of what one of them does.
    assert mean_difference(np.zeros(100), unit=0.1).high == pytest.approx(few / 10)
    assert 0 < mean_difference(np.zeros(1)).high < math.inf


def test_the_loss_model_is_silent_until_eight_plans_were_measured() -> None:
    model = LossModel()
    for number in range(7):
        model.observe(0.01 * number, -0.01 * number)
    assert model.predict(0.03) is None
    model.observe(0.07, -0.07)
    assert model.predict(0.03) is not None


def test_the_loss_model_finds_the_line_in_the_root_of_the_loss() -> None:
    model = LossModel()
    for loss in np.geomspace(1e-4, 1.0, 12):
        model.observe(float(loss), -0.2 * math.sqrt(loss))
    for loss in (1e-3, 0.05, 0.7):
        mean, spread = model.predict(loss) or (math.nan, math.nan)
        assert mean == pytest.approx(-0.2 * math.sqrt(loss), rel=1e-6)
        assert spread == pytest.approx(0.0, abs=1e-6)
    assert (model.predict(0.0) or (1.0, 0.0))[0] == 0.0


def test_the_loss_model_goes_by_the_nearest_plans_and_tells_its_spread() -> None:
    """The metric falls twice as steeply far away; noise of 0.01 is found again."""
    generator = np.random.default_rng(1)
    model = LossModel()
    for _ in range(200):
        loss = float(10 ** generator.uniform(-4, 0))
        slope = -0.1 if loss < 0.02 else -0.2
        model.observe(loss, slope * math.sqrt(loss) + generator.normal(0, 0.01))
    (near, spread), (far, _) = model.predict(0.001) or (0, 0), model.predict(0.5) or (0, 0)
    near_slope, far_slope = near / math.sqrt(0.001), far / math.sqrt(0.5)
    assert far_slope == pytest.approx(-0.2, abs=0.02)
    assert near_slope > far_slope
    assert 0.007 < spread < 0.03


def test_equal_losses_of_nothing_are_survived() -> None:
    model = LossModel()
    for _ in range(10):
        model.observe(0.0, 0.0)
    assert model.predict(0.0) == (0.0, 0.0)


points = st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4))
known = st.tuples(st.integers(0, 4), st.integers(0, 2))
ends = st.one_of(known, known, known, st.none())


@settings(max_examples=400, deadline=None)
@given(measured=st.lists(points, max_size=6), intervals=st.tuples(ends, ends, ends))
def test_dominated_beyond_doubt_against_brute_force(
    make_evaluation: Any, measured: Any, intervals: Any
) -> None:
    """A plan is dominated if a point is no worse wherever in its intervals the plan lies."""
    evaluations = [
        make_evaluation(str(i), m / 4, 1 / latency, file_bytes=size)
        for i, (m, latency, size) in enumerate(measured)
    ]
    scale = (0.25, 1.0, 1.0)
    estimates = {
        name: Interval((low + width / 2) * s, low * s, (low + width) * s)
        for name, s, (low, width) in zip(
            OBJECTIVES, scale, (pair or (0, 0) for pair in intervals), strict=True
        )
    }
    for name, pair in zip(OBJECTIVES, intervals, strict=True):
        if pair is None:
            del estimates[name]

    def no_worse(point: tuple[int, int, int]) -> bool:
        values = (point[0] / 4, float(point[1]), float(point[2]))
        for name, value in zip(OBJECTIVES, values, strict=True):
            if name not in estimates:
                return False
            grid = np.linspace(estimates[name].low, estimates[name].high, 5)
            better = value >= grid if MAXIMISE[name] else value <= grid + 1e-12
            if not better.all():
                return False
        return True

    expected = any(no_worse(point) for point in measured)
    assert is_dominated(estimates, evaluations, OBJECTIVES) == expected


def test_an_unknown_interval_is_never_dominated(make_evaluation: Any) -> None:
    best = [make_evaluation("best", 1.0, 1e6)]
    known = Interval(0.5, 0.4, 0.6)
    assert is_dominated({"metric": known, "latency": known}, best, ("metric", "latency"))
    unknown = Interval.unknown()
    assert not is_dominated({"metric": known, "latency": unknown}, best, ("metric", "latency"))
    assert not is_dominated({"metric": known}, best, ("metric", "latency"))


def test_a_judgement_is_plain_without_what_is_unknown() -> None:
    estimates = {"metric": Interval(0.5, 0.4, 0.6), "latency": Interval.unknown()}
    found = Judgement(estimates, 0.1, 128, dominated=False).to_dict()
    assert found["estimates"] == {"metric": {"value": 0.5, "low": 0.4, "high": 0.6}}
    assert (found["loss"], found["samples"], found["dominated"]) == (0.1, 128, False)


CALIBRATION, OWN, SPLIT = 6, 8, 40


class Classes(nn.Module):
    """The input itself is the class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def shifted(*by: float) -> Classes:
    network = Classes().eval()
    with torch.no_grad():
        network.shift[:] = torch.tensor(by)
    return network


def first_column(outputs: Any, targets: Any) -> float:
    return float(outputs[:, 0].mean())


def scene(metric: Any) -> SimpleNamespace:
    """A workload of forty samples and a builder that runs networks on eight of them in passing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SPLIT, 3, generator=generator)
    calibration = torch.randn(CALIBRATION, 3, generator=generator)
    targets = torch.randint(3, (SPLIT,), generator=generator)
    split = Split((x,), targets)
    own = split.subset(torch.arange(5, 5 + OWN))
    inputs = (torch.cat([calibration, own.inputs[0]]),)
    builder: Any = SimpleNamespace(sample=own, sample_inputs=inputs)
    workload = Workload(Classes().eval(), x[:1], Split((calibration,)), None, split, split, metric)
    return SimpleNamespace(
        split=split, own=own, inputs=inputs, sample=Sample(workload, builder, seed=0)
    )


CHANGED = shifted(0.8, -0.3, 0.0)


def right(x: Tensor, wanted: Tensor) -> np.ndarray:
    return (x.argmax(1) == wanted).double().numpy()


@pytest.mark.parametrize("metric", ["accuracy", "agreement"])
@pytest.mark.parametrize("passed", [True, False])
def test_a_sample_compares_single_samples_for_shares(metric: str, passed: bool) -> None:
    made = scene(metric)
    with torch.no_grad():
        outputs = [CHANGED(made.inputs[0])] if passed else None
        seen = made.sample.first(Tried(CHANGED, outputs))
        x = made.own.inputs[0]
        wanted = made.own.targets if metric == "accuracy" else x.argmax(1)
        expected = right(CHANGED(x), wanted) - right(x, wanted)
    assert seen.differences.tolist() == expected.tolist()
    assert (seen.samples, seen.unit) == (CALIBRATION + OWN, 1.0)
    loss = output_loss([made.inputs[0]], [CHANGED(made.inputs[0]).detach()], class_scores=True)
    assert seen.loss == pytest.approx(loss, rel=1e-5)


def test_the_originals_own_outputs_lose_nothing() -> None:
    for metric in ("accuracy", "agreement", first_column):
        made = scene(metric)
        seen = [
            made.sample.first(Tried(Classes().eval(), None)),
            made.sample.further(Classes().eval()),
        ]
        for each in seen:
            assert not each.differences.any()
            assert each.loss == pytest.approx(0, abs=1e-12)


def test_further_samples_are_all_of_a_small_split() -> None:
    made = scene("accuracy")
    seen = made.sample.further(CHANGED)
    with torch.no_grad():
        x, wanted = made.split.inputs[0], made.split.targets
        expected = right(CHANGED(x), wanted).mean() - right(x, wanted).mean()
    assert seen.samples == len(seen.differences) == SPLIT
    assert seen.differences.mean() == pytest.approx(expected)


def test_a_users_metric_is_taken_on_parts() -> None:
    made = scene(first_column)
    seen = made.sample.further(CHANGED)
    assert len(seen.differences) == 8
    assert seen.unit == 8 / SPLIT
    # The first column is shifted by the same everywhere.
    assert seen.differences.tolist() == pytest.approx([0.8] * 8, abs=1e-5)
    # Outputs that are no class scores: the squared error as a share.
    x = made.split.inputs[0].double()
    share = float((0.8**2 + 0.3**2) / 3 / x.square().mean())
    assert seen.loss == pytest.approx(share, rel=1e-4)


def new_judge(make_evaluation: Any) -> Judge:
    return Judge(("metric", "latency"), make_evaluation("original", 0.6, 1.0))


def test_a_judge_joins_all_samples(make_evaluation: Any) -> None:
    made, judge = scene("accuracy"), new_judge(make_evaluation)
    costs = {"latency": Interval(0.5, 0.4, 0.6)}
    first, further = made.sample.first(Tried(CHANGED, None)), made.sample.further(CHANGED)
    once, twice = judge.judge([first], costs, []), judge.judge([first, further], costs, [])
    assert (once.samples, twice.samples) == (CALIBRATION + OWN, CALIBRATION + OWN + SPLIT)
    assert once.estimates["latency"] == costs["latency"]
    together = mean_difference(np.concatenate([first.differences, further.differences]))
    assert twice.estimates["metric"].value == pytest.approx(0.6 + together.value)
    assert twice.estimates["metric"].low == pytest.approx(0.6 + together.low)
    weights = [first.samples, further.samples]
    assert twice.loss == pytest.approx(np.average([first.loss, further.loss], weights=weights))


def test_what_a_measured_point_beats_beyond_doubt_is_dominated(make_evaluation: Any) -> None:
    made, judge = scene("accuracy"), new_judge(make_evaluation)
    best = [make_evaluation("best", 9.0, 100.0)]
    costs = {"latency": Interval(0.5, 0.4, 0.6)}
    assert judge.judge([made.sample.first(Tried(CHANGED, None))], costs, best).dominated


def test_a_judge_learns_from_what_was_measured(make_evaluation: Any) -> None:
    """The loss says more than few samples; the bounds stay those of the sample."""
    judge = new_judge(make_evaluation)
    seen = [scene("accuracy").sample.first(Tried(CHANGED, None))]
    before = judge.judge(seen, {}, [])
    for _ in range(8):
        judge.learn(before, make_evaluation("x", 0.6 - 0.25, 2.0))
    after = judge.judge(seen, {}, [])
    assert after.estimates["metric"].value == pytest.approx(0.35, abs=1e-3)
    assert after.estimates["metric"].low == before.estimates["metric"].low
    assert after.estimates["metric"].high == before.estimates["metric"].high
