from __future__ import annotations

import math

import numpy as np
import pytest
from networks import bank_of, graph_of, make_case, make_device

from autocompress.bank import stitch
from autocompress.config import SearchSpace
from autocompress.graph.layers import observe_layers
from autocompress.search.costs import layer_shapes
from autocompress.search.costs.latency import macs_costs
from autocompress.search.costs.layer_shapes import PartShape, decomposed, shaped_layers
from autocompress.search.random_plans import random_plans
from autocompress.search.space import Space, build_space
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision
from autocompress.techniques.technique import Stage

RATIOS = (0.2, 0.4, 0.6)


def space_of(name: str, *, kinds: tuple[str, ...] = ("svd",)) -> Space:
    techniques = {
        "block_drop": {"drop": (True,)},
        "filter_prune": {"pruning_ratio": RATIOS},
        "low_rank": {"rank_ratio": (0.5, 0.25), "kind": kinds, "data_aware": (False,)},
        "precision": {"weight_bits": (8,), "activation_bits": (8,)},
    }
    file = SearchSpace(version=1, name=name, techniques=techniques)
    return build_space(graph_of(name), file, make_device())


def values_of(space: Space, plan) -> dict[str, int]:
    return {
        p.name: i for p in space.parameters for i, d in enumerate(p.decisions, 1)
        if any(s.target == p.target and s.decision == d for s in plan.steps)
    }  # fmt: skip


SHAPED = (
    "residual", "concat", "depthwise", "flatten", "signal", "tokens", "fused_attention", "stacked",
)  # fmt: skip


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_are_those_of_the_stitched_network(name) -> None:
    """Channels are really removed and layers decomposed; then the network is run and looked at."""
    space = space_of(name, kinds=("svd", "tucker", "spatial"))
    shaped = shaped_layers(graph_of(name), space, 1)
    thinner = gone = 0
    for plan in random_plans(space, 5, np.random.default_rng(0)):
        network = stitch(bank_of(name), plan).network
        real = {x.name: x for x in observe_layers(network, make_case(name).example_inputs)}
        for layer in shaped:
            state = layer.chosen(values_of(space, plan))
            gone += not state.parts
            present = any(n.startswith(f"{layer.layer.name}.") for n in real)
            assert bool(state.parts) == (layer.layer.name in real or present)
            for index, part in enumerate(state.parts):
                whole = len(state.parts) == 1
                found = real[layer.layer.name if whole else f"{layer.layer.name}.{index}"]
                assert (part.in_channels, part.out_channels) == (
                    found.in_channels, found.out_channels,
                )  # fmt: skip
                assert (part.kernel_size, part.groups) == (found.kernel_size, found.groups)
                # Borders: a part before a stride sees the image as it is, without its padding.
                if whole:
                    assert (part.positions, part.macs) == (found.positions, found.macs)
                thinner += part.out_channels < layer.layer.out_channels
    assert thinner > 5 and bool(gone) == bool(graph_of(name).blocks)


@pytest.mark.parametrize("name", ["residual", "stacked"])
def test_costs_of_a_dropped_block_are_those_of_the_smaller_network(name) -> None:
    """Whatever else is decided for what stands in it."""
    space, graph, block = space_of(name), graph_of(name), graph_of(name).blocks[0]
    network = stitch(bank_of(name), space.plan({f"{block.name}|prune": 1})).network
    left = sum(x.macs for x in observe_layers(network, make_case(name).example_inputs))
    assert left < graph.macs
    inner = {p.name: p.highest for p in space.parameters if p.target.startswith(f"{block.name}.")}
    assert {name.split("|")[1] for name in inner} == {"prune", "decompose", "quantize"}
    costs = macs_costs(graph, space, 1, float(graph.macs))
    for others in ({}, inner):
        assert costs.value({f"{block.name}|prune": 1, **others}) == pytest.approx(left)
    assert left < costs.value(inner) < graph.macs


def test_a_group_on_both_sides_of_a_layer_is_one_parameter() -> None:
    shaped = {
        x.layer.name: x for x in shaped_layers(graph_of("depthwise"), space_of("depthwise"), 1)
    }
    depthwise = shaped["depthwise"]
    assert len(depthwise.prunings) == 1
    state = depthwise.state([3, *(0 for _ in depthwise.steps)])
    part = state.parts[0]
    assert part.depthwise and part.in_channels == part.out_channels == part.groups < 12
    assert part.weights == 9 * part.groups


def test_the_table_has_an_axis_per_parameter() -> None:
    space = space_of("residual")
    for layer in shaped_layers(graph_of("residual"), space, 1):
        found = {p.name: p.highest + 1 for p in space.parameters if p.name in layer.parameters}
        assert layer.table_shape == tuple(found[name] for name in layer.parameters)
        assert len(set(layer.parameters)) == len(layer.parameters)
        assert len(list(layer.combinations())) == math.prod(layer.table_shape)
    inner = next(
        x for x in shaped_layers(graph_of("residual"), space, 1) if x.layer.name == "block1.conv2"
    )
    assert [p.parameter.stage for p in inner.prunings] == [Stage.PRUNE, Stage.PRUNE]
    assert inner.drop is not None and inner.drop.target == "block1"
    assert inner.parameter(Stage.QUANTIZE) is not None
    assert isinstance(inner.chosen({"block1.conv2|quantize": 1}).quantize, Precision)


def test_too_large_tables_leave_groups_out(monkeypatch) -> None:
    monkeypatch.setattr(layer_shapes, "_MOST_COMBINATIONS", 24)
    shaped = shaped_layers(graph_of("residual"), space_of("residual"), 1)
    assert all(math.prod(x.table_shape) <= 24 for x in shaped)
    inner = next(x for x in shaped if x.layer.name == "block1.conv2")
    assert len(inner.prunings) < 2
    assert inner.chosen({}).parts[0].in_channels == 8


def test_parts_before_a_stride_see_more_positions() -> None:
    shape = PartShape(16, 32, (3, 3), (2, 2), 1, 16)
    assert (shape.in_elements, shape.out_elements) == (16 * 64, 32 * 16)
    first, second = decomposed(shape, LowRank(rank_ratio=0.5, kind="spatial"), 1)
    assert (first.kernel_size, first.stride, first.positions) == ((3, 1), (2, 1), 32)
    assert (second.kernel_size, second.stride, second.positions) == ((1, 3), (1, 2), 16)
    assert first.in_elements == shape.in_elements and second.out_elements == shape.out_elements


def test_other_grouped_convolutions_keep_their_channels() -> None:
    grouped = PartShape(8, 8, (3, 3), (1, 1), 2, 10)
    assert grouped.weights == 8 * 4 * 9 and not grouped.depthwise
    layer = shaped_layers(graph_of("residual"), Space(()), 1)[0]
    assert layer.parameters == () and layer.state(()).parts[0].out_channels == 8
