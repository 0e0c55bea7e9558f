"""Exported programs become networks of modules."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from networks import NAMES, Residual, make_case
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.graph import trace
from autocompress.workload import Split, Workload, check_workload
from autocompress.workload.exported import raise_layers

BATCH = torch.export.Dim("batch")


class Mixed(nn.Module):
    """Layers, bare parameters, in-place functions and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.conv = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 6, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(6 * 4, 5)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        x = F.relu(F.conv2d(x, self.filters, padding=1))
        x = F.adaptive_avg_pool2d(self.block(self.norm(self.conv(x))), 2)
        scores = self.head(self.drop(torch.flatten(x, 1))) * self.scale
        return {"scores": scores, "none": None, "mean": x.mean((2, 3))}


class Tied(nn.Module):
    """An embedding whose weight makes the scores too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.bias = nn.Parameter(torch.randn(20))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner(torch.relu(self.inner(self.embedding(tokens))))
        return F.linear(self.norm(x), self.embedding.weight, self.bias)


class Series(nn.Module):
    """Weights beside modules of the same owner."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 6, 3)
        self.owner = nn.Module()
        self.owner.weight = nn.Parameter(torch.randn(4, 6, 1))
        self.owner.norm = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(self.first(x).relu(), self.owner.weight)
        return F.linear(self.owner.norm(x).mean(2), self.weight)


def exported(network: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    shapes = tuple({0: BATCH} for _ in inputs)
    return torch.export.export(network.eval(), inputs, dynamic_shapes=shapes)


CASES = {
    "mixed": (Mixed, torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)),
    "tied": (Tied, torch.randint(0, 20, (2, 7)), torch.randint(0, 20, (5, 7))),
    "series": (Series, torch.randn(2, 2, 9), torch.randn(5, 2, 9)),
}


def kinds(network: nn.Module) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in network.named_modules() if not list(m.children())}


@pytest.mark.parametrize("name", CASES)
def test_the_outputs_are_those_of_the_original_in_any_batch(name):
    kind, example, other = CASES[name]
    torch.manual_seed(0)
    original = kind().eval()
    found = raise_layers(exported(original, example), (example,), ())
    expected = original(other)
    if isinstance(expected, dict):
        expected = tuple(v for v in expected.values() if v is not None)
    torch.testing.assert_close(found(other), expected)
    torch.testing.assert_close(copy.deepcopy(found)(other), expected)
    assert not any(module.training for module in found.modules())


def test_modules_are_named_after_the_owners_of_their_weights():
    network = raise_layers(exported(Mixed(), CASES["mixed"][1]), (CASES["mixed"][1],), ())
    assert kinds(network) == {
        "filters": "Conv2d", "conv": "Conv2d", "norm": "BatchNorm2d", "block.0": "Conv2d",
        "head": "Linear",
    }  # fmt: skip
    assert network.get_submodule("conv").padding == "same"
    assert network.get_submodule("conv").groups == 2
    assert "scale" in dict(network.named_parameters())
    network = raise_layers(exported(Series(), CASES["series"][1]), (CASES["series"][1],), ())
    assert kinds(network) == {
        "first": "Conv1d", "owner.weight": "Conv1d", "owner.norm": "BatchNorm1d",
        "weight": "Linear",
    }  # fmt: skip


def test_shared_weights_stay_shared():
    example = CASES["tied"][1]
    network = raise_layers(exported(Tied(), example), (example,), ())
    found = kinds(network)
    assert sorted(found.values()) == ["Embedding", "LayerNorm", "Linear", "Linear"]
    (head,) = (n for n, m in network.named_modules() if getattr(m, "out_features", 0) == 20)
    assert operator.attrgetter(head)(network).weight is network.embedding.weight
    assert network.embedding.padding_idx == 0
    copied = copy.deepcopy(network)
    assert operator.attrgetter(head)(copied).weight is copied.embedding.weight


def test_a_workload_takes_a_program_and_finds_the_structure_of_the_original():
    torch.manual_seed(0)
    x = torch.randn(40, 2, 8, 8)
    parts = [Split(x[i : i + 10]) for i in range(0, 40, 10)]
    original = Residual().eval()
    program = exported(original, x[:2])
    workload = Workload(program, x[:1], parts[0], None, parts[1], parts[2], "agreement")
    assert check_workload(workload) == ()
    found = trace(workload.network, workload.example_inputs)
    wanted = trace(original, (x[:1],))
    assert found.layers == wanted.layers
    assert found.norms == wanted.norms
    prunable = [{g.name for g in graph.groups if g.prunable} for graph in (found, wanted)]
    assert prunable[0] == prunable[1] != set()


def test_a_program_of_keyword_arguments_takes_a_mapping():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
            return self.layer(left) - right

    inputs = {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    network = Sum().eval()
    shapes = {name: {0: BATCH} for name in inputs}
    program = torch.export.export(network, (), inputs, dynamic_shapes=shapes)
    split = Split({n: torch.randn(6, 4) for n in ("right", "left")})
    workload = Workload(program, inputs, split, None, split, split, "agreement")
    plain = Split(split.inputs)
    expected = network(left=split.inputs[1], right=split.inputs[0])
    torch.testing.assert_close(workload.network(*workload.search_split.inputs), expected)
    with pytest.raises(WorkloadError, match="does not run on example_inputs"):
        Workload(program, split.inputs, plain, None, plain, plain, "agreement")


def test_a_fixed_batch_and_training_mode_are_refused():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(WorkloadError, match=r"fixed to a batch size(.|\n)*Dim\(.batch.\)"):
        raise_layers(torch.export.export(Mixed().eval(), (x,)), (x,), ())
    program = torch.export.export(Mixed().train(), (x,), dynamic_shapes=({0: BATCH},))
    with pytest.raises(WorkloadError, match=r"training mode(.|\n)*network\.eval\(\)"):
        raise_layers(program, (x,), ())


def test_a_program_without_layers_is_refused():
    x = torch.randn(2, 4)
    program = exported(nn.Sequential(nn.Linear(4, 4)), x).run_decompositions()
    with pytest.raises(WorkloadError, match=r"no layer(.|\n)*before run_decompositions"):
        raise_layers(program, (x,), ())


def test_a_weight_that_is_no_parameter_stays_a_tensor():
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("kernel", torch.full((4, 1, 2, 2), 0.25))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.conv(x), self.kernel, groups=4).mean((2, 3))

    x = torch.randn(2, 3, 8, 8)
    network = raise_layers(exported(Blur(), x), (x,), ())
    assert kinds(network) == {"conv": "Conv2d"}
    assert "kernel" in dict(network.named_buffers())


@pytest.mark.parametrize("name", NAMES)
def test_programs_of_every_structure_have_the_layers_of_their_networks(name):
    made = make_case(name)
    inputs = tuple(x[:2] for x in made.inputs)
    network = raise_layers(exported(made.network, *inputs), made.example_inputs, ())
    found, wanted = (trace(n, made.example_inputs) for n in (network, made.network))
    assert len(found.layers) == len(wanted.layers)
    assert found.norms == wanted.norms
    prunable = [{g.name for g in graph.groups if g.prunable} for graph in (found, wanted)]
    # Heads, and channels in a reshape, are numbers in the program.
    fixed = {"reshaped", "attention", "fused_attention"}
    assert prunable[0] <= prunable[1] if name in fixed else prunable[0] == prunable[1]
