from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.device import load_profile
from autocompress.errors import ExportError, MeasurementError, OutOfTimeError, WorkloadError
from autocompress.evaluate import NOT_CODED, Evaluator, Extras, Measured
from autocompress.evaluation import Evaluation, Repeat
from autocompress.measure.measurement import Measurement
from autocompress.measure.statistics import PLACEMENT
from autocompress.search.front import front_mask, undoubted_front_mask
from autocompress.search.judging import Judging
from autocompress.search.run_folder import RunFolder
from autocompress.search.undecided import (
    Precision,
    describe_pairs,
    find_pairs,
    join,
    joined,
    next_point,
)

OBJECTIVES = ("metric", "latency")
WITH_ENERGY = ("metric", "latency", "energy")
ROUGH = Precision({"latency": 0.002, "energy": 0.01}, most_measurements=8)
CPU = load_profile("cpu")
FLOOR = Precision.of(CPU).floors["latency"]


def figure(value, share=0.01, *, trusted=True, unit="ratio"):
    ends = (value * (1 - share), value * (1 + share))
    return Measurement(value, *ends, unit, "measured", "device", trusted, "" if trusted else "why")


def repeat(speedup, share=0.01, *, energy=None, seconds=1.0):
    return Repeat(figure(1 / speedup, share), figure(speedup, share), energy, seconds)


def names(pairs, points):
    return [{points[p.first].candidate, points[p.second].candidate} for p in pairs]


# How measurements of several processes are joined


@given(st.integers(2, 12), st.floats(0.2, 50), st.floats(PLACEMENT, 0.1))
def test_equal_measurements_narrow_with_the_root_of_their_number(count, value, share):
    found = joined([figure(value, share)] * count)
    assert found.value == pytest.approx(value)
    assert math.log(found.ci_high / value) == pytest.approx(share / math.sqrt(count))
    assert math.log(value / found.ci_low) == pytest.approx(share / math.sqrt(count))


def test_one_measurement_is_left_as_it_is():
    alone = figure(3.0, 0.0001)
    assert joined([alone]) == alone


def test_no_measurement_counts_as_more_precise_than_one_process_can_be():
    found = joined([figure(2.0, 0.0)] * 4)
    assert found.half_width == pytest.approx(PLACEMENT / 2, rel=1e-4)


@given(st.lists(st.tuples(st.floats(0.5, 2), st.floats(0, 0.1)), min_size=2, max_size=6), st.data())
def test_the_mean_is_between_its_parts_whatever_their_order(parts, data):
    singles = [figure(value, share) for value, share in parts]
    found = joined(singles)
    values = [single.value for single in singles]
    assert min(values) * (1 - 1e-9) <= found.value <= max(values) * (1 + 1e-9)
    assert 0 < found.ci_low < found.value < found.ci_high
    other = joined(data.draw(st.permutations(singles)))
    assert (other.value, other.ci_low) == pytest.approx((found.value, found.ci_low))


def test_the_more_precise_measurement_counts_for_more():
    # Weights 1 : 16 of the logarithms, and few enough apart that nothing is widened.
    found = joined([figure(1.0, 0.04), figure(1.02, 0.01)])
    assert math.log(found.value) == pytest.approx(math.log(1.02) * 16 / 17)


def test_measurements_that_contradict_each_other_widen_the_interval():
    apart = joined([figure(1.0, 0.003), figure(1.1, 0.003)])
    # Birge: the deviation of the mean is then the scatter's own, |x1 - x2| / 2.
    assert math.log(apart.ci_high / apart.value) == pytest.approx(1.96 * math.log(1.1) / 2)


def test_an_untrusted_measurement_counts_only_if_all_are():
    good, bad = figure(2.0), figure(5.0, trusted=False)
    assert joined([bad, good]) == good
    both = joined([bad, bad])
    assert (both.trusted, both.reason) == (False, "why")
    assert both.value == pytest.approx(5.0)


def test_joining_keeps_every_single_measurement_also_on_disk(make_evaluation):
    first = replace(make_evaluation("a", 0.9, 2.0), energy=figure(8.0, 0.04, unit="mJ"))
    second = repeat(2.02, energy=figure(8.1, 0.04, unit="mJ"), seconds=3.0)
    once = join(first, second)
    twice = join(once, second)
    assert [single.speedup.value for single in twice.repeats] == [2.0, 2.02, 2.02]
    assert twice.speedup == joined([first.speedup, second.speedup, second.speedup])
    assert twice.energy.half_width == pytest.approx(0.04 / math.sqrt(3), rel=1e-2)
    assert twice.metric == first.metric
    assert Evaluation.from_dict(json.loads(json.dumps(twice.to_dict()))) == twice


def test_an_evaluation_of_an_earlier_version_is_read(make_evaluation):
    data = make_evaluation("a", 0.9, 2.0).to_dict()
    del data["repeats"]
    assert len(Evaluation.from_dict(data).single_measurements) == 1


# Which pairs are undecided


def test_only_pairs_that_matter_for_the_front_are_found(make_evaluation):
    points = [
        make_evaluation("best", 0.95, 2.00),
        make_evaluation("as fast", 0.94, 2.01),
        make_evaluation("faster", 0.93, 3.00),
        make_evaluation("slow", 0.90, 1.50),
        make_evaluation("as slow", 0.89, 1.51),
    ]
    assert names(find_pairs(points, OBJECTIVES), points) == [{"best", "as fast"}]


def test_the_longest_overlap_comes_first(make_evaluation):
    points = [
        make_evaluation("a", 0.95, 2.00),
        make_evaluation("b", 0.94, 2.03),
        make_evaluation("c", 0.90, 4.00),
        make_evaluation("d", 0.89, 4.01),
    ]
    pairs = find_pairs(points, OBJECTIVES)
    assert names(pairs, points) == [{"c", "d"}, {"a", "b"}]
    assert pairs[0].overlap > pairs[1].overlap > 0


def test_a_size_decides_what_latency_cannot(make_evaluation):
    points = [
        make_evaluation("a", 0.95, 2.00, file_bytes=1000),
        make_evaluation("b", 0.94, 2.00, file_bytes=900),
    ]
    assert find_pairs(points, OBJECTIVES)
    assert not find_pairs(points, (*OBJECTIVES, "file_bytes"))


def test_a_pair_names_the_objectives_that_overlap(make_evaluation):
    points = [
        replace(make_evaluation("a", 0.95, 2.0), energy=figure(5.0, 0.02)),
        replace(make_evaluation("b", 0.94, 1.8), energy=figure(5.0, 0.02)),
    ]
    (pair,) = find_pairs(points, WITH_ENERGY)
    assert set(pair.overlaps) == {"energy"}
    assert "energy" in describe_pairs(points, WITH_ENERGY, ROUGH)
    assert "latency" not in describe_pairs(points, WITH_ENERGY, ROUGH)
    assert next_point(points, WITH_ENERGY, ROUGH) in (0, 1)
    assert next_point(points, WITH_ENERGY, Precision({"latency": 0.0, "energy": 0.03})) is None


def test_no_points_no_pairs():
    assert find_pairs([], OBJECTIVES) == []
    assert next_point([], OBJECTIVES, ROUGH) is None
    assert describe_pairs([], OBJECTIVES, ROUGH) == ""


# What is measured next


def test_the_point_whose_variance_falls_most_per_second_is_next(make_evaluation):
    wide = replace(make_evaluation("wide", 0.95, 2.0), speedup=figure(2.0, 0.03))
    narrow = make_evaluation("narrow", 0.94, 2.0)
    assert next_point([wide, narrow], OBJECTIVES, ROUGH) == 0
    assert next_point([narrow, wide], OBJECTIVES, ROUGH) == 1
    slow = replace(wide, seconds={"latency": 50.0})
    quick = replace(narrow, seconds={"latency": 1.0})
    assert next_point([slow, quick], OBJECTIVES, ROUGH) == 1
    assert next_point([slow, quick], OBJECTIVES, ROUGH, {"narrow"}) == 0
    assert next_point([slow, quick], OBJECTIVES, ROUGH, {"narrow", "wide"}) is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), min_size=1, max_size=6),
    st.integers(0, 2**16),
)
def test_measuring_ends_and_loses_no_point_of_the_true_front(make_evaluation, truths, seed):
    generator = np.random.default_rng(seed)

    def measured(true):
        # Errors are so small against the intervals that a joined one holds the truth for sure.
        return true * math.exp(generator.uniform(-0.2, 0.2) * 0.01)

    speeds = [2.0 * (1 + step / 1000) for _, step in truths]
    points = [
        replace(make_evaluation(f"p{i}", 0.9 + level / 100, 1.0), speedup=figure(measured(speed)))
        for i, ((level, _), speed) in enumerate(zip(truths, speeds, strict=True))
    ]
    limit = ROUGH.most_measurements * len(points)
    for _ in range(limit):
        index = next_point(points, OBJECTIVES, ROUGH)
        if index is None:
            break
        points[index] = join(points[index], repeat(measured(speeds[index])))
    assert next_point(points, OBJECTIVES, ROUGH) is None
    assert all(len(p.repeats) <= ROUGH.most_measurements for p in points)
    for pair in find_pairs(points, OBJECTIVES):
        for point in (points[pair.first], points[pair.second]):
            spent = len(point.repeats) == ROUGH.most_measurements
            assert spent or point.speedup.half_width <= ROUGH.floors["latency"]
    truth = [
        replace(point, speedup=figure(speed, 0.0))
        for point, speed in zip(points, speeds, strict=True)
    ]
    assert (front_mask(truth, OBJECTIVES) <= undoubted_front_mask(points, OBJECTIVES)).all()
    assert bool(describe_pairs(points, OBJECTIVES, ROUGH)) == bool(find_pairs(points, OBJECTIVES))


def test_the_floor_is_half_the_target_but_no_less_than_four_processes_reach():
    settings_ = CPU.measuring
    rough = settings_.model_copy(update={"final_target_half_width": 0.02})
    assert Precision.of(CPU.model_copy(update={"measuring": rough})).floors["latency"] == 0.01
    fine = settings_.model_copy(update={"final_target_half_width": 1e-6})
    floor = Precision.of(CPU.model_copy(update={"measuring": fine})).floors["latency"]
    assert floor == pytest.approx(joined([figure(1.0, 0.0)] * 4).half_width, rel=1e-4)


# The loop that measures


class Notes:
    def __init__(self):
        self.texts, self.stages = [], []

    def stage(self, name, total=None, *, limit_s=None):
        self.stages.append(name)

    def advance(self, steps=1):
        pass

    def note(self, text):
        self.texts.append(text)

    def show_front(self, frame, objectives):
        pass


class StubCoding:
    """Ends once it was waited for, if that takes no longer than it may."""

    def __init__(self, takes_s, *, fails):
        self._takes_s, self._fails, self.ended = takes_s, fails, False
        self.killed = False

    def wait(self, limit_s=None):
        if limit_s is not None and limit_s < self._takes_s:
            raise OutOfTimeError("The file was not coded in time.")
        self.ended = True
        if self.killed:
            raise ExportError("The coder was ended by SIGKILL.")
        if self._fails:
            raise ExportError("The file cannot be coded.")
        return 7


class StubEvaluator:
    """Measures true speeds.

    `fails` names candidates that cannot be measured again, `not_coded` those that cannot be coded.
    """

    def __init__(
        self, finalists, true, fails=(), killed_after=math.inf, not_coded=(), *, coded=False,
        coding_s=0.0,
    ):  # fmt: skip
        self._finalists = {e.artifact: e for e in finalists}
        self._true, self._fails, self._killed_after = true, fails, killed_after
        self._not_coded = not_coded
        self.extras = Extras(coded=coded, energy=False)
        self.calls, self.begun, self._coding_s = [], [], coding_s
        self.unscored, self.killed = set(), set()

    def measure_uncoded(self, artifact, plan, runtime, split, *, final):
        found = self._finalists[f"artifacts/{artifact.path.name}"]
        if found.candidate in self.unscored:
            raise WorkloadError("The outputs hold NaN or infinite values.")
        speed = figure(self._true[found.candidate], 0.004)
        # The test split's metric is another one, and must not decide.
        metric = replace(found.metric, value=0.5)
        seconds = {"latency": 4.0, "metric": 2.0}
        found = replace(
            found, split=split, speedup=speed, metric=metric, seconds=seconds, download_bytes=None
        )
        return Measured(found, None)

    def start_coding(self, model, *, checked):
        assert checked
        self.begun.append(model.stem)
        coding = StubCoding(self._coding_s, fails=model.stem in self._not_coded)
        coding.killed = model.stem in self.killed
        return coding

    def with_code(self, measured):
        return Evaluator.with_code(SimpleNamespace(_extras=self.extras), measured)

    def measure_again(self, evaluation):
        if len(self.calls) >= self._killed_after:
            raise KeyboardInterrupt
        self.calls.append(evaluation.candidate)
        if evaluation.candidate in self._fails:
            raise MeasurementError("The model hung.")
        return repeat(self._true[evaluation.candidate], 0.004, seconds=4.0)


class Bench:
    """One call of a search that judges; the folder stays for the next one."""

    def __init__(self, path, finalists, true, **stub):
        for name in ("finals", "artifacts"):
            (path / name).mkdir(exist_ok=True)
        for finalist in finalists:
            (path / finalist.artifact).touch()
        self.folder, self.finalists = RunFolder(path), finalists
        self.evaluator, self.notes = StubEvaluator(finalists, true, **stub), Notes()
        kept = [self.folder.evaluation(e.candidate, "test") for e in finalists]
        self.judged = [e for e in kept if e is not None]

    def judge(self, remaining_s=lambda: 1e9, show=lambda: None):
        prepared = SimpleNamespace(
            profile=CPU,
            folder=self.folder,
            experiment=SimpleNamespace(objectives=OBJECTIVES),
            workload=SimpleNamespace(splits=lambda: {"test_split": [0], "search_split": [0]}),
        )
        with ThreadPoolExecutor(1) as device:
            Judging(prepared, self.evaluator, device, self.judged, remaining_s, self.notes).judge(
                self.finalists, show
            )
        return {e.candidate: e for e in self.judged}


@pytest.fixture
def finalists(make_evaluation):
    return [
        make_evaluation("a", 0.95, 2.0),
        make_evaluation("b", 0.94, 2.0),
        make_evaluation("c", 0.90, 4.0),
    ]


def test_a_close_pair_is_measured_until_it_is_decided(tmp_path, finalists):
    bench = Bench(tmp_path, finalists, {"a": 2.0, "b": 1.99, "c": 4.0})
    judged = bench.judge()
    assert judged["a"].speedup.ci_low > judged["b"].speedup.ci_high
    assert set(bench.evaluator.calls) == {"a", "b"}
    # No more often than needed: half-widths must come below a quarter of a per cent.
    assert 2 <= len(bench.evaluator.calls) <= 5
    assert not bench.notes.texts
    kept = bench.folder.evaluation("a", "test")
    assert kept == judged["a"]
    assert kept.metric.value == 0.5


def test_nothing_is_measured_again_where_all_is_clear(tmp_path, finalists):
    bench = Bench(tmp_path, finalists, {"a": 2.0, "b": 3.0, "c": 4.0})
    bench.judge()
    assert bench.evaluator.calls == []
    assert "measure close points again" not in bench.notes.stages


def test_what_cannot_be_told_apart_ends_at_the_floor_and_is_said(tmp_path, finalists):
    bench = Bench(tmp_path, finalists, {"a": 2.0, "b": 2.0, "c": 4.0})
    judged = bench.judge()
    assert len(judged["a"].repeats) == len(judged["b"].repeats)
    spent = len(judged["a"].repeats) == Precision.of(CPU).most_measurements
    assert spent or judged["a"].speedup.half_width <= FLOOR
    (note,) = bench.notes.texts
    assert note.startswith("1 pair of the front's points cannot be told apart in latency")
    assert "ended early" not in note
    again = Bench(tmp_path, finalists, {"a": 2.0, "b": 2.0, "c": 4.0})
    assert again.judge() == judged
    assert again.evaluator.calls == []


def test_an_interrupted_call_is_gone_on_with(tmp_path, finalists):
    true = {"a": 2.0, "b": 1.99, "c": 4.0}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = Bench(tmp_path / "whole", finalists, true)
    expected = whole.judge()
    killed = Bench(tmp_path / "killed", finalists, true, killed_after=1)
    with pytest.raises(KeyboardInterrupt):
        killed.judge()
    second = Bench(tmp_path / "killed", finalists, true)
    assert second.judge() == expected
    assert killed.evaluator.calls + second.evaluator.calls == whole.evaluator.calls


def test_without_time_left_it_ends_and_says_so(tmp_path, finalists):
    bench = Bench(tmp_path, finalists, {"a": 2.0, "b": 1.99, "c": 4.0})
    bench.judge(lambda: 30.0 if len(bench.judged) < 3 else 5.0)
    assert bench.evaluator.calls == []
    assert "ended early" in bench.notes.texts[0]


def test_without_a_time_limit_repeats_take_no_longer_than_judging(tmp_path, finalists):
    bench = Bench(tmp_path, finalists, {"a": 2.0, "b": 2.0, "c": 4.0})
    bench.judge(lambda: None)
    # Judging took three times 6 s, a repeat takes 4 s and up to 6.6 s are kept ready for it.
    assert len(bench.evaluator.calls) == 3
    assert "ended early" in bench.notes.texts[0]


def test_a_point_that_fails_is_left_alone(tmp_path, finalists):
    bench = Bench(tmp_path, finalists, {"a": 2.0, "b": 1.996, "c": 4.0}, fails=("a",))
    judged = bench.judge()
    assert bench.evaluator.calls.count("a") == 1
    assert bench.evaluator.calls.count("b") >= 1
    assert not judged["a"].repeats
    assert "a could not be measured again" in bench.notes.texts[0]


def test_a_finalist_whose_outputs_are_no_numbers_is_left_out(tmp_path, finalists):
    bench = Bench(tmp_path, finalists, {"a": 2.0, "b": 3.0, "c": 4.0})
    bench.evaluator.unscored = {"b"}
    assert set(bench.judge()) == {"a", "c"}
    assert bench.notes.texts == ["finalist b failed: The outputs hold NaN or infinite values."]


def test_a_metric_that_fails_for_the_original_ends_the_judging(tmp_path, make_evaluation):
    finalists = [make_evaluation("original", 0.95, 1.0), make_evaluation("b", 0.94, 2.0)]
    bench = Bench(tmp_path, finalists, {"original": 1.0, "b": 2.0})
    bench.evaluator.unscored = {"original", "b"}
    with pytest.raises(WorkloadError, match="NaN"):
        bench.judge()


# Containers that are made beside


@pytest.fixture
def eight(make_evaluation):
    return [make_evaluation(f"c{i}", 0.95 - i / 100, 2.0 + i) for i in range(8)]


def true_speeds(finalists):
    return {e.candidate: e.speedup.value for e in finalists}


def test_figures_are_kept_once_their_containers_are_made(tmp_path, eight):
    bench = Bench(tmp_path, eight, true_speeds(eight), not_coded=("c2", "c7"), coded=True)
    most_unkept = 0

    def show():
        nonlocal most_unkept
        # Without any size it would be on no front.
        assert all(e.download_bytes in (900, 7) for e in bench.judged)
        kept = len(list((tmp_path / "finals").iterdir()))
        most_unkept = max(most_unkept, len(bench.judged) - kept)

    # Time is no reason to go without a figure that the search goes by.
    judged = bench.judge(lambda: 0.0 if "code finalists" in bench.notes.stages else 1e9, show)
    assert list(judged) == ["c0", "c1", "c3", "c4", "c5", "c6"]
    assert all(e.download_bytes == 7 for e in judged.values())
    assert most_unkept == 4
    assert bench.folder.evaluation("c7", "test") is None
    assert bench.folder.evaluation("c6", "test") == judged["c6"]
    assert [text.split()[1] for text in bench.notes.texts] == ["c2", "c7"]


def test_where_the_coded_size_is_no_objective_containers_come_last(tmp_path, eight):
    true = {**true_speeds(eight), "c1": 1.99}
    bench = Bench(tmp_path, eight, true, not_coded=("c7",))
    order = []
    judged = bench.judge(show=lambda: order.append([e.download_bytes for e in bench.judged]))
    assert order[7] == [None] * 8
    assert bench.notes.stages == [
        "judge finalists", "measure close points again", "code finalists",
    ]  # fmt: skip
    assert [judged[f"c{i}"].download_bytes for i in range(8)] == [7] * 7 + [None]
    assert "cannot be coded" in judged["c7"].details[NOT_CODED]
    assert judged["c1"].repeats
    for candidate, found in judged.items():
        assert bench.folder.evaluation(candidate, "test") == found
    again = Bench(tmp_path, eight, true)
    assert again.judge() == judged
    assert again.evaluator.begun == []


def test_containers_that_no_time_was_left_for_are_made_by_a_later_call(tmp_path, eight):
    bench = Bench(tmp_path, eight, true_speeds(eight), coding_s=60.0)
    judged = bench.judge(lambda: 50.0)
    assert len(judged) == 8 and not any(e.download_bytes for e in judged.values())
    assert bench.notes.texts == ["no time was left for the coded sizes of 8 finalists"]
    later = Bench(tmp_path, eight, true_speeds(eight), coding_s=60.0)
    assert all(e.download_bytes == 7 for e in later.judge(lambda: 70.0).values())
    assert set(later.evaluator.begun) == set(judged)


def test_a_killed_coder_is_told_and_tried_again_by_a_later_call(tmp_path, finalists):
    true = true_speeds(finalists) | {"b": 3.0}
    bench = Bench(tmp_path, finalists, true)
    bench.evaluator.killed = {"b"}
    judged = bench.judge()
    assert [judged[name].download_bytes for name in "abc"] == [7, None, 7]
    assert bench.notes.texts == ["finalist b has no coded size: The coder was ended by SIGKILL."]
    later = Bench(tmp_path, finalists, true)
    assert later.judge()["b"].download_bytes == 7
    assert later.evaluator.begun == ["b"]
