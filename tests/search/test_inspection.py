"""What could be changed in a network, and why not the rest."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from autocompress.config import SearchSpace
from autocompress.device import load_profile
from autocompress.graph import trace
from autocompress.graph.owners import find_owners
from autocompress.report.inspection import inspection_parts
from autocompress.search.inspection import Inspection, inspect_network

TECHNIQUES = {
    "filter_prune": {"pruning_ratio": [0.5]},
    "low_rank": {"rank_ratio": [0.25]},
    "precision": {"weight_bits": [8], "activation_bits": [8]},
}


class Mixed(nn.Module):
    """Something of everything that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.shift = nn.Parameter(torch.zeros(16))
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.spread = nn.ConvTranspose1d(16, 16, 2, 2)
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.recurrent(self.embed(tokens) + self.shift)[0]
        x = self.norm(x + self.attention(x, x, x)[0])
        x = x + self.down(self.up(x).relu())
        return self.head(self.spread(x.transpose(1, 2)).transpose(1, 2))


def inspected(techniques: dict = TECHNIQUES, **keys) -> Inspection:
    torch.manual_seed(0)
    network, inputs = Mixed().eval(), (torch.randint(20, (2, 6)),)
    graph = trace(network, inputs)
    space = SearchSpace(version=1, name="mine", techniques=techniques, **keys)
    owners = find_owners(network, inputs, graph)
    return inspect_network(graph, owners, space, load_profile("cpu"))


def test_every_module_with_weights_has_techniques_or_a_reason() -> None:
    rows = {row.name: row for row in inspected().modules}
    reasons = {
        "": "parameters of Mixed",
        "embed": "shares a weight with head",
        "recurrent": "cannot be taken apart",
        "attention": "packs its projections",
        "attention.out_proj": "not called",
        "norm": "normalization",
        "spread": "transposed",
        "unused": "not called",
        "head": "shares a weight with embed",
    }
    for name, reason in reasons.items():
        assert not rows[name].techniques
        assert reason in rows[name].reason, name
    assert rows["up"].techniques == ("filter_prune", "low_rank", "precision")
    assert set(rows) == {*reasons, "up", "down"}


def test_shares_add_up() -> None:
    found = inspected()
    # The tied weight stands with both of its owners.
    assert abs(sum(row.weight_share for row in found.modules) - 1) < 1e-9
    assert abs(sum(row.macs_share or 0 for row in found.modules) - 1) < 1e-9
    rows = {row.name: row for row in found.modules}
    assert rows["spread"].macs_share / rows["up"].macs_share == pytest.approx(2 * 16 / 48)
    assert rows["embed"].macs_share is None


def test_what_the_search_space_leaves_out_is_told() -> None:
    rows = {row.name: row for row in inspected(exclude=["up", "down"]).modules}
    assert rows["up"].reason == "the search space excludes it"
    nothing = inspected({"low_rank": {"rank_ratio": [0.99]}})
    assert all(row.reason for row in nothing.modules)
    assert nothing.unused == ("low_rank rank_ratio 0.99",)
    assert {row.techniques for row in nothing.groups} == {()}


def test_the_tables_fit_100_columns_and_show_every_module() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    found = inspected()
    for part in inspection_parts(found):
        console.print(part)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for row in (*found.modules, *found.groups):
        assert row.name in text
    assert "(the network itself)" in text
