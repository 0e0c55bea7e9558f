"""Inputs by position and by name, outputs of any nesting, open axes: one form inside."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.graph import trace
from autocompress.workload import Split, Workload, check_workload, network_outputs
from autocompress.workload.network import Positional, flatten_tensors

AXES = {"left": {1: "length"}, "right": {1: "length"}}


class Named(nn.Module):
    """Only called by keyword; nested outputs with None among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, *, left: Tensor, right: Tensor, extra: Tensor | None = None):
        x = self.second(self.first(left).relu()) - right.sum(2, keepdim=True)
        return OrderedDict(scores=x.mean(1), extra=extra, inner=(x, [x.sum(2)]))


def inputs(count: int, seed: int = 0, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "left": torch.randn(count, length, 4, generator=generator),
        "right": torch.randn(count, length, 2, generator=generator),
    }


def turned(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(reversed(given.items()))


def make_workload(**changes: object) -> Workload:
    fields: dict[str, object] = {
        "network": Named().eval(),
        "example_inputs": inputs(1),
        "calibration": Split(turned(inputs(10, 1))),
        "train": None,
        "search_split": Split(inputs(10, 2), torch.zeros(10, dtype=torch.long)),
        "test_split": Split(turned(inputs(10, 3)), torch.zeros(10, dtype=torch.long)),
        "metric": lambda outputs, targets: -float(np.square(outputs[0]).mean()),
    }
    return Workload(**(fields | changes))


def test_mappings_become_tuples_in_the_order_of_the_example_inputs():
    workload = make_workload()
    assert workload.input_names == ("left", "right")
    assert check_workload(workload) == ()
    for split in workload.splits().values():
        assert [t.shape[2] for t in split.inputs] == [4, 2]
        assert split.input_names == ("left", "right")
    subset = workload.test_split.subset(3)
    assert subset.input_names == ("left", "right")
    # A change of one field keeps the names and wraps the network once.
    again = replace(workload, calibration=Split(turned(inputs(10, 4))))
    assert again.network is workload.network
    assert [t.shape[2] for t in again.calibration.inputs] == [4, 2]


def test_outputs_are_flat_and_in_order():
    original = Named().eval()
    workload = make_workload(network=original)
    found = network_outputs(workload.network, workload.calibration.inputs)
    given = workload.calibration.inputs
    with torch.no_grad():
        out = original(left=given[0], right=given[1])
    for value, wanted in zip(found, flatten_tensors(out), strict=True):
        np.testing.assert_allclose(value, wanted.numpy(), rtol=1e-6)
    assert len(found) == 3


def test_layers_keep_their_own_names_and_can_be_replaced():
    network = make_workload().network
    assert isinstance(network, Positional)
    assert [name for name, _ in network.named_modules()] == ["", "first", "second"]
    assert list(network.state_dict()) == list(Named().state_dict())
    given = tuple(inputs(3).values())
    before = network(*given)[0]
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        copied.second = nn.Sequential(copied.second, nn.ReLU(), nn.Linear(3, 3))
        assert not torch.allclose(copied(*given)[0], before)
        torch.testing.assert_close(network(*given)[0], before)
        assert copied.train().network.training
        assert not copied.eval().network.training


def test_the_structure_is_found_through_the_wrapping():
    workload = make_workload()
    graph = trace(workload.network, workload.example_inputs)
    assert [layer.name for layer in graph.layers] == ["first", "second"]
    assert [group.name for group in graph.groups if group.prunable] == ["first"]


def test_a_network_called_by_position_is_wrapped_only_for_its_outputs():
    class Plain(nn.Module):
        def __init__(self, nested: bool) -> None:
            super().__init__()
            self.layer, self.nested = nn.Linear(4, 3), nested

        def forward(self, left: Tensor):
            x = self.layer(left)
            return {"scores": x, "both": [x, None]} if self.nested else (x, x)

    split = Split(torch.randn(4, 4))
    for nested in (False, True):
        network = Plain(nested).eval()
        workload = Workload(network, split.inputs, split, None, split, split, "agreement")
        assert (workload.network is network) == (not nested)
        assert [len(o) for o in network_outputs(workload.network, split.inputs)] == [4, 4]


def test_outputs_that_are_no_tensors_are_named():
    with pytest.raises(WorkloadError, match=r"no tensor(.|\n)*given:   str"):
        flatten_tensors({"scores": torch.zeros(1), "name": "x"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": Split({"left": torch.zeros(2, 6, 4)})}, "other names(.|\n)*left, right"),
        ({"example_inputs": {"left": torch.zeros(1, 2), "the right": torch.zeros(1)}}, "the right"),
        ({"example_inputs": {}}, "must be tensors"),
        ({"example_inputs": {"left": torch.zeros(1), "right": None}}, "right: NoneType"),
        ({"example_inputs": tuple(inputs(1).values())}, "no names, as example_inputs have none"),
        ({"dynamic_axes": ({1: "length"},)}, "tuple of 2 mappings"),
        ({"dynamic_axes": {"middle": {1: "length"}}}, "left, right"),
        ({"dynamic_axes": {"left": {0: "length"}}}, "leave axis 0 out"),
        ({"dynamic_axes": {"left": {3: "length"}}}, "1 to 2"),
        ({"dynamic_axes": {"left": {1: "batch"}}}, "other than 'batch'"),
        ({"dynamic_axes": {"left": {1: 8}}}, "identifier"),
        ({"dynamic_axes": {"left": {1: "a", 2: "a"}}}, "6 and 4"),
        ({"dynamic_axes": AXES, "example_inputs": inputs(1, length=1)}, "too small"),
    ],
)
def test_inputs_and_axes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(WorkloadError, match=words):
        make_workload(**changes)


def test_axes_by_name_and_by_position_are_the_same():
    by_name = make_workload(dynamic_axes=turned(AXES))
    by_position = make_workload(dynamic_axes=tuple(AXES.values()))
    assert by_name.dynamic_axes == by_position.dynamic_axes == ({1: "length"}, {1: "length"})
    assert make_workload(dynamic_axes={"right": {}}).dynamic_axes == ()
    assert check_workload(by_name) == ()
    assert replace(by_name, metric="agreement").dynamic_axes == by_name.dynamic_axes


def test_an_axis_that_the_network_fixes_is_refused():
    # The features of a linear layer.
    workload = make_workload(dynamic_axes={"left": {2: "features"}})
    with pytest.raises(WorkloadError, match=r"no other size(.|\n)*features of 4"):
        check_workload(workload)


def test_samples_of_another_size_are_refused_with_advice():
    workload = make_workload(dynamic_axes=AXES, calibration=Split(inputs(10, 1, length=9)))
    with pytest.raises(WorkloadError, match=r"'calibration' do not fit(.|\n)*to one size"):
        check_workload(workload)
