from __future__ import annotations

import contextlib
import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.workload import (
    Split,
    Workload,
    chance_level,
    check_workload,
    load_workload,
    network_outputs,
    score,
    score_standard_error,
)

CLASSES = 3


def make_split(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    return Split((inputs,), inputs[:, :CLASSES].argmax(1))


class Picker(nn.Module):
    """Its first three inputs are the class scores, so it is always right."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(CLASSES, 4))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Bent(nn.Module):
    """A picker whose outputs, or itself, are bent by a function."""

    def __init__(self, bend) -> None:
        super().__init__()
        self.picker = Picker()
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.bend = bend

    def forward(self, x: Tensor):
        return self.bend(self, self.picker(x))


def make_workload(**changes: object) -> Workload:
    workload = Workload(
        network=Picker().eval(),
        example_inputs=torch.zeros(1, 4),
        calibration=Split(make_split(20, 1).inputs),
        train=make_split(40, 2),
        search_split=make_split(200, 3),
        test_split=make_split(30, 4),
    )
    return replace(workload, **changes)


def bent(bend) -> Workload:
    return make_workload(network=Bent(bend).eval())


def count_calls(module: Bent, scores: Tensor) -> Tensor:
    module.calls += 1
    return scores


def with_value(split: Split, value: float) -> Split:
    inputs = split.inputs[0].clone()
    inputs[3, 1] = value
    return Split((inputs,), split.targets)


def broken_metric(outputs: np.ndarray, targets: np.ndarray) -> float:
    raise KeyError("no such label")


# --- splits


def test_a_single_tensor_becomes_a_tuple():
    split = Split(torch.zeros(5, 2))
    assert isinstance(split.inputs, tuple)
    assert len(split) == 5
    assert make_workload().example_inputs[0].shape == (1, 4)


def test_subset_by_number_is_evenly_spaced_and_by_indices_exact():
    split = Split(torch.arange(10)[:, None], torch.arange(10))
    assert split.subset(5).targets.tolist() == [0, 2, 4, 6, 8]
    assert split.subset([7, 1]).inputs[0].flatten().tolist() == [7, 1]
    assert len(split.subset(99)) == 10
    assert len(split.subset(0)) == 0


def test_numpy_inputs_equal_the_tensors():
    split = make_split(4, 0)
    np.testing.assert_array_equal(split.numpy_inputs()[0], split.inputs[0].numpy())


@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        ((), None, "same number of samples"),
        ((torch.zeros(3, 1), torch.zeros(4, 1)), None, r"\(3, 1\), float32 \(4, 1\)"),
        (np.zeros((3, 1)), None, "given:   ndarray"),
        (torch.zeros(3, 1), torch.zeros(4), "3 samples, 4 targets"),
        (torch.zeros(3, 1), [0, 1, 2], "targets must be a tensor"),
    ],
)
def test_malformed_splits_are_refused(inputs, targets, words):
    with pytest.raises(WorkloadError, match=words):
        Split(inputs, targets)


def test_example_inputs_need_a_sample():
    with pytest.raises(WorkloadError, match="at least one in dimension 0"):
        make_workload(example_inputs=torch.zeros(0, 4))


# --- check_workload


def test_a_sound_workload_passes_without_warnings():
    assert check_workload(make_workload()) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": lambda x: x}, "no module"),
        ({"network": Picker()}, r"training mode.*\n.*itself(.|\n)*network\.eval\(\)"),
        ({"test_split": Split(torch.zeros(0, 4))}, "'test_split' is empty"),
        ({"calibration": Split(torch.zeros(9, 5))}, r"'calibration' do not fit(.|\n)*\(9, 5\)"),
        ({"train": Split(torch.zeros(9, 4).double())}, "'train' do not fit(.|\n)*float64"),
        ({"train": with_value(make_split(9, 5), np.nan)}, "'train' holds NaN(.|\n)*1 of 9"),
        ({"test_split": with_value(make_split(9, 5), np.inf)}, "'test_split' holds NaN"),
        ({"search_split": Split(make_split(9, 5).inputs)}, "'search_split' has none"),
        ({"train": Split(make_split(9, 5).inputs, torch.full((9,), 3))}, "0 to 2"),
        ({"train": Split(make_split(9, 5).inputs, torch.full((9,), -1))}, "-1 to -1"),
        ({"train": Split(make_split(9, 5).inputs, torch.zeros(9))}, "no class numbers"),
        ({"train": Split(make_split(9, 5).inputs, torch.eye(9, 3).long())}, r"argmax\(1\)"),
        ({"network": Picker().double().eval()}, "network must be fp32(.|\n)*float64"),
        ({"metric": "f1"}, "metric is unknown(.|\n)*f1"),
        ({"metric": broken_metric}, "'broken_metric' raised KeyError"),
        ({"metric": lambda o, t: float("nan")}, "no finite number"),
        ({"metric": lambda o, t: o}, "returns one number"),
    ],
)
def test_unsound_workloads_are_refused(changes, words):
    with pytest.raises(WorkloadError, match=words):
        check_workload(make_workload(**changes))


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (lambda m, s: F.dropout(s, 0.5), "not deterministic"),
        (count_calls, "changes when it is run in eval mode(.|\n)*calls"),
        (lambda m, s: s - s.mean(0), "depends on the other samples"),
        (lambda m, s: s / 0, "hold NaN(.|\n)*output 0: 64 of 64"),
        (lambda m, s: {"logits": {s}}, "given:   dict of .logits: set"),
        (lambda m, s: s.sum(), "batch in dimension 0"),
        (lambda m, s: (s, s.sum()), "batch in dimension 0"),
        (lambda m, s: s @ s, "does not run on its inputs: RuntimeError"),
        (lambda m, s: s[:, :1], "two or more classes"),
    ],
)
def test_unsound_networks_are_refused(bend, words):
    with pytest.raises(WorkloadError, match=words):
        check_workload(bent(bend))


@pytest.mark.parametrize("form", [tuple, list])
def test_several_outputs_are_allowed(form):
    assert check_workload(bent(lambda m, s: form((s, s.sum(1))))) == ()


def test_a_training_mode_submodule_is_named():
    network = nn.Sequential(Picker(), nn.Dropout()).eval()
    network[1].train()
    with pytest.raises(WorkloadError, match="given:   1\n"):
        check_workload(make_workload(network=network))


def test_a_custom_metric_gets_numpy_and_no_targets_are_needed():
    seen = []

    def metric(outputs, targets):
        seen.append((outputs, targets))
        return -1.5

    splits = {n: Split(s.inputs) for n, s in make_workload().splits().items()}
    check_workload(make_workload(metric=metric, **splits))
    assert isinstance(seen[0][0], np.ndarray)
    assert seen[0][1] is None


@pytest.mark.parametrize(("label", "sound"), [(CLASSES, False), (-1, False), (-100, True)])
def test_labels_to_learn_are_checked_whatever_the_metric_reads(label, sound):
    train = make_split(40, 2)
    train.targets[5] = label
    workload = make_workload(metric="agreement", train=train)
    with nullcontext() if sound else pytest.raises(WorkloadError, match="'train' are outside"):
        check_workload(workload)
    # What cannot be learned as class numbers may be anything.
    other = Split(train.inputs, torch.full((40, 2), 99))
    check_workload(make_workload(metric="agreement", train=other))


def test_chance_accuracy_is_a_warning():
    (warning,) = check_workload(bent(lambda m, s: -s))
    assert "no better than chance among 3 classes" in warning


@pytest.mark.parametrize("bend", [lambda m, s: s, count_calls, lambda m, s: F.dropout(s)])
def test_the_users_network_and_generator_are_untouched(bend):
    workload = bent(bend)
    before = copy.deepcopy(dict(workload.network.named_buffers()) | workload.network.state_dict())
    generator = torch.random.get_rng_state()
    with contextlib.suppress(WorkloadError):
        check_workload(workload)
    after = dict(workload.network.named_buffers()) | workload.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generator, torch.random.get_rng_state())
    assert not workload.network.training
    assert all(p.requires_grad and p.grad is None for p in workload.network.parameters())


# --- overlaps


@settings(max_examples=40, deadline=None)
@given(
    shared=st.integers(0, 30),
    names=st.permutations(["calibration", "train", "search_split", "test_split"]),
    seed=st.integers(0, 2**16),
)
def test_overlap_is_counted_exactly(shared, names, seed):
    small, large = names[:2]
    data = make_split(600, seed + 10)
    first = data.subset(range(100))
    second = data.subset(range(100 - shared, 300))
    workload = make_workload(**{small: first, large: second})
    if shared > 1:
        with pytest.raises(WorkloadError) as caught:
            check_workload(workload)
        text = str(caught.value)
        assert f"{shared} of the 100 samples of '{small}' also occur in '{large}'" in text
    else:
        warnings = check_workload(workload)
        assert len(warnings) == shared
        assert all("1 of the 100 samples" in w and small in w for w in warnings)


@given(st.integers(0, 3))
def test_samples_differ_when_any_input_differs(position):
    left, right = torch.zeros(50, 4), torch.zeros(50, 4)
    left += torch.arange(50)[:, None]
    right += torch.arange(50)[:, None]
    right[:, position] += 0.5
    targets = torch.zeros(50, dtype=torch.long)
    changes = {"train": Split(left, targets), "search_split": Split(right, targets)}
    check_workload(make_workload(**changes))


# --- scores


def test_accuracy_and_agreement():
    outputs = np.array([[1.0, 0.0], [0.0, 1.0], [0.2, 0.1], [0.0, 0.1]])
    targets = np.array([0, 1, 1, 0])
    assert score("accuracy", outputs, targets) == 0.5
    assert score("accuracy", (outputs, outputs), torch.tensor(targets)) == 0.5
    assert score("agreement", outputs, None, outputs) == 1.0
    assert score("agreement", outputs, None, (-outputs,)) == 0.0


def test_accuracy_of_pixels_counts_every_pixel():
    outputs = np.zeros((2, 3, 4, 4))
    outputs[:, 1] = 1
    targets = np.ones((2, 4, 4), dtype=int)
    targets[0, 0] = 2
    assert score("accuracy", outputs, targets) == 28 / 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("accuracy", np.zeros((2, 3)), None), "needs targets"),
        (("agreement", np.zeros((2, 3)), None), "needs the original network's outputs"),
        (("accuracy", np.zeros((2, 3)), np.zeros((2, 1))), "different shapes"),
        (("accuracy", np.full((2, 3), np.nan), np.zeros(2)), "NaN"),
        (("accuracy", np.zeros((0, 3)), np.zeros(0)), "n >= 1"),
        ((lambda o, t: np.inf, np.zeros((2, 3)), None), "finite"),
    ],
)
def test_scores_that_mean_nothing_are_refused(arguments, words):
    with pytest.raises(WorkloadError, match=words):
        score(*arguments)


def test_custom_metric_gets_a_tuple_for_several_outputs():
    first, second = np.ones((2, 3)), np.zeros((2, 1))
    assert score(lambda o, t: len(o), (first, second), None) == 2
    assert score(lambda o, t: o.shape[1], (first,), None) == 3


def test_standard_error_is_binomial_and_never_zero():
    assert score_standard_error("accuracy", 0.9, 10_000) == pytest.approx(0.003, rel=1e-2)
    assert score_standard_error("agreement", 1.0, 100) > 0.01
    assert score_standard_error(lambda o, t: 0.0, 0.9, 100) is None


def test_network_outputs_do_not_depend_on_the_batch_size():
    split = make_split(37, 0)
    (whole,) = network_outputs(Picker(), split.inputs, batch_size=37)
    (parts,) = network_outputs(Picker(), split.inputs, batch_size=5)
    np.testing.assert_allclose(whole, parts, rtol=1e-6)


# --- load_workload

FILE = """
from {sibling} import make

def workload():
    return make()

def other():
    return 3

def broken():
    raise KeyError("deep inside")

def needs(argument):
    return argument
"""

SIBLING = """
import torch
from torch import nn
from autocompress.workload import Split, Workload

def make():
    split = Split(torch.zeros(2, 4))
    return Workload(nn.Identity().eval(), torch.zeros(1, 4), split, None, split, split, "agreement")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sibling = f"sibling_{abs(hash(tmp_path))}"
    (tmp_path / "mine.py").write_text(FILE.format(sibling=sibling))
    (tmp_path / f"{sibling}.py").write_text(SIBLING)
    (tmp_path / "crash.py").write_text("1 / 0\n")
    (tmp_path / "syntax.py").write_text("def (\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(2)\n")
    return tmp_path


def test_a_workload_is_found_beside_the_experiment_then_in_the_working_directory(
    folder, monkeypatch
):
    path = list(sys.path)
    assert isinstance(load_workload("mine.py:workload", folder / "x.yaml"), Workload)
    monkeypatch.chdir(folder)
    assert isinstance(load_workload("mine.py:workload", Path("/elsewhere/x.yaml")), Workload)
    assert isinstance(load_workload("mine.py:workload"), Workload)
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mine", "file.py:function"),
        ("mine.py:", "file.py:function"),
        ("absent.py:workload", "does not exist(.|\n)*absent.py"),
        ("mine.py:absent", "no function 'absent'(.|\n)*workload"),
        ("mine.py:other", "returned no Workload(.|\n)*int"),
        ("mine.py:broken", "'broken' raised: KeyError: 'deep inside'"),
        ("mine.py:needs", "TypeError"),
        ("crash.py:workload", "cannot be imported: ZeroDivisionError"),
        ("syntax.py:workload", "cannot be imported: SyntaxError"),
        ("exits.py:workload", "cannot be imported: SystemExit"),
    ],
)
def test_unusable_workload_files_are_refused(folder, spec, words):
    path = list(sys.path)
    with pytest.raises(WorkloadError, match=words):
        load_workload(spec, folder / "x.yaml")
    assert sys.path == path


def test_the_users_own_traceback_is_chained(folder):
    with pytest.raises(WorkloadError) as caught:
        load_workload("mine.py:broken", folder / "x.yaml")
    assert isinstance(caught.value.__cause__, KeyError)
    frames = []
    trace = caught.value.__cause__.__traceback__
    while trace:
        frames.append(Path(trace.tb_frame.f_code.co_filename).name)
        trace = trace.tb_next
    assert frames[-1] == "mine.py"


def test_chance_is_the_share_of_the_most_common_class():
    assert chance_level("accuracy", torch.tensor([0, 2, 2, 1])) == 0.5
    assert chance_level("accuracy", torch.tensor([[0, 1], [1, 1]])) == 0.75
    for metric, targets in (("agreement", torch.tensor([0])), ("accuracy", None)):
        assert chance_level(metric, targets) == -math.inf
