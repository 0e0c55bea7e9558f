"""Which blocks can be dropped: told by what they compute, not by what they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NAMES, enliven, graph_of, make_case, run
from torch import Tensor, nn

from autocompress.graph import trace
from autocompress.graph.blocks import PassThrough, drop_blocks, dropped_blocks

WIDTH = 8
Forward = Callable[[Any, Tensor], Any]


class Inner(nn.Module):
    """A module of one convolution whose forward is given; `width` is an attribute of it."""

    def __init__(self, forward: Forward, channels: int = WIDTH, **parts: nn.Module) -> None:
        super().__init__()
        self.width = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = [forward]

    def forward(self, x: Tensor) -> Any:
        return self._forward[0](self, x)


class Around(nn.Module):
    """A stem, the block, and a head; what is done with the block is given."""

    def __init__(
        self, block: nn.Module, middle: Forward = lambda self, x: self.block(x), **parts: nn.Module
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, WIDTH, 1)
        self.block = block
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(WIDTH, 3)
        self._middle = [middle]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._middle[0](self, self.stem(x)).mean((2, 3)))


def blocks_of(network: nn.Module) -> list[str]:
    inputs = (torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0)),)
    enliven(network, inputs)
    before = copy.deepcopy(network.state_dict())
    text = repr(network)
    names = [block.name for block in trace(network, inputs).blocks]
    assert repr(network) == text
    assert all(torch.equal(x, before[key]) for key, x in network.state_dict().items())
    return names


def residual(self: Any, x: Tensor) -> Tensor:
    return x + F.relu(self.conv(x))


RESIDUAL: dict[str, Forward] = {
    "sum": residual,
    "activation after the sum": lambda m, x: F.relu(x + m.conv(x)),
    "norm before": lambda m, x: x + m.conv(F.layer_norm(x, x.shape[1:])),
    "norm after": lambda m, x: F.layer_norm(x + m.conv(x), x.shape[1:]),
    "scaled": lambda m, x: x + 0.1 * m.conv(x),
    "gate within": lambda m, x: x + m.conv(x) * m.conv(x).mean((2, 3), keepdim=True).sigmoid(),
    "list": lambda m, x: [x + m.conv(x), None],
}
OTHER: dict[str, Forward] = {
    "plain": lambda m, x: F.relu(m.conv(x)),
    "gate": lambda m, x: x * m.conv(x).mean((2, 3), keepdim=True).sigmoid(),
    "shuffle": lambda m, x: torch.cat([m.conv(x)[:, 4:], x[:, :4]], 1),
    "pooled": lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True),
    "in place": lambda m, x: x.relu_() + m.conv(x),
    "two outputs": lambda m, x: (x + m.conv(x), m.conv(x)),
    "mapping": lambda m, x: {"x": x + m.conv(x)},
    "another size": lambda m, x: F.avg_pool2d(x + m.conv(x), 2),
    "more channels": lambda m, x: torch.cat([x, m.conv(x)], 1)[:, : WIDTH + 1],
    "another type": lambda m, x: (x + m.conv(x)).double(),
}


def first(x: Any) -> Tensor:
    found = next(iter(x.values())) if isinstance(x, dict) else x
    found = found[0] if isinstance(found, (tuple, list)) else found
    return found[:, :WIDTH].float()


@pytest.mark.parametrize("kind", RESIDUAL)
def test_residual_blocks_are_found_and_keep_what_they_give(kind: str) -> None:
    network = Around(Inner(RESIDUAL[kind]), lambda m, x: first(m.block(x)))
    assert blocks_of(network) == ["block"]
    x = torch.randn(2, 2, 6, 6)
    graph = trace(network, (x,))
    drop_blocks(network, graph.blocks)
    assert dropped_blocks(network) == ("block",)
    given = network.block(x)
    assert type(given) is (list if kind == "list" else Tensor)
    expected = network.head(network.stem(x).mean((2, 3)))
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OTHER)
def test_blocks_that_are_not_residual_are_left(kind: str) -> None:
    network = Around(Inner(OTHER[kind]), lambda m, x: first(m.block(x)))
    assert blocks_of(network) == []


def test_a_block_that_is_called_twice_or_has_two_names_is_left() -> None:
    assert blocks_of(Around(Inner(residual), lambda m, x: m.block(m.block(x)))) == []
    shared = Inner(residual)
    again = Around(shared, lambda m, x: m.other(x), other=shared)
    assert blocks_of(again) == []
    # Its layer is called from outside as well, and would not be gone.
    layer = Around(shared, lambda m, x: m.block(x) + m.conv(x), conv=shared.conv)
    assert blocks_of(layer) == []


def test_a_network_that_reads_more_of_a_block_than_its_output_keeps_it() -> None:
    inside = Around(Inner(residual), lambda m, x: m.block(x) + m.block.conv.bias.sum())
    assert blocks_of(inside) == []
    # Plain attributes stay where the block was.
    plain = Around(Inner(residual), lambda m, x: m.block(x) + m.block.width)
    assert blocks_of(plain) == ["block"]


def test_an_input_that_is_written_over_later_cannot_be_passed_on() -> None:
    def middle(self: Any, x: Tensor) -> Tensor:
        return self.block(x).mul_(2) + x

    assert blocks_of(Around(Inner(residual), middle)) == []
    kept = Around(Inner(residual), lambda m, x: m.block(x) * 2 + x)
    assert blocks_of(kept) == ["block"]


def test_a_network_that_is_one_block_keeps_it() -> None:
    network = nn.Sequential(Inner(residual, 2))
    assert trace(network, (torch.randn(2, 2, 6, 6),)).blocks == ()


def test_a_stage_of_blocks_is_its_blocks() -> None:
    stage = nn.Sequential(Inner(residual), Inner(OTHER["plain"]), Inner(residual))
    assert blocks_of(Around(stage)) == ["block.0", "block.2"]
    only = nn.Sequential(nn.Sequential(Inner(residual), Inner(residual)), Inner(residual))
    assert blocks_of(Around(only)) == ["block.0.0", "block.0.1", "block.1"]


def test_a_skip_over_many_blocks_is_no_block() -> None:
    body = nn.Sequential(Inner(residual), Inner(residual))
    skip = Inner(lambda m, x: x + m.conv(m.body(x)), body=body)
    assert blocks_of(Around(skip)) == ["block.body.0", "block.body.1"]


def test_a_repeated_layer_is_taken_as_a_whole() -> None:
    """As a transformer's: attention and feed-forward, each with a sum of its own, in one layer."""
    layers = [Inner(lambda m, x: m.rest(residual(m, x)), rest=Inner(residual)) for _ in range(2)]
    assert blocks_of(Around(nn.Sequential(*layers))) == ["block.0", "block.1"]


def test_the_networks_of_the_tests() -> None:
    found = {name: [b.name for b in graph_of(name).blocks] for name in NAMES}
    expected = {"residual": ["block1"], "stacked": ["layers.0", "layers.1", "layers.2"]}
    assert {name: blocks for name, blocks in found.items() if blocks} == expected
    block = graph_of("stacked").block("layers.1")
    assert block.layers == ("layers.1.up", "layers.1.down")
    assert (block.container, block.length) == ("tuple", 2)
    # A layer norm's; the batch norms of the other become part of its convolutions.
    assert block.other_weights == 2 * 8
    assert graph_of("residual").block("block1").other_weights == 0


@pytest.mark.parametrize("name", ["residual", "stacked"])
def test_any_blocks_can_go_together(name: str) -> None:
    case, graph = make_case(name), graph_of(name)
    network = copy.deepcopy(case.network)
    drop_blocks(network, graph.blocks)
    found, before = run(network, case.inputs), run(case.network, case.inputs)
    assert [x.shape for x in found] == [x.shape for x in before]
    assert all(not torch.equal(a, b) for a, b in zip(found, before, strict=True))
    kept = {n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert kept == {x.name for x in graph.layers} - {n for b in graph.blocks for n in b.layers}
    assert sum(isinstance(m, PassThrough) for m in network.modules()) == len(graph.blocks)
