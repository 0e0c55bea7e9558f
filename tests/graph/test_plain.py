"""Which layers are what their type says, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from networks import make_case
from torch import Tensor, nn

from autocompress.graph import NetworkGraph, endless, trace
from autocompress.graph.plain import own_padding
from autocompress.graph.transposed import with_linear_layers


class Wrapped(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class PaddedInside(nn.Conv2d):
    """Overrides what the base's forward pass calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias)


class Same(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.gain = nn.Parameter(torch.ones(1))


class OwnPadding(nn.Conv2d):
    """Pads by a module of its own, as networks from TensorFlow do."""

    def __init__(self, sides: tuple[int, ...], stride: int) -> None:
        super().__init__(3, 8, 3, stride)
        self.pad = nn.ZeroPad2d(sides)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride)


def _two_convolutions(layer: nn.Module) -> NetworkGraph:
    network = nn.Sequential(
        layer, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip
    return trace(network, (torch.randn(2, 3, 8, 8),))


def _hooked() -> nn.Module:
    layer = nn.Conv2d(3, 8, 3)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Standardized(3, 8, 3), "computes something else than nn.Conv2d: its outputs differ"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), "remove_parametrizations"),
        (_hooked(), "hooks"),
    ],
)
def test_a_layer_that_is_not_what_its_type_says_is_left_with_its_groups(
    layer: nn.Module, reason: str
) -> None:
    graph = _two_convolutions(layer)
    assert reason in graph.layer("0").reason
    assert "runs through 0" in graph.group("0").reason
    assert graph.layer("2").compressible
    assert graph.group("2").prunable


@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_that_pads_its_input_itself_is_only_not_divided(
    sides: tuple[int, ...], stride: int
) -> None:
    layer = OwnPadding(sides, stride)
    graph, x = _two_convolutions(layer), torch.randn(2, 3, 8, 8)
    found = own_padding(layer, x, layer(x))
    assert found is not None
    padded = F.conv2d(F.pad(x, found), layer.weight, layer.bias, stride)
    torch.testing.assert_close(padded, layer(x))
    assert graph.layer("0").compressible and graph.group("0").prunable
    assert "pads its input" in graph.layer("0").undivided


def test_padding_inside_the_base_classs_forward_is_seen() -> None:
    graph = _two_convolutions(PaddedInside(3, 8, 3))
    assert graph.layer("0").compressible and "pads its input" in graph.layer("0").undivided


def test_padding_that_is_not_understood_leaves_the_layer_alone() -> None:
    graph = _two_convolutions(OwnPadding((0, 2, 1, 3), 1))
    assert "its outputs" in graph.layer("0").reason and not graph.group("0").prunable


def test_a_subclass_that_computes_the_same_is_plain() -> None:
    network = nn.Sequential(Same(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    graph = trace(network, (torch.randn(2, 4),))
    assert all(layer.compressible and not layer.undivided for layer in graph.layers)
    assert graph.group("0").prunable


def test_further_parameters_make_a_layer_odd() -> None:
    network = nn.Sequential(Scaled(4, 8), nn.Linear(8, 3)).eval()
    assert "parameters that" in trace(network, (torch.randn(2, 4),)).layer("0").reason


def test_a_norm_is_not_put_into_a_layer_that_is_left() -> None:
    network = nn.Sequential(
        Standardized(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3)
    )
    assert trace(network.eval(), (torch.randn(2, 3, 8, 8),)).norms == {}


def test_layers_that_share_a_weight_are_left() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    network[2].weight = network[0].weight
    graph = trace(network, (torch.randn(2, 4),))
    assert graph.layer("0").reason == "it shares a weight with 2"
    assert graph.layer("2").reason == "it shares a weight with 0"
    assert graph.layer("3").compressible


def test_a_layer_that_is_called_by_keyword_is_left() -> None:
    network = Wrapped(lambda m, x: m.b(F.relu(m.a(input=x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    assert "called" in trace(network.eval(), (torch.randn(2, 4),)).layer("a").reason


def test_a_layer_whose_attributes_the_network_reads_is_not_divided() -> None:
    network = Wrapped(
        lambda m, x: m.b(F.relu(m.a(x)).to(m.a.weight.dtype)),
        a=nn.Linear(4, 8), b=nn.Linear(8, 3),
    ).eval()  # fmt: skip
    graph = trace(network, (torch.randn(2, 4),))
    assert "weight" in graph.layer("a").undivided
    assert graph.layer("a").compressible
    assert not graph.layer("b").undivided


def test_a_layer_of_two_names_is_not_divided() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    network.add_module("again", network[0])
    network = Wrapped(lambda m, x: m.body[2](m.body[0](x)), body=network).eval()
    assert "again" in trace(network, (torch.randn(2, 4),)).layer("body.0").undivided


def test_windows_in_the_batch_count_as_positions() -> None:
    network = Wrapped(
        lambda m, x: m.b(m.a(x.reshape(-1, 4))).reshape(len(x), -1),
        a=nn.Linear(4, 8), b=nn.Linear(8, 3),
    ).eval()  # fmt: skip
    assert trace(network, (torch.randn(2, 6, 4),)).layer("a").macs == 6 * 4 * 8


def test_a_network_without_dependencies_keeps_its_layers_and_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case("attention")

    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("lost the thread")

    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", fail)
    graph = trace(case.network, case.example_inputs)
    assert [group.name for group in graph.groups] == ["attention.heads"]
    assert all(layer.compressible for layer in graph.layers)
    assert "lost the thread" in graph.notes[0]


def test_leaving_a_layer_spares_its_groups() -> None:
    case = make_case("residual")
    graph = trace(case.network, case.example_inputs)
    spared = graph.leaving({"block1.conv1": "out of reach"})
    assert spared.layer("block1.conv1").reason == "out of reach"
    assert not spared.group("block1.conv1").prunable
    assert spared.group("block2.conv1").prunable


def test_groups_without_an_end_are_left_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("residual")
    monkeypatch.setattr(endless, "_MOST_MEMBERS", 0)
    graph = trace(case.network, case.example_inputs)
    assert not any(group.prunable for group in graph.groups)
    assert "its dependencies have no end" in {group.reason for group in graph.groups}
    assert all(layer.compressible for layer in graph.layers)


class Transposed(nn.Module):
    """As `Conv1D` of transformers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Gated(Transposed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_linear_layers_under_another_name_become_plain() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Transposed(4, 8), Gated(8, 8), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4)
    changed = with_linear_layers(network, (x,))
    assert [type(m) for m in changed] == [nn.Linear, Gated, nn.Linear]
    assert torch.allclose(changed(x), network(x), rtol=1e-4, atol=1e-4)
    assert isinstance(network[0], Transposed)
    assert with_linear_layers(changed, (x,)) is changed


def test_a_network_that_reads_more_of_such_a_layer_keeps_it() -> None:
    network = Wrapped(
        lambda m, x: m.b(m.a(x).reshape(len(x), m.a.weight.shape[1])),
        a=Transposed(4, 8), b=nn.Linear(8, 3),
    ).eval()  # fmt: skip
    assert with_linear_layers(network, (torch.randn(2, 4),)) is network


class Shifted(nn.Embedding):
    """As OPT's positions, which are counted from a mask and begin at two."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward((mask.cumsum(1) * mask).long() + 2)


def test_a_table_with_a_forward_pass_of_its_own_is_no_layer() -> None:
    """What it is given are no entries, and a table in its place would read others."""
    network = nn.Sequential(Shifted(9, 4), nn.Linear(4, 3)).eval()
    assert [x.name for x in trace(network, (torch.ones(2, 5),)).layers] == ["1"]
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).eval()
    tokens = torch.ones(2, 5, dtype=torch.long)
    assert [x.name for x in trace(plain, (tokens,)).layers] == ["0", "1"]
