from __future__ import annotations

import numpy as np
import pytest
from networks import bank_of, exporter_of, graph_of, make_device
from tiny_costs import tiny

from autocompress.bank import stitch
from autocompress.config import SearchSpace
from autocompress.plan import Plan
from autocompress.search.costs.bytes import download_costs, file_costs
from autocompress.search.random_plans import random_plans
from autocompress.search.space import Space, build_space
from autocompress.techniques.precision import Precision
from autocompress.techniques.technique import Stage

INT8 = Precision(weight_bits=8, activation_bits=8)


def values_of(space: Space, plan: Plan) -> dict[str, int]:
    return {
        p.name: i for p in space.parameters for i, d in enumerate(p.decisions, 1)
        if any((s.target, s.decision) == (p.target, d) for s in plan.steps)
    }  # fmt: skip


@pytest.mark.slow
def test_bytes_are_those_of_real_files() -> None:
    """Of eight kilobytes on: a rounded layer that is not counted would show, it has 550 bytes."""
    made = tiny()
    original = made.builder.build("bytes", Plan()).path.stat().st_size
    costs = file_costs(made.graph, made.space, 8, original)
    assert costs.value({}) == original
    plans = random_plans(made.space, 6, np.random.default_rng(2))
    assert any(plan.of("precision") and plan.of("low_rank") for plan in plans)
    for plan in plans:
        real = made.builder.build("bytes", plan).path.stat().st_size
        assert costs.value(values_of(made.space, plan)) == pytest.approx(real, rel=0.02, abs=250)


def test_what_layers_do_not_explain_is_the_constant() -> None:
    made = tiny()
    one, other = (file_costs(made.graph, made.space, 8, size) for size in (100_000, 101_000))
    assert other.constant - one.constant == 1000
    values = {p.name: p.highest for p in made.space.parameters}
    assert other.value(values) - one.value(values) == pytest.approx(1000)


def test_downloads_count_coded_bits() -> None:
    made = tiny()
    convolution = made.graph.layers[1]
    costs = download_costs(made.graph, made.space, 8, 50_000, {None: 24.0, INT8: 4.0})
    assert costs.value({}) == 50_000
    rounded = costs.value({f"{convolution.name}|quantize": 1})
    assert 50_000 - rounded == pytest.approx(convolution.weights * (24 - 4) / 8)


def test_without_coded_bits_a_download_has_the_files_bytes() -> None:
    made = tiny()
    costs = download_costs(made.graph, made.space, 8, 50_000, {})
    layer = made.graph.layers[1]
    saved = 50_000 - costs.value({f"{layer.name}|quantize": 1})
    # Three of four bytes; the scales come on top.
    assert saved == 3 * layer.weights - 4 * layer.out_channels


def sparse_space() -> Space:
    techniques = {
        "weight_prune": {"sparsity": (0.5,), "pattern": ("unstructured",)},
        "codebook": {"code_bits": (4,)},
    }
    file = SearchSpace(version=1, name="sparse", techniques=techniques)
    return build_space(graph_of("residual"), file, make_device())


def test_zeros_count_in_files_and_not_in_downloads() -> None:
    graph, space = graph_of("residual"), sparse_space()
    sparse = next(p for p in space.parameters if p.stage is Stage.SPARSIFY)
    weights = graph.layer(sparse.target).weights
    assert file_costs(graph, space, 1, 10_000).value({sparse.name: 1}) == 10_000
    coded = download_costs(graph, space, 1, 10_000, {None: 24.0})
    assert 10_000 - coded.value({sparse.name: 1}) == pytest.approx(0.5 * weights * 3)


def test_codebooks_are_stored_as_they_say() -> None:
    graph, space = graph_of("residual"), sparse_space()
    codebook = next(p for p in space.parameters if p.stage is Stage.QUANTIZE)
    layer = graph.layer(codebook.target)
    saved = -file_costs(graph, space, 1, 0).value({codebook.name: 1})
    # Half a byte a weight, sixteen codewords, a scale per channel; then the nodes' bytes.
    stored = layer.weights / 2 + 4 * 16 + 4 * layer.out_channels
    assert 0 < 4 * layer.weights - stored - saved < 1000


@pytest.mark.parametrize("name", ["residual", "stacked"])
def test_a_dropped_block_leaves_the_bytes_of_the_smaller_file(name: str) -> None:
    graph = graph_of(name)
    file = SearchSpace(version=1, name="drop", techniques={"block_drop": {"drop": (True,)}})
    space = build_space(graph, file, make_device())

    def size(indices: dict[str, int]) -> int:
        network = stitch(bank_of(name), space.plan(indices)).network
        return exporter_of(name).export(network).graph.model.ByteSize()

    original = size({})
    costs = file_costs(graph, space, 1, original)
    assert costs.value({}) == original
    for chosen in ({p.name: 1} for p in space.parameters):
        saved = original - size(chosen)
        # All but the nodes that are no layers: sums, activations, norms.
        assert 0.6 * saved < original - costs.value(chosen) <= saved
    coded = download_costs(graph, space, 1, 10_000, {None: 24.0})
    block = graph.blocks[0]
    biases = sum(graph.layer(n).out_channels for n in block.layers)
    weights = sum(x.out_channels * x.in_features for x in map(graph.layer, block.layers))
    saved = 3 * (weights + block.other_weights) + 4 * biases
    assert 10_000 - coded.value({f"{block.name}|prune": 1}) == pytest.approx(saved)
