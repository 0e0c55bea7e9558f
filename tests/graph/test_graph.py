from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import NAMES, enliven, graph_of, make_case, run
from torch import Tensor, nn

from autocompress.errors import GraphError
from autocompress.graph import ChannelGroup, NetworkGraph, trace
from autocompress.graph.groups import dense_consumers, kept_size, remove_channels


class Wrapped(nn.Module):
    """Named layers and a forward function over them."""

    def __init__(self, forward: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = [forward]

    def forward(self, *inputs: Tensor) -> object:
        return self._forward[0](self, *inputs)


def traced(forward: Callable[..., object], *shape: int, **layers: nn.Module) -> NetworkGraph:
    network = Wrapped(forward, **layers)
    enliven(network, (torch.randn(32, *shape),))
    return trace(network, (torch.randn(2, *shape),))


def sides(group: ChannelGroup) -> set[tuple[str, str]]:
    return {(m.module, m.side) for m in group.members}


def groups_of(name: str) -> dict[str, ChannelGroup]:
    return {g.name: g for g in graph_of(name).groups}


def test_a_residual_sum_couples_its_producers() -> None:
    groups = groups_of("residual")
    assert list(groups) == ["stem+1", "block1.conv1", "block2.conv1", "block2.conv2+1", "head"]
    assert sides(groups["stem+1"]) == {
        ("stem", "out"), ("bn", "out"), ("block1.conv2", "out"), ("block1.bn2", "out"),
        ("block1.conv1", "in"), ("block2.conv1", "in"), ("block2.shortcut", "in"),
    }  # fmt: skip
    assert groups["stem+1"].size == 8
    network = make_case("residual").network
    readers = {m.module for m in dense_consumers(network, groups["stem+1"])}
    assert readers == {"block1.conv1", "block2.conv1", "block2.shortcut"}


def test_concatenated_groups_map_to_their_own_columns() -> None:
    groups = groups_of("concat")
    read = {
        name: next(m for m in groups[name].members if m.module == "join" and m.side == "in")
        for name in ("left", "right")
    }
    assert read["left"].indices == tuple(range(6))
    assert read["right"].indices == tuple(range(6, 14))
    assert read["right"].select([0, 7]) == [6, 13]


def test_a_depthwise_convolution_belongs_to_the_group_before_it() -> None:
    groups = groups_of("depthwise")
    assert set(groups) == {"expand", "project", "head"}
    assert sides(groups["expand"]) == {
        ("expand", "out"), ("bn1", "out"), ("depthwise", "out"), ("bn2", "out"), ("project", "in"),
    }  # fmt: skip
    assert [
        m.module for m in dense_consumers(make_case("depthwise").network, groups["expand"])
    ] == ["project"]


def test_a_flatten_gives_every_channel_its_block_of_columns() -> None:
    member = next(m for m in groups_of("flatten")["conv"].members if m.side == "in")
    assert (member.module, member.per_channel) == ("hidden", 9)
    assert member.select([2, 5]) == [*range(18, 27), *range(45, 54)]


@pytest.mark.parametrize("name", NAMES)
def test_groups_at_the_output_are_not_prunable_and_say_why(name: str) -> None:
    graph = graph_of(name)
    at_the_output = {"two_outputs": {"classes", "boxes"}}.get(name, {"head"})
    inside_heads = {"attention": {"attention.query+2"}, "fused_attention": {"attention.qkv"}}
    refused = {
        g.name: g.reason
        for g in graph.groups
        if not g.prunable and g.name not in inside_heads.get(name, ())
    }
    assert set(refused) == at_the_output
    assert all("output" in reason for reason in refused.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_network_runs_without_channels_of_every_prunable_group(name: str) -> None:
    case = make_case(name)
    groups = [g for g in graph_of(case.name).groups if g.prunable]
    assert groups
    removals = [(g, [0, g.size // 2]) for g in groups]
    pruned = copy.deepcopy(case.network)
    remove_channels(pruned, removals)
    before, after = run(case.network, case.inputs), run(pruned, case.inputs)
    assert [a.shape for a in after] == [b.shape for b in before]
    again = trace(pruned, case.example_inputs)
    assert {g.name: g.size for g in again.groups if g.prunable} == {
        g.name: g.size - 2 for g in groups
    }


def has_layer_norm(network: nn.Module, group: ChannelGroup) -> bool:
    return any(isinstance(network.get_submodule(m.module), nn.LayerNorm) for m in group.members)


@pytest.mark.parametrize("name", NAMES)
def test_removing_channels_equals_zeroing_what_reads_them(name: str) -> None:
    """With the readers' columns at zero, taking the channels out changes nothing.

    Not so after a layer norm, whose output depends on how many channels there are.
    """
    case = make_case(name)
    groups = [g for g in graph_of(case.name).groups if g.prunable]
    for group in (g for g in groups if not has_layer_norm(case.network, g)):
        gone = [1, group.size - 1]
        zeroed = copy.deepcopy(case.network)
        for member in dense_consumers(zeroed, group):
            with torch.no_grad():
                zeroed.get_submodule(member.module).weight[:, member.select(gone)] = 0
        pruned = copy.deepcopy(zeroed)
        remove_channels(pruned, [(group, gone)])
        for a, b in zip(run(zeroed, case.inputs), run(pruned, case.inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_layer_norm_keeps_its_channels_in_order() -> None:
    norm = nn.LayerNorm(16)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(16.0))
        norm.bias.copy_(-torch.arange(16.0))
    network = Wrapped(
        lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(4, 16), norm=norm, b=nn.Linear(16, 3)
    )
    group = trace(network, (torch.randn(2, 4),)).group("a")
    # Of the set {1, 3, 8} CPython gives 8 first.
    remove_channels(network, [(group, [i for i in range(16) if i not in (1, 3, 8)])])
    assert norm.weight.tolist() == [1, 3, 8]
    assert norm.bias.tolist() == [-1, -3, -8]
    assert norm.normalized_shape == (3,)


def test_a_grouped_convolution_is_refused_with_its_name() -> None:
    graph = traced(
        lambda m, x: m.head(m.grouped(m.conv(x)).mean((2, 3))), 2, 6, 6,
        conv=nn.Conv2d(2, 8, 1), grouped=nn.Conv2d(8, 8, 3, groups=2), head=nn.Linear(8, 3),
    )  # fmt: skip
    for name in ("conv", "grouped"):
        group = next(g for g in graph.groups if any(m.module == name for m in g.members))
        assert "grouped" in group.reason and "convolution" in group.reason


def test_a_constant_channel_count_in_a_reshape_is_a_reason() -> None:
    graph = traced(
        lambda m, x: m.head(m.conv(x).view(-1, 8, 36).mean(2)), 2, 6, 6,
        conv=nn.Conv2d(2, 8, 3, padding=1), head=nn.Linear(8, 3),
    )  # fmt: skip
    assert "fails without one of its channels" in graph.group("conv").reason


def test_a_bare_parameter_is_a_reason() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, 3)})
    network = Wrapped(lambda m, x: m.layers["b"](m.layers["a"](x) * m.scale), layers=layers)
    network.scale = nn.Parameter(torch.ones(8))
    group = next(
        g for g in trace(network, (torch.randn(2, 4),)).groups
        if ("layers.a", "out") in sides(g)
    )  # fmt: skip
    assert not group.prunable and group.reason


def test_channels_that_reach_the_output_beside_a_layer_are_not_prunable() -> None:
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.a(x)
        return m.b(features), features

    graph = traced(forward, 4, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    assert "output" in graph.group("a").reason


def test_channels_that_no_dense_layer_reads_are_not_prunable() -> None:
    """Their mean reaches the output, whose shape does not change with their number."""
    graph = traced(
        lambda m, x: F.relu(m.depthwise(m.conv(x))).mean((1, 2, 3)).unsqueeze(1), 2, 6, 6,
        conv=nn.Conv2d(2, 8, 1), depthwise=nn.Conv2d(8, 8, 3, groups=8),
    )  # fmt: skip
    assert all(not g.prunable and g.reason for g in graph.groups)


def test_a_frozen_network_has_the_same_groups() -> None:
    case = make_case("residual")
    frozen = copy.deepcopy(case.network).requires_grad_(False)
    assert trace(frozen, case.example_inputs).groups == graph_of(case.name).groups
    assert not any(p.requires_grad for p in frozen.parameters())


def test_groups_are_found_without_gradients_switched_on() -> None:
    case = make_case("residual")
    with torch.no_grad():
        assert trace(case.network, case.example_inputs).groups == graph_of(case.name).groups


def test_tracing_leaves_the_network_as_it_is() -> None:
    case = make_case("residual")
    network = copy.deepcopy(case.network).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    trace(network, case.example_inputs)
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_macs_and_bytes_by_hand() -> None:
    layers = {layer.name: layer for layer in graph_of("residual").layers}
    assert {name: layer.macs for name, layer in layers.items()} == {
        "stem": 64 * 8 * 2 * 9,
        "block1.conv1": 64 * 8 * 8 * 9,
        "block1.conv2": 64 * 8 * 8 * 9,
        "block2.conv1": 16 * 12 * 8 * 9,
        "block2.conv2": 16 * 12 * 12 * 9,
        "block2.shortcut": 16 * 12 * 8,
        "head": 12 * 5,
    }
    assert layers["head"].weight_bytes == 4 * (60 + 5)
    assert layers["block2.shortcut"].weight_bytes == 4 * (96 + 12)


@pytest.mark.parametrize(
    ("network", "layer", "macs"),
    [
        ("depthwise", "depthwise", 36 * 12 * 9),
        ("tokens", "up", 7 * 8 * 24),
        ("signal", "conv2", 8 * 12 * 8 * 3),
        ("flatten", "hidden", 54 * 16),
    ],
)
def test_macs_of_other_layers_by_hand(network: str, layer: str, macs: int) -> None:
    assert graph_of(network).layer(layer).macs == macs


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    graph = traced(lambda m, x: m.a(F.relu(m.a(x))), 4, a=nn.Linear(4, 4))
    assert graph.layer("a").macs == 2 * 16


def test_norms_of_the_residual_network() -> None:
    assert graph_of("residual").norms == {
        "stem": "bn",
        "block1.conv1": "block1.bn1",
        "block1.conv2": "block1.bn2",
        "block2.conv1": "block2.bn1",
        "block2.conv2": "block2.bn2",
    }


def _relu_between(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.norm(F.relu_(m.conv(x))).mean((2, 3)))


def _also_summed(m: nn.Module, x: Tensor) -> Tensor:
    made = m.conv(x)
    return m.head((m.norm(made) + made).mean((2, 3)))


def _also_shift_invariant(m: nn.Module, x: Tensor) -> Tensor:
    made = m.conv(x)
    return m.head((m.norm(made) * made.flatten(1).softmax(1).reshape(made.shape)).sum((2, 3)))


def _norm_twice(m: nn.Module, x: Tensor) -> Tensor:
    return m.head((m.norm(m.conv(x)) + m.norm(x)).mean((2, 3)))


def _plain(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(F.relu(m.norm(m.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("forward", "norms"),
    [
        (_plain, {"conv": "norm"}),
        (_relu_between, {}),
        (_also_summed, {}),
        (_also_shift_invariant, {}),
        (_norm_twice, {}),
    ],
)
def test_a_norm_pairs_only_with_a_layer_that_it_alone_reads(
    forward: Callable[..., object], norms: dict[str, str]
) -> None:
    torch.manual_seed(0)
    graph = traced(
        forward, 4, 5, 5, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4), head=nn.Linear(4, 3)
    )
    assert graph.norms == norms


def test_a_norm_over_tokens_is_no_partner_of_a_linear_layer() -> None:
    """BatchNorm1d scales dimension 1, a linear layer's channels are in dimension 2."""
    graph = traced(
        lambda m, x: m.head(m.norm(m.a(x)).mean(1)), 6, 4,
        a=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 3),
    )  # fmt: skip
    assert graph.norms == {}


def test_a_norm_after_a_linear_layer_on_vectors_is_its_partner() -> None:
    graph = traced(
        lambda m, x: m.head(m.norm(m.a(x))), 4,
        a=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 3),
    )  # fmt: skip
    assert graph.norms == {"a": "norm"}


def test_a_norm_without_running_statistics_is_no_partner() -> None:
    graph = traced(
        _plain, 4, 5, 5, conv=nn.Conv2d(4, 4, 1), head=nn.Linear(4, 3),
        norm=nn.BatchNorm2d(4, track_running_stats=False),
    )  # fmt: skip
    assert graph.norms == {}


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("boom"), AssertionError("boom"), KeyError("boom"), AttributeError("boom")],
)
def test_a_network_that_does_not_run_is_a_graph_error(error: Exception) -> None:
    with pytest.raises(GraphError, match="boom") as caught:
        trace(Failing(error), (torch.randn(2, 4),))
    assert caught.value.advice


def test_a_network_that_cannot_be_differentiated_is_a_graph_error_or_has_reasons() -> None:
    """The path from the layer is cut off: nothing must be taken for prunable."""
    network = Wrapped(
        lambda m, x: m.b(torch.from_numpy(m.a(x).detach().numpy())),
        a=nn.Linear(4, 8), b=nn.Linear(8, 3),
    )  # fmt: skip
    try:
        graph = trace(network, (torch.randn(2, 4),))
    except GraphError as error:
        assert "traced" in error.what
    else:
        assert not any(g.prunable for g in graph.groups)


def test_wrong_example_inputs_are_named() -> None:
    with pytest.raises(GraphError) as caught:
        trace(make_case("residual").network, (torch.randn(2, 5, 8, 8),))
    assert caught.value.given == [(2, 5, 8, 8)]


def test_a_network_without_layers_is_a_graph_error() -> None:
    with pytest.raises(GraphError, match="no layer") as caught:
        trace(nn.ReLU(), (torch.randn(2, 4),))
    assert "Conv2d" in str(caught.value.allowed)


def test_a_network_that_is_itself_a_layer_is_refused_with_advice() -> None:
    with pytest.raises(GraphError, match="itself a layer") as caught:
        trace(nn.Linear(4, 3), (torch.randn(2, 4),))
    assert "Sequential" in str(caught.value.advice)


@given(
    st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.integers(1, 32), st.floats(0, 0.5)
)
def test_kept_size(size: int, ratio: float, multiple: int, more: float) -> None:
    kept = kept_size(size, ratio, multiple)
    assert 1 <= kept <= size
    assert kept_size(size, 0.0, multiple) == size
    assert kept_size(size, min(ratio + more, 0.999999), multiple) <= kept
    if size % multiple == 0:
        assert kept % multiple == 0
        assert abs(kept - (1 - ratio) * size) <= multiple / 2 + 1e-9 or kept == multiple
    if multiple == 1:
        assert abs(kept - (1 - ratio) * size) <= 0.5 + 1e-9 or kept == 1
