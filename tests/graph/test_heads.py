from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import NAMES, FusedAttention, SelfAttention, Transformer, graph_of, make_case, run
from torch import Tensor, nn

from autocompress.graph import ChannelGroup, NetworkGraph, trace
from autocompress.graph.groups import HeadCount, dense_consumers, dense_producers, remove_channels

WIDTH, HEADS, SIZE = 10, 4, 3
INNER = HEADS * SIZE
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attributes and layers of any kind, and a forward function over them."""

    def __init__(
        self, forward: Callable[..., object], integers: dict[str, int], **layers: nn.Module
    ) -> None:
        super().__init__()
        for name, value in integers.items():
            setattr(self, name, value)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = [forward]

    def forward(self, *inputs: Tensor) -> object:
        return self._forward[0](self, *inputs)


def linears(**shapes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*shape) for name, shape in shapes.items()}


SEPARATE = {"q": (WIDTH, INNER), "k": (WIDTH, INNER), "v": (WIDTH, INNER), "o": (INNER, WIDTH)}


def plain(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(attend(*(split(layer(x), m.heads) for layer in (m.q, m.k, m.v))))


def interleaved(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(attend(*split(m.qkv(x), m.heads).chunk(3, -1)))


def fused_pair(m: nn.Module, x: Tensor) -> Tensor:
    k, v = m.kv(x).chunk(2, -1)
    return m.o(attend(split(m.q(x), m.heads), split(k, m.heads), split(v, m.heads)))


def chunked(m: nn.Module, x: Tensor) -> Tensor:
    """Uneven chunks are no error: single channels seem to be prunable."""
    parts = [torch.stack(layer(x).chunk(m.heads, -1), 1) for layer in (m.q, m.k, m.v)]
    return m.o(attend(*parts))


def gated_by_size(m: nn.Module, x: Tensor) -> Tensor:
    """`size` is the width of all heads; `other` happens to be as large, and has to stay."""
    mixed = attend(*(split(layer(x), m.heads) for layer in (m.q, m.k, m.v)))
    return m.o(mixed.reshape(x.shape[0], x.shape[1], m.size)) + m.other


def grouped_queries(m: nn.Module, x: Tensor) -> Tensor:
    k, v = (split(layer(x), m.num_kv_heads) for layer in (m.k, m.v))
    share = m.num_heads // m.num_kv_heads
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    return m.o(attend(split(m.q(x), m.num_heads), k, v))


def by_width(m: nn.Module, x: Tensor) -> Tensor:
    """As recent models do, without a count of heads anywhere; queries share keys."""
    q, k, v = (
        layer(x).reshape(*x.shape[:2], -1, m.head_dim).transpose(1, 2) for layer in (m.q, m.k, m.v)
    )
    return m.o(attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


def convolved(m: nn.Module, x: Tensor) -> Tensor:
    grid = x.transpose(1, 2).unsqueeze(-1)
    q, k, v = (layer(grid).flatten(2).transpose(1, 2) for layer in (m.q, m.k, m.v))
    mixed = attend(split(q, m.heads), split(k, m.heads), split(v, m.heads))
    return m.o(mixed.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


H = {"heads": HEADS}
STRUCTURES = {
    "plain": Attention(plain, H, **linears(**SEPARATE)),
    "interleaved": Attention(
        interleaved, H, **linears(qkv=(WIDTH, 3 * INNER), o=(INNER, WIDTH))
    ),
    "fused_pair": Attention(
        fused_pair, H, **linears(q=(WIDTH, INNER), kv=(WIDTH, 2 * INNER), o=(INNER, WIDTH))
    ),
    "chunked": Attention(chunked, H, **linears(**SEPARATE)),
    "wide_values": Attention(
        plain, H, **linears(**(SEPARATE | {"q": (WIDTH, 8), "k": (WIDTH, 8)}))
    ),
    "gated_by_size": Attention(
        gated_by_size, H | {"other": INNER, "size": INNER}, **linears(**SEPARATE)
    ),
    "grouped_queries": Attention(
        grouped_queries, {"num_heads": 2 * HEADS, "num_kv_heads": HEADS},
        **linears(**(SEPARATE | {"q": (WIDTH, 2 * INNER), "o": (2 * INNER, WIDTH)})),
    ),
    "by_width": Attention(
        by_width, {"head_dim": SIZE},
        **linears(**(SEPARATE | {"q": (WIDTH, 2 * INNER), "o": (2 * INNER, WIDTH)})),
    ),
    "convolved": Attention(
        convolved, H,
        **{n: nn.Conv2d(a, b, 1) for n, (a, b) in SEPARATE.items()},
    ),
    "separate_module": SelfAttention(12, HEADS),
    "fused_module": FusedAttention(WIDTH, HEADS, SIZE),
}  # fmt: skip


def traced(attention: nn.Module) -> tuple[nn.Module, NetworkGraph]:
    width = 12 if isinstance(attention, SelfAttention) else WIDTH
    torch.manual_seed(0)
    network = Transformer(width, copy.deepcopy(attention)).eval()
    inputs = (torch.randn(2, 5, 6),)
    return network, trace(network, inputs)


def sides(group: ChannelGroup) -> set[tuple[str, str]]:
    return {(m.module, m.side) for m in group.members}


@pytest.mark.parametrize("heads", [(0,), (3,), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_taking_heads_out_is_muting_them(structure: str, heads: tuple[int, ...]) -> None:
    network, graph = traced(STRUCTURES[structure])
    group = graph.group("attention.heads")
    assert group.prunable and group.size == HEADS
    muted, removed = copy.deepcopy(network), copy.deepcopy(network)
    (reader,) = dense_consumers(network, group)
    columns = reader.select(heads)
    assert len(columns) == len(heads) * reader.per_channel
    with torch.no_grad():
        muted.get_submodule(reader.module).weight[:, columns] = 0
    remove_channels(removed, [(group, heads)])
    inputs = (torch.randn(3, 6, 6),)
    (before,), (wanted,), (found,) = (run(n, inputs) for n in (network, muted, removed))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_weight_of_a_head_goes(structure: str) -> None:
    network, graph = traced(STRUCTURES[structure])
    group = graph.group("attention.heads")
    before = {n: p.numel() for n, p in network.attention.named_parameters()}
    remove_channels(network, [(group, [2])])
    after = {n: p.numel() for n, p in network.attention.named_parameters()}
    shared = {
        n for n in before if n.endswith("bias") and n.split(".")[-2] in ("o", "out", "project")
    }
    assert all(4 * after[n] == 3 * before[n] for n in before.keys() - shared)
    assert len(dense_producers(network, group)) == len(group.members) - 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_network_without_some_heads_is_traced_again(structure: str) -> None:
    network, graph = traced(STRUCTURES[structure])
    remove_channels(network, [(graph.group("attention.heads"), [0, 2])])
    again = trace(network, (torch.randn(2, 5, 6),))
    assert {g.name: g.size for g in again.groups if g.prunable} == {
        g.name: g.size - 2 * (g.name == "attention.heads") for g in graph.groups if g.prunable
    }


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_other_groups_are_prunable_as_before(structure: str) -> None:
    _, graph = traced(STRUCTURES[structure])
    prunable = {g.name.split("+")[0] for g in graph.groups if g.prunable}
    assert prunable == {"embed", "attention.heads", "up"}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_side_of_a_module_is_in_two_prunable_groups(structure: str) -> None:
    _, graph = traced(STRUCTURES[structure])
    for group in graph.groups:
        others = {s for g in graph.groups if g.prunable and g is not group for s in sides(g)}
        assert not (group.prunable and sides(group) & others)


@pytest.mark.parametrize("name", NAMES)
def test_no_indices_of_a_side_are_in_two_prunable_groups(name: str) -> None:
    """A concatenation's reader is in two groups, with columns of its own in each."""
    taken: set[tuple[str, str, int]] = set()
    for group in (g for g in graph_of(name).groups if g.prunable):
        mine = {(m.module, m.side, i) for m in group.members for i in m.indices}
        assert not mine & taken
        taken |= mine


def test_channels_inside_heads_say_where_they_belong() -> None:
    for structure in ("plain", "chunked"):
        _, graph = traced(STRUCTURES[structure])
        inside = [g for g in graph.groups if ("attention.q", "out") in sides(g) and not g.heads]
        assert inside and all("attention.heads" in g.reason for g in inside)


def test_the_counts_that_the_forward_pass_uses_are_lowered_and_no_others() -> None:
    counts = {
        name: traced(STRUCTURES[name])[1].group("attention.heads").heads
        for name in ("gated_by_size", "grouped_queries", "fused_module")
    }
    assert counts == {
        "gated_by_size": (
            HeadCount("attention", "heads", 1), HeadCount("attention", "size", SIZE),
        ),
        "grouped_queries": (
            HeadCount("attention", "num_heads", 2), HeadCount("attention", "num_kv_heads", 1),
        ),
        "fused_module": (HeadCount("attention", "heads", 1),),
    }  # fmt: skip


def test_rows_of_a_fused_layer_in_blocks_and_head_by_head() -> None:
    rows = {
        name: traced(STRUCTURES[name])[1].group("attention.heads").members[0].select([1])
        for name in ("fused_module", "interleaved")
    }
    assert rows["fused_module"] == [3, 4, 5, 15, 16, 17, 27, 28, 29]
    assert rows["interleaved"] == list(range(9, 18))


class Sibling(nn.Module):
    """As in BERT: the projection stands beside the module that has the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(
            lambda m, x: (attend(*(split(layer(x), m.heads) for layer in (m.q, m.k, m.v))), None),
            {"heads": HEADS},
            **linears(**{n: s for n, s in SEPARATE.items() if n != "o"}),
        )
        self.output = nn.Sequential(nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(x)[0])


def test_a_projection_beside_the_module_is_found() -> None:
    _, graph = traced(Sibling())
    group = graph.group("attention.inner.heads")
    assert group.prunable
    assert [m.module for m in group.members][-1] == "attention.output.0"


class Stack(nn.Module):
    """Two blocks, inside a module that knows the number of heads too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.first = Attention(plain, H, **linears(**SEPARATE))
        self.second = Attention(plain, H, **linears(**SEPARATE))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(x + self.first(x))


def test_heads_of_several_groups_go_together() -> None:
    network, graph = traced(Stack())
    groups = [g for g in graph.groups if g.name.endswith(".heads")]
    assert [g.name for g in groups] == ["attention.first.heads", "attention.second.heads"]
    assert all(g.prunable for g in groups)
    muted = copy.deepcopy(network)
    removals = [(groups[0], [0]), (groups[1], [1, 3])]
    with torch.no_grad():
        for group, heads in removals:
            (reader,) = dense_consumers(muted, group)
            muted.get_submodule(reader.module).weight[:, reader.select(heads)] = 0
    remove_channels(network, removals)
    inner = network.attention
    assert (inner.num_heads, inner.first.heads, inner.second.heads) == (4, 3, 2)
    x = (torch.randn(2, 5, 6),)
    torch.testing.assert_close(run(network, x)[0], run(muted, x)[0], rtol=1e-4, atol=1e-5)


def literal(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(attend(*(split(layer(x), 4) for layer in (m.q, m.k, m.v))))


def scaled_by_count(m: nn.Module, x: Tensor) -> Tensor:
    return plain(m, x) / m.heads


def temperatures(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (split(layer(x), m.heads) for layer in (m.q, m.k, m.v))
    return m.o(attend(q * m.temperature.weight[:, None], k, v))


def crossed(m: nn.Module, x: Tensor) -> Tensor:
    """Another channel order than head by head."""
    q, k, v = (
        layer(x).reshape(*x.shape[:2], -1, m.heads).permute(0, 3, 1, 2) for layer in (m.q, m.k, m.v)
    )
    return m.o(attend(q, k, v))


def two_at_once(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * m.heads


REFUSED = {
    "literal": (Attention(literal, H, **linears(**SEPARATE)), "fails"),
    "scaled_by_count": (Attention(scaled_by_count, H, **linears(**SEPARATE)), "more than to mute"),
    "temperatures": (
        Attention(temperatures, H, **linears(**SEPARATE), temperature=nn.Embedding(4, 1)),
        "fails",
    ),
    "crossed": (Attention(crossed, H, **linears(**SEPARATE)), "more than to mute"),
    "no_attention": (Attention(two_at_once, H, **linears(a=(WIDTH, 7), b=(7, WIDTH))), "no layers"),
    "shared": (
        Attention(
            grouped_queries, {"num_heads": HEADS, "num_kv_heads": 1},
            **linears(**(SEPARATE | {"k": (WIDTH, SIZE), "v": (WIDTH, SIZE)})),
        ),
        "share one key",
    ),
    "packed": (
        Attention(lambda m, x: m.a(x, x, x)[0], {}, a=nn.MultiheadAttention(WIDTH, 5)),
        "packs",
    ),
}  # fmt: skip


def test_the_width_of_a_head_alone_makes_no_group() -> None:
    other = Attention(
        lambda m, x: m.b(m.a(x)), {"head_dim": 2}, **linears(a=(WIDTH, 7), b=(7, WIDTH))
    )
    assert not any(g.name.endswith("heads") for g in traced(other)[1].groups)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_a_group_with_a_reason(kind: str) -> None:
    attention, reason = REFUSED[kind]
    _, graph = traced(attention)
    name = "attention.a.heads" if kind == "packed" else "attention.heads"
    group = graph.group(name)
    assert not group.prunable and reason in group.reason
    assert group.size == {"packed": 5, "shared": 1}.get(kind, HEADS)


def test_heads_at_the_networks_output_are_refused() -> None:
    def with_maps(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (split(layer(x), m.heads) for layer in (m.q, m.k, m.v))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return m.o((weights @ v).transpose(1, 2).flatten(2)), weights

    network = Attention(with_maps, H, **linears(**SEPARATE)).eval()
    assert "output" in trace(network, (X,)).group("heads").reason


def test_heads_that_change_nothing_cannot_be_checked() -> None:
    network = Attention(
        lambda m, x: m.head(x + 0 * plain(m, x)), H, **linears(**SEPARATE, head=(WIDTH, 3))
    ).eval()
    assert "changes nothing" in trace(network, (X,)).group("heads").reason


@pytest.mark.parametrize("name", ["attention", "fused_attention"])
def test_the_trials_leave_the_network_alone(name: str) -> None:
    network = copy.deepcopy(make_case(name).network)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    counts = {n: dict(vars(m)) for n, m in network.named_modules()}
    trace(network, make_case(name).example_inputs)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    for n, module in network.named_modules():
        now = vars(module)
        assert all(now[k] == v for k, v in counts[n].items() if isinstance(v, int))
