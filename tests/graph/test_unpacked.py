from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from autocompress.graph import trace
from autocompress.graph.attention import Attention, is_packed_attention
from autocompress.graph.groups import remove_channels
from autocompress.graph.owners import find_owners
from autocompress.graph.recurrent import Recurrent, is_recurrent
from autocompress.graph.unpacked import with_unpacked

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
SETTINGS = (
    {},
    {"bias": False},
    {"batch_first": True, "bidirectional": True, "num_layers": 2},
)


def made(kind: type[nn.Module], **settings) -> nn.Module:
    torch.manual_seed(0)
    return kind(3, 5, **settings).eval()


def tensors(value) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value if part is not None for tensor in tensors(part)]


def assert_same(found, expected) -> None:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_layer_gives_what_it_gave(kind, settings) -> None:
    module = made(kind, **settings)
    parts = Recurrent(module)
    x = torch.randn(4, 4, 3)
    assert_same(parts(x), module(x))
    assert_same(parts(x[0]), module(x[0]))
    state = module(x)[1]
    assert_same(parts(x, state), module(x, state))
    several = pack_sequence([x[0, :2], x[1]], enforce_sorted=False)
    assert_same(parts(several), module(several))
    assert_same(copy.deepcopy(parts)(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_parameters_that_it_had(kind) -> None:
    module = made(kind, num_layers=2)
    parts = Recurrent(module)
    parts(torch.randn(4, 2, 3))[0].square().sum().backward()
    names = dict(module.named_parameters())
    assert {name.removesuffix(".weight") for name, _ in parts.named_parameters()} == set(names)
    for name, parameter in parts.named_parameters():
        assert parameter is names[name.removesuffix(".weight")]
        assert parameter.grad is not None and parameter.grad.any()


def test_what_cannot_be_taken_apart_is_known() -> None:
    assert not is_recurrent(nn.LSTM(4, 6, proj_size=2))
    assert not is_recurrent(nn.LSTMCell(4, 4))
    assert not is_packed_attention(nn.MultiheadAttention(4, 2, add_bias_kv=True))
    assert not is_packed_attention(nn.MultiheadAttention(4, 2, add_zero_attn=True))


MASKS = (None, "some", "added", "by heads")


@pytest.mark.parametrize(
    ("samples_first", "bias", "width"),
    [(True, True, None), (False, True, 12), (True, False, 12), (False, False, None)],
)
def test_attention_gives_what_it_gave(samples_first, bias, width) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(
        16, 4, bias=bias, batch_first=samples_first, kdim=width, vdim=width
    ).eval()
    if bias:
        nn.init.normal_(module.in_proj_bias)
    parts = Attention(module).eval()
    q, k, v = torch.randn(3, 5, 16), *torch.randn(2, 3, 7, width or 16)
    if not samples_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    masks = {
        "some": torch.rand(5, 7) > 0.7,
        "added": torch.randn(5, 7),
        "by heads": torch.randn(12, 5, 7),
    }
    hidden = torch.rand(3, 7) > 0.7
    # Nothing but masked keys gives no numbers in either.
    hidden[:, 0], masks["some"][:, 0] = False, False
    for mask, padding, weights, mean in itertools.product(MASKS, (None, hidden), *[(0, 1)] * 2):
        given = {
            "attn_mask": masks.get(mask),
            "key_padding_mask": padding,
            "need_weights": bool(weights),
            "average_attn_weights": bool(mean),
        }
        if padding is not None and mask in ("added", "by heads"):
            given["key_padding_mask"] = torch.zeros(3, 7).masked_fill(padding, -torch.inf)
        found, expected = parts(q, k, v, **given), module(q, k, v, **given)
        assert (found[1] is None) == (expected[1] is None)
        assert_same(found, expected)
    if samples_first:
        assert_same(parts(q[0], k[0], v[0]), module(q[0], k[0], v[0]))


class Reader(nn.Module):
    """Two recurrent layers, one of which is read by more than its outputs, and attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.LSTM(6, 8, batch_first=True)
        self.second = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)[0])[0] + self.second.weight_hh_l0.mean()
        return self.head(self.attention(x, x, x)[0][:, -1])


def test_each_module_is_taken_apart_for_itself() -> None:
    network, x = Reader().eval(), torch.randn(2, 4, 6)
    changed = with_unpacked(network, (x,))
    assert isinstance(changed.first, Recurrent) and isinstance(changed.attention, Attention)
    assert isinstance(changed.second, nn.GRU) and isinstance(network.first, nn.LSTM)
    assert_same(changed(x), network(x))
    # Nothing is kept twice that need not be.
    assert changed.head.weight is network.head.weight
    assert changed.first.weight_ih_l0.weight is network.first.weight_ih_l0
    assert with_unpacked(changed, (x,)) is changed


def test_every_part_can_be_changed_or_has_a_reason() -> None:
    x = torch.randn(2, 4, 6)
    changed = with_unpacked(Reader().eval(), (x,))
    graph = trace(changed, (x,))
    rows = {owner.name: owner for owner in find_owners(changed, (x,), graph)}
    free = {name for name, owner in rows.items() if not owner.reason}
    assert free == {
        "first.weight_ih_l0", "first.weight_hh_l0", "attention.q_proj", "attention.k_proj",
        "attention.v_proj", "attention.out_proj", "head",
    }  # fmt: skip
    assert "only biases" in rows["first"].reason
    assert "more than its outputs" in rows["second"].reason
    # Four gates, four steps of six inputs and eight states.
    assert rows["first"].macs == 4 * (4 * 8) * (6 + 8)
    assert graph.group("attention.heads").prunable


class Spotter(nn.Module):
    """Convolutions before, linear layers after a recurrent layer; its last state is read too."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 6, 1)
        self.cells = kind(6, 10, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(40, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).transpose(1, 2)
        outputs, state = self.cells(x)
        state = state[0] if isinstance(state, tuple) else state
        x = torch.cat([outputs.mean(1), state[0], state[1]], 1)
        return self.head(self.hidden(x).relu())


@pytest.mark.parametrize("kind", KINDS)
def test_channels_on_both_sides_of_a_recurrent_layer_can_be_pruned(kind) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7)
    network = with_unpacked(Spotter(kind).eval(), (x,))
    graph = trace(network, (x,))
    assert graph.notes == ()
    reasons = {group.name: group.reason for group in graph.groups}
    assert set(reasons) == {"first", "second", "hidden", "head"}
    assert reasons["first"] == reasons["hidden"] == ""
    assert "recurrent" in reasons["second"]
    pruned = copy.deepcopy(network)
    remove_channels(pruned, [(graph.group("first"), [0, 3]), (graph.group("hidden"), [5])])
    assert pruned(x).shape == (2, 4)
