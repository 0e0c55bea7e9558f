from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assemble, bank_of, graph_of, make_device
from problems import correlated_rows, problem_of, random_weight
from torch import Tensor, nn

from autocompress.graph import Layer
from autocompress.plan import Plan, Step
from autocompress.techniques.clustering import cluster_numbers, cluster_vectors, nearest_codeword
from autocompress.techniques.codebook import CODEBOOK, Codebook
from autocompress.techniques.hash_code import HASH_CODE, HashCode, hash_vectors
from autocompress.techniques.technique import LayerTechnique, Variant

seeds = st.integers(0, 10_000)
DECISIONS = [
    (CODEBOOK, Codebook(code_bits=3)),
    (CODEBOOK, Codebook(code_bits=5, kind="product", vector_length=2)),
    (CODEBOOK, Codebook(code_bits=4, kind="product", vector_length=8)),
    (HASH_CODE, HashCode(hash_bits=5)),
    (HASH_CODE, HashCode(hash_bits=4, vector_length=1)),
]
every_kind = pytest.mark.parametrize(
    ("technique", "decision"), DECISIONS, ids=lambda v: str(v) if hasattr(v, "technique") else ""
)


def made(variant: Variant) -> Tensor:
    """The weight by the formula of `CodebookWeight`."""
    codes = variant["codes"]
    return variant["scale"] * variant["codebook"][codes].reshape(len(codes), -1)


def output_error(weight: Tensor, variant: Variant, rows: Tensor) -> float:
    lost = rows @ (weight - made(variant)).T
    return float((lost - lost.mean(0)).square().sum())


@given(seeds, st.integers(2, 30))
@settings(max_examples=20, deadline=None)
def test_as_many_numbers_as_are_distinct_are_exact(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(count, generator=generator)
    values = distinct[torch.randint(count, (200,), generator=generator)][:, None]
    codebook = cluster_numbers(values, torch.ones(200), count)
    assert codebook.shape == (count, 1)
    assert torch.equal(codebook[nearest_codeword(values, codebook)], values)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_lloyd_ends_where_codewords_are_the_means_of_what_is_nearest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(100, 1, generator=generator)
    cost = torch.rand(100, generator=generator) + 0.1
    codebook = cluster_numbers(values, cost, 3)
    codes = nearest_codeword(values, codebook)
    for k in codes.unique():
        chosen = codes == k
        mean = (values[chosen, 0] * cost[chosen]).sum() / cost[chosen].sum()
        assert float(codebook[k]) == pytest.approx(float(mean), abs=1e-4)


def test_two_clusters_of_numbers_and_of_vectors_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    near = torch.tensor([[-2.0, 1.0], [3.0, 0.5]])
    which = torch.randint(2, (300,), generator=generator)
    vectors = near[which] + 0.1 * torch.randn(300, 2, generator=generator)
    found = cluster_vectors(vectors, torch.ones(300), 2)
    torch.testing.assert_close(found[found[:, 0].argsort()], near, rtol=0, atol=0.05)
    numbers = cluster_numbers(vectors[:, :1], torch.ones(300), 2)
    torch.testing.assert_close(numbers, near[:, :1], rtol=0, atol=0.05)


def test_costly_vectors_draw_codewords() -> None:
    values = torch.cat([torch.linspace(-1, 1, 50), torch.linspace(4, 5, 50)])[:, None]
    cost = torch.cat([torch.full((50,), 1e-4), torch.ones(50)])
    codebook = cluster_numbers(values, cost, 8)
    assert int((codebook > 3).sum()) >= 6
    assert int((cluster_numbers(values, 1 / cost, 8) < 2).sum()) >= 6


@given(seeds, st.sampled_from(["scalar", "product"]))
@settings(max_examples=15, deadline=None)
def test_as_many_codewords_as_weights_are_exact(seed: int, kind: str) -> None:
    weight = random_weight(4, 16, seed)
    problem = problem_of(weight, correlated_rows(40, 16, seed), free_bias=True)
    variant = CODEBOOK.solve(problem, Codebook(code_bits=6, kind=kind))
    torch.testing.assert_close(made(variant), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variant["shift"], torch.zeros(4), rtol=0, atol=1e-5)


@every_kind
def test_the_layer_is_what_its_codewords_say(technique: LayerTechnique, decision: Codebook) -> None:
    layer = "block1.conv1"
    network = assemble(bank_of("residual"), Plan((Step(layer, decision),))).network
    module = network.get_submodule(layer)
    width = module.codebook.shape[1]
    assert module.codes.shape == (8, 72 // width) and module.codes.dtype == torch.int64
    assert module.weight_scale.shape == (8, 1)
    rows = module.codebook[module.codes].reshape(8, 72)
    assert torch.equal(module.weight.detach().flatten(1), module.weight_scale * rows)
    assert int(module.codes.min()) >= 0 and int(module.codes.max()) < len(module.codebook)
    assert len(module.codebook) <= 2**module.codebook_weight.code_bits
    assert not any(layer in key and "weight" not in key for key in network.state_dict())
    size = -(-module.codes.numel() * module.codebook_weight.code_bits // 8)
    wanted = size + 4 * module.codebook.numel() + 4 * 8
    assert technique.stored_bytes(graph_of("residual").layer(layer), decision, 1) == wanted


@pytest.mark.parametrize("technique", [CODEBOOK, HASH_CODE], ids=lambda t: t.name)
def test_no_bits_leave_the_layer_as_it_is(technique: LayerTechnique) -> None:
    plan = Plan((Step("head", technique.identity),))
    module = assemble(bank_of("residual"), plan).network.get_submodule("head")
    assert torch.equal(module.weight, bank_of("residual").network.get_submodule("head").weight)
    assert not hasattr(module, "codebook_weight")
    layer = graph_of("residual").layer("head")
    assert technique.choices(layer, [technique.identity], make_device()) == ()
    assert technique.stored_bytes(layer, technique.identity, 1) == 4 * 5 * 12


@every_kind
def test_the_bias_takes_over_the_mean_of_the_error(
    technique: LayerTechnique, decision: Codebook
) -> None:
    rows, weight = correlated_rows(300, 16, 1), random_weight(20, 16, 1)
    problem = problem_of(weight, rows, free_bias=True)
    module = nn.Linear(16, 20)
    module.weight.data.copy_(weight)
    wanted = module(rows).detach()
    changed = technique.install(module, technique.solve(problem, decision), decision, 1)
    difference = changed(rows).detach() - wanted
    torch.testing.assert_close(difference.mean(0), torch.zeros(20), rtol=0, atol=1e-3)
    assert float(difference.abs().max()) > 0.05


@pytest.mark.parametrize(
    "decision", [Codebook(code_bits=3), Codebook(code_bits=6, kind="product", vector_length=2)]
)
def test_feedback_keeps_more_of_the_output_than_the_nearest_codewords(decision: Codebook) -> None:
    rows, weight = correlated_rows(500, 32, 7), random_weight(40, 32, 7)
    problem = problem_of(weight, rows, free_bias=True)
    variant = CODEBOOK.solve(problem, decision)
    width = variant["codebook"].shape[1]
    vectors = (weight / variant["scale"]).reshape(-1, width)
    plain = {**variant, "codes": nearest_codeword(vectors, variant["codebook"]).reshape(40, -1)}
    assert output_error(weight, variant, rows) < 0.7 * output_error(weight, plain, rows)


def test_more_codewords_lose_less() -> None:
    rows, weight = correlated_rows(400, 32, 3), random_weight(40, 32, 3)
    problem = problem_of(weight, rows, free_bias=True)
    for technique, decisions in (
        (CODEBOOK, [Codebook(code_bits=b) for b in (2, 4, 6)]),
        (CODEBOOK, [Codebook(code_bits=b, kind="product") for b in (2, 5, 8)]),
        (HASH_CODE, [HashCode(hash_bits=b) for b in (2, 6, 10)]),
    ):
        errors = [output_error(weight, technique.solve(problem, d), rows) for d in decisions]
        assert errors[0] > 1.3 * errors[1] > 1.5 * errors[2]


@pytest.mark.parametrize("kind", ["scalar", "product"])
def test_pruned_weights_stay_zero(kind: str) -> None:
    weight = random_weight(8, 32, 3)
    gone = torch.zeros(8, 32, dtype=torch.bool)
    gone[:, 4:16] = True
    weight[gone] = 0
    problem = problem_of(weight, correlated_rows(200, 32, 3), free_bias=True)
    problem = replace(problem, mask=~gone)
    variant = CODEBOOK.solve(problem, Codebook(code_bits=4, kind=kind))
    assert bool((made(variant)[gone] == 0).all())
    assert bool((variant["codebook"][0] == 0).all())
    assert bool((made(variant)[~gone] != 0).any())


def test_a_layer_without_statistics_is_clustered_all_the_same() -> None:
    weight = random_weight(8, 32, 3)
    variant = CODEBOOK.solve(problem_of(weight, None, free_bias=True), Codebook(code_bits=5))
    assert float((made(variant) - weight).square().mean()) < 0.02
    assert torch.equal(variant["shift"], torch.zeros(8))


def test_rows_that_hold_no_whole_vectors_get_shorter_ones_but_are_not_offered() -> None:
    weight = random_weight(6, 30, 3)
    problem = problem_of(weight, correlated_rows(100, 30, 3), free_bias=True)
    decision = Codebook(code_bits=4, kind="product")
    variant = CODEBOOK.solve(problem, decision)
    assert variant["codebook"].shape == (16, 2) and variant["codes"].shape == (6, 15)
    assert CODEBOOK.choices(problem.layer, [decision], make_device()) == ()
    fits = Codebook(code_bits=4, kind="product", vector_length=2)
    assert CODEBOOK.choices(problem.layer, [fits], make_device()) == (fits,)


def test_only_what_makes_a_layer_smaller_is_offered_from_the_finest_on() -> None:
    layer = Layer("layer", "linear", 32, 32, (), 1, 1, 32 * 33)
    offered = [Codebook(code_bits=b) for b in (2, 12, 4, 0, 8)]
    found = CODEBOOK.choices(layer, offered, make_device())
    assert [d.code_bits for d in found if isinstance(d, Codebook)] == [8, 4, 2]
    hashes = [HashCode(hash_bits=b) for b in (2, 12, 7, 0)]
    found = HASH_CODE.choices(layer, hashes, make_device())
    assert [d.hash_bits for d in found if isinstance(d, HashCode)] == [7, 2]


@given(seeds, st.integers(1, 12), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=30, deadline=None)
def test_a_hash_depends_on_the_vector_alone_and_fits_its_bits(
    seed: int, bits: int, width: int
) -> None:
    vectors = torch.randn(50, width, generator=torch.Generator().manual_seed(seed))
    buckets = hash_vectors(vectors, bits)
    assert int(buckets.min()) >= 0 and int(buckets.max()) < 2**bits
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(hash_vectors(vectors[order], bits), buckets[order])


def test_near_vectors_share_buckets_more_often_than_far_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(500, 4, generator=generator)
    near = hash_vectors(vectors + 0.05 * torch.randn(500, 4, generator=generator), 6)
    far = hash_vectors(torch.randn(500, 4, generator=generator), 6)
    own = hash_vectors(vectors, 6)
    assert float((own == near).float().mean()) > 0.7 > 0.3 > float((own == far).float().mean())


def test_a_bucket_stands_for_the_mean_of_its_vectors() -> None:
    weight = random_weight(10, 16, 2)
    variant = HASH_CODE.solve(problem_of(weight, None, free_bias=True), HashCode(hash_bits=4))
    scale = weight.square().mean(1, keepdim=True).sqrt()
    vectors, codes = (weight / scale).reshape(-1, 2), variant["codes"].reshape(-1)
    cost = (scale.square() * torch.ones(10, 8)).reshape(-1)
    for bucket in codes.unique():
        chosen = codes == bucket
        mean = (vectors[chosen] * cost[chosen, None]).sum(0) / cost[chosen].sum()
        torch.testing.assert_close(variant["codebook"][bucket], mean, rtol=1e-4, atol=1e-5)
