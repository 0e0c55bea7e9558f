from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import bank_of, graph_of, make_device
from problems import (
    Matrix,
    correlated_rows,
    damped_rows,
    problem_of,
    random_weight,
    weight_of,
)
from torch import Tensor, nn

from autocompress.bank import stitch
from autocompress.errors import PlanError
from autocompress.graph import Layer
from autocompress.plan import Plan, Step
from autocompress.techniques import cp
from autocompress.techniques.decomposed import (
    fits,
    handlers,
    kept_rank,
    parts_of,
    ranks,
    share_of_work,
)
from autocompress.techniques.low_rank import LOW_RANK, LowRank
from autocompress.techniques.technique import LayerProblem

seeds = st.integers(0, 10_000)
KINDS = ("svd", "spatial", "tucker", "cp")


def layer_problem(layer: nn.Module, rows: Tensor | None) -> LayerProblem:
    weight = torch.as_tensor(weight_of(layer)).float()
    kernel = tuple(getattr(layer, "kernel_size", ()))
    problem = problem_of(weight, rows, free_bias=layer.bias is not None, kernel=kernel)
    return replace(problem, bias=layer.bias)


def decompose(
    layer: nn.Module,
    rows: Tensor | None,
    ratio: float,
    kind: str = "svd",
    *,
    data_aware: bool = True,
) -> nn.Module:
    decision = LowRank(rank_ratio=ratio, kind=kind, data_aware=data_aware)
    variant = LOW_RANK.solve(layer_problem(layer, rows), decision)
    return LOW_RANK.install(layer, variant, decision, 1)


def product_of(parts: nn.Module) -> Matrix:
    """The unfolded weight that the parts amount to: what they make of every unit patch."""
    kernels = [tuple(part.weight.shape[2:]) for part in parts]
    widest = tuple(max(sizes) for sizes in zip(*kernels, strict=True))
    channels = parts[0].weight.shape[1]
    columns = channels * int(np.prod(widest))
    patch = torch.eye(columns, dtype=torch.float64).reshape(columns, channels, *widest)
    for part in parts:
        weight = part.weight.detach().double()
        if isinstance(part, nn.Linear):
            patch = F.linear(patch, weight)
        else:
            convolve = F.conv1d if weight.dim() == 3 else F.conv2d
            patch = convolve(patch, weight, groups=part.groups)
    return patch.reshape(columns, -1).T.numpy()


def damped_error(error: Matrix, rows: Tensor, *, free_bias: bool) -> float:
    return float(np.square(damped_rows(rows, free_bias=free_bias) @ error.T).sum())


@given(seeds, st.integers(1, 5), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_cut_is_the_best_for_the_data(seed: int, rank: int, bias: bool) -> None:
    """Its error is what Eckart and Young allow in the whitened space, below that of plain SVD."""
    rows = correlated_rows(60, 8, seed)
    torch.manual_seed(seed)
    layer = nn.Linear(8, 6, bias=bias)
    weight = weight_of(layer)
    found = damped_error(
        weight - product_of(decompose(layer, rows, rank / 6)), rows, free_bias=bias
    )
    a = damped_rows(rows, free_bias=bias)
    values, vectors = np.linalg.eigh(a.T @ a)
    whitened = weight @ vectors @ np.diag(np.sqrt(values)) @ vectors.T
    best = float(np.square(np.linalg.svd(whitened)[1][rank:]).sum())
    assert found == pytest.approx(best, rel=1e-3, abs=1e-7)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    plain = damped_error(weight - u[:, :rank] * s[:rank] @ vt[:rank], rows, free_bias=bias)
    assert found <= plain * (1 + 1e-5)


def test_it_beats_plain_svd_clearly_where_the_data_are_uneven() -> None:
    rows = correlated_rows(200, 8, 0) * torch.logspace(-1, 1, 8)
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    weight = weight_of(layer)
    aware = product_of(decompose(layer, rows, 0.5))
    plain = product_of(decompose(layer, None, 0.5))
    errors = [damped_error(weight - w, rows, free_bias=True) for w in (aware, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_without_statistics_it_is_plain_svd() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(7, 6)
    u, s, vt = np.linalg.svd(weight_of(layer), full_matrices=False)
    expected = u[:, :3] * s[:3] @ vt[:3]
    np.testing.assert_allclose(product_of(decompose(layer, None, 0.5)), expected, atol=1e-6)


LAYERS = [
    (nn.Linear(8, 6), (5, 8)),
    (nn.Linear(8, 6, bias=False), (5, 7, 8)),
    (nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2), (5, 3, 9, 9)),
    (nn.Conv2d(3, 6, (1, 3), padding="same", padding_mode="reflect", bias=False), (5, 3, 9, 9)),
    (nn.Conv1d(3, 6, 5, stride=2, padding=2, padding_mode="circular"), (5, 3, 12)),
    (nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (5, 4, 9, 8)),
    (nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 3)), (5, 3, 9, 9)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=(2, 1), padding_mode="replicate"), (5, 3, 9, 9)),
    (nn.Conv2d(3, 4, (3, 1), stride=(1, 2), padding=(0, 1), bias=False), (5, 3, 9, 9)),
    (nn.Conv2d(1, 4, 3, padding="valid"), (5, 1, 9, 9)),
]
EXACT = [
    (layer, shape, kind)
    for layer, shape in LAYERS
    for kind in ("svd", "spatial", "tucker")
    if kind == "svd"
    or sum(k > 1 for k in getattr(layer, "kernel_size", ())) >= 1 + (kind == "spatial")
]


@pytest.mark.parametrize(("layer", "shape", "kind"), EXACT)
@pytest.mark.parametrize("data_aware", [True, False])
def test_full_rank_reconstructs_the_layer(
    layer: nn.Module, shape: tuple[int, ...], kind: str, data_aware: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    columns = weight_of(layer).shape[1]
    expected = layer(x)
    rows = correlated_rows(100, columns, 0)
    parts = decompose(layer, rows, 1.0, kind, data_aware=data_aware)
    assert isinstance(parts, nn.Sequential) and len(parts) == 2 + (kind == "tucker")
    torch.testing.assert_close(parts(x), expected, rtol=1e-4, atol=1e-4)
    assert (parts[-1].bias is None) == (layer.bias is None)
    assert all(part.bias is None for part in parts[:-1])


def separable_layer(layer: nn.Conv2d, rank: int) -> nn.Conv2d:
    """The layer with a random weight of that CP rank."""
    generator = torch.Generator().manual_seed(0)
    out, channels, *kernel = layer.weight.shape
    factors = [torch.randn(size, rank, generator=generator) for size in (out, channels, *kernel)]
    letters = "ocij"[: len(factors)]
    equation = ",".join(f"{x}r" for x in letters) + "->" + letters
    with torch.no_grad():
        layer.weight.copy_(torch.einsum(equation, *factors))
    return layer


CP_LAYERS = [
    (nn.Conv2d(8, 6, 3, stride=2, padding=1, dilation=2), (5, 8, 9, 9), 4),
    (nn.Conv2d(8, 6, (2, 3), padding="same", padding_mode="reflect", bias=False), (5, 8, 9, 9), 4),
    (nn.Conv2d(8, 6, (1, 3), stride=(2, 1)), (5, 8, 9, 9), 3),
    (nn.Conv1d(8, 6, 5, stride=2, padding=2, padding_mode="circular"), (5, 8, 12), 3),
]


@pytest.mark.parametrize(("layer", "shape", "length"), CP_LAYERS)
@pytest.mark.parametrize("data_aware", [True, False])
def test_cp_finds_a_weight_that_has_a_low_rank(
    layer: nn.Conv2d, shape: tuple[int, ...], length: int, data_aware: bool
) -> None:
    separable_layer(layer, 2)
    parts = decompose(
        layer, correlated_rows(400, weight_of(layer).shape[1], 0), 0.5, "cp", data_aware=data_aware
    )
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = layer(x)
    assert len(parts) == length
    assert [p.groups > 1 for p in parts] == [False] + [True] * (length - 2) + [False]
    assert (parts(x) - wanted).square().mean() < 1e-3 * wanted.var()


def test_a_dead_input_is_still_reconstructed_at_full_rank() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    rows = 1e-3 * correlated_rows(100, 8, 0)
    rows[:, 2] = 0
    np.testing.assert_allclose(product_of(decompose(layer, rows, 1.0)), weight_of(layer), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_dead_input_takes_no_rank_from_the_others(scale: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    rows = scale * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    rows[:, 2] = 0
    weight = weight_of(layer)
    x = rows.double().numpy()
    centred = x - x.mean(0)
    error = np.square(centred @ (weight - product_of(decompose(layer, rows, 0.5))).T).sum()
    live = [i for i in range(8) if i != 2]
    s = np.linalg.svd(centred[:, live] @ weight[:, live].T)[1]
    assert error <= 1.3 * np.square(s[4:]).sum()


def test_the_bias_takes_the_cut_ranks_mean() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(8, 6)
    rows = correlated_rows(100, 8, 2)
    expected = layer(rows).mean(0)
    torch.testing.assert_close(
        decompose(layer, rows, 0.4)(rows).mean(0), expected, rtol=1e-4, atol=1e-4
    )


def test_one_solve_serves_every_rank() -> None:
    problem = problem_of(random_weight(6, 8, 0), correlated_rows(50, 8, 0), free_bias=True)
    one, other = (LOW_RANK.solve(problem, LowRank(rank_ratio=r)) for r in (0.2, 0.9))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert LOW_RANK.levels == ("rank_ratio",)
    sharing = {k: LOW_RANK.shares_solve(LowRank(rank_ratio=0.5, kind=k)) for k in KINDS}
    assert sharing == {"svd": True, "spatial": False, "tucker": False, "cp": False}


@given(st.integers(1, 300), st.floats(0, 1, exclude_min=True), st.integers(1, 32))
def test_kept_rank(full: int, ratio: float, multiple: int) -> None:
    rank = kept_rank(full, ratio, multiple)
    step = min(multiple, full)
    assert step <= rank <= full
    assert rank % step == 0 or rank == full
    assert abs(rank - ratio * full) <= step / 2 + 1e-9 or rank in (step, full)
    assert kept_rank(full, min(1.0, ratio * 1.5), multiple) >= rank


def test_only_ranks_that_save_work_are_offered() -> None:
    layer = graph_of("tokens").layer("up")  # 8 -> 24: below rank 6
    offers = [LowRank(rank_ratio=r / 8) for r in range(1, 9)]
    chosen = LOW_RANK.choices(layer, offers, make_device())
    assert [d.rank_ratio for d in chosen] == [r / 8 for r in range(5, 0, -1)]
    rough = LOW_RANK.choices(layer, offers, make_device(channel_multiple=4))
    ranks = [kept_rank(8, d.rank_ratio, 4) for d in rough]
    assert ranks == [4]


def test_a_grouped_convolution_is_not_offered_and_refused() -> None:
    layer = graph_of("depthwise").layer("depthwise")
    offers = [LowRank(rank_ratio=0.5)]
    assert LOW_RANK.choices(layer, offers, make_device()) == ()
    with pytest.raises(PlanError, match="grouped"):
        stitch(bank_of("depthwise"), Plan((Step("depthwise", offers[0]),)))


def conv_rows(count: int = 400) -> Tensor:
    """Unfolded patches of smooth images: neighbours in a patch and channels are alike."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator) * torch.logspace(0, -1.5, 6)
    images = torch.randn(count // 16, 6, 6, 6, generator=generator)
    images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1)), 3, 1) + 0.3
    images = torch.einsum("dc,nchw->ndhw", mix, images)
    return F.unfold(images, 3).transpose(1, 2).reshape(-1, 54)


def random_conv() -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Conv2d(6, 5, 3, padding=1)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_data_aware_parts_lose_far_less_of_the_output(kind: str, ratio: float) -> None:
    layer, rows = random_conv(), conv_rows()
    weight = weight_of(layer)
    aware, plain = (
        damped_error(
            weight - product_of(decompose(layer, rows, ratio, kind, data_aware=a)),
            rows,
            free_bias=True,
        )
        for a in (True, False)
    )
    assert aware < 0.7 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_what_ignores_the_data_is_the_same_without_statistics(kind: str) -> None:
    layer = random_conv()
    one = decompose(layer, conv_rows(), 0.5, kind, data_aware=False)
    for data_aware in (True, False):
        other = decompose(layer, None, 0.5, kind, data_aware=data_aware)
        np.testing.assert_allclose(product_of(one), product_of(other), atol=1e-5)


def test_plain_spatial_svd_is_the_best_of_its_rank() -> None:
    layer = random_conv()
    weight = layer.weight.detach().double().numpy()
    s = np.linalg.svd(weight.transpose(1, 2, 0, 3).reshape(18, 15))[1]
    error = weight_of(layer) - product_of(decompose(layer, None, 0.4, "spatial"))
    assert np.square(error).sum() == pytest.approx(np.square(s[6:]).sum(), rel=1e-4)


def normal_equations(layer: nn.Module, parts: nn.Module, index: int, rows: Tensor) -> float:
    """Largest derivative of the damped error with respect to a part, as a share of its terms."""
    root = torch.as_tensor(damped_rows(rows, free_bias=True))
    columns = weight_of(layer).shape[1]
    weights = [part.weight.detach().double() for part in parts]
    weights[index].requires_grad_(True)
    patch = torch.eye(columns, dtype=torch.float64).reshape(columns, *layer.weight.shape[1:])
    for weight in weights:
        patch = F.conv2d(patch, weight, groups=patch.shape[1] // weight.shape[1])
    made = root @ patch.reshape(columns, -1)
    wanted = root @ torch.as_tensor(weight_of(layer)).T
    whole, cross = made.square().sum(), (made * wanted).sum()
    own, other = (
        torch.autograd.grad(v, weights[index], retain_graph=True)[0] for v in (whole, cross)
    )
    return float((own - 2 * other).abs().max() / own.abs().max())


@pytest.mark.parametrize("kind", ["spatial", "tucker", "cp"])
def test_the_last_fitted_part_is_a_least_squares_solution(kind: str) -> None:
    layer, rows = random_conv(), conv_rows()
    parts = decompose(layer, rows, 0.4, kind)
    assert normal_equations(layer, parts, len(parts) - 1, rows) < 1e-3
    if kind == "tucker":
        assert normal_equations(layer, parts, 1, rows) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_aware", [True, False])
def test_the_mean_output_is_kept_by_the_bias(kind: str, data_aware: bool) -> None:
    """Only for those that know the data; the others know no mean."""
    layer, rows = random_conv(), conv_rows()
    parts = decompose(layer, rows, 0.4, kind, data_aware=data_aware)
    mean = rows.double().mean(0).numpy()
    wanted = weight_of(layer) @ mean + layer.bias.detach().numpy()
    found = product_of(parts) @ mean + parts[-1].bias.detach().numpy()
    if data_aware:
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    else:
        assert torch.equal(parts[-1].bias, layer.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_work_are_those_of_the_parts(kind: str) -> None:
    layer = nn.Conv2d(6, 5, (3, 2), stride=(2, 1))
    x = torch.randn(1, 6, 200, 200)
    described = Layer("layer", "conv", 6, 5, (3, 2), 1, layer(x)[0, 0].numel(), 1)
    decision = LowRank(rank_ratio=0.4, kind=kind)
    parts = decompose(layer, correlated_rows(100, 36, 0), 0.4, kind)
    total = sum(part.weight.numel() for part in parts)
    assert LOW_RANK.stored_bytes(described, decision, 1) == 4 * total
    shapes = parts_of(described, kind, ranks(described, kind, 0.4, 1))
    work = 0
    for part, shape in zip(parts, shapes, strict=True):
        assert (part.in_channels, part.out_channels) == (shape.in_channels, shape.out_channels)
        assert (part.kernel_size, part.groups) == (shape.kernel_size, shape.groups)
        x = part(x)
        work += shape.weights * x[0, 0].numel()
    assert share_of_work(described, shapes, (2, 1)) == pytest.approx(
        work / described.macs, rel=0.02
    )


def test_strides_are_taken_as_early_as_can_be() -> None:
    assert handlers([(1, 1), (3, 1), (1, 3), (1, 1)]) == (1, 2)
    assert handlers([(1, 1), (1, 3), (1, 1)]) == (0, 1)
    assert handlers([(3, 3), (1, 1)]) == (0, 0)
    assert handlers([(), ()]) == ()


def test_kinds_that_suit_a_layer() -> None:
    offers = [LowRank(rank_ratio=0.25, kind=kind) for kind in KINDS]
    found = {
        name: {d.kind for d in LOW_RANK.choices(graph_of(net).layer(name), offers, make_device())}
        for net, name in (("residual", "block2.conv2"), ("signal", "conv1"), ("tokens", "up"))
    }
    assert found == {"block2.conv2": set(KINDS), "conv1": {"svd", "tucker", "cp"}, "up": {"svd"}}
    pointwise = graph_of("residual").layer("block2.shortcut")
    assert not any(fits(pointwise, kind) for kind in KINDS[1:])
    for kind in KINDS[1:]:
        with pytest.raises(PlanError, match=f"kind {kind}"):
            step = Step("block2.shortcut", LowRank(rank_ratio=0.5, kind=kind))
            stitch(bank_of("residual"), Plan((step,)))


def test_choices_go_from_the_dearest_to_the_cheapest() -> None:
    layer = graph_of("residual").layer("block2.conv2")
    offers = [LowRank(rank_ratio=r, kind=k) for r in (0.2, 0.6, 0.4, 1.0) for k in KINDS]
    chosen = LOW_RANK.choices(layer, offers, make_device())
    shares = [
        share_of_work(layer, parts_of(layer, d.kind, ranks(layer, d.kind, d.rank_ratio, 1)))
        for d in chosen
    ]
    assert shares == sorted(shares, reverse=True) and shares[0] < 1
    assert {d.kind for d in chosen} == set(KINDS)


@given(st.sampled_from(KINDS), st.floats(0.01, 1), st.integers(1, 16), seeds)
@example("tucker", 1.0, 2, 1)
def test_ranks_are_possible(kind: str, ratio: float, multiple: int, seed: int) -> None:
    out, channels, height, width = np.random.default_rng(seed).integers(2, (40, 40, 6, 6)).tolist()
    layer = Layer("layer", "conv", channels, out, (height, width), 1, 1, 1)
    kept = ranks(layer, kind, ratio, multiple)
    assert len(kept) == 1 + (kind == "tucker") and min(kept) >= 1
    if kind == "tucker":
        taps = height * width
        assert kept[0] <= min(channels, kept[1] * taps) and kept[1] <= min(out, kept[0] * taps)
        assert ratio < 1 or kept == (min(channels, out * taps), min(out, channels * taps))
    if kind == "cp":
        # The full rank costs as much as the layer, and one more rank would cost more.
        full = ranks(layer, kind, 1.0, 1)[0]
        per_rank = out + channels + height + width
        size = out * channels * height * width
        assert full * per_rank <= size < (full + 1) * per_rank


def diverging(n: float) -> list[Tensor]:
    """Two components, each n times as large as their sum, which nearly cancel each other."""
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(5, 2, generator=generator).double())[0] for _ in range(3)]
    factors = []
    for index, basis in enumerate(bases):
        moved = basis[:, 0] + basis[:, 1] / n
        sign = -1 if index == 0 else 1
        factors.append(torch.stack([moved, sign * basis[:, 0]], 1))
    factors[0] = factors[0] * n
    return factors


def test_diverging_components_are_refused() -> None:
    """The standard example without a best fit of rank 2 (de Silva & Lim 2008)."""
    tensor = torch.einsum("or,cr,jr->ocj", *diverging(1e4))
    tensor = tensor / tensor.norm()
    for n, sound in ((1.0, True), (30.0, False), (1e3, False)):
        factors = diverging(n)
        norm = torch.einsum("or,cr,jr->ocj", *factors).norm()
        factors[0] = factors[0] / norm
        if sound:
            cp.check_fit(torch.einsum("or,cr,jr->ocj", *factors), factors, "layer")
            continue
        with pytest.raises(PlanError, match="degenerate") as caught:
            cp.check_fit(tensor, factors, "layer at rank 2")
        assert "layer at rank 2" in str(caught.value.given) and "two -" in str(caught.value.given)
        assert "tucker" in str(caught.value.advice)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 0.0])
def test_a_failed_fit_is_refused(spoil: float) -> None:
    """Not finite, or an error above that of a smaller rank."""
    tensor = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = cp.fit_cp(tensor / tensor.norm(), 4)
    cp.check_fit(tensor / tensor.norm(), factors, "layer")
    factors[0] = factors[0] * spoil
    with pytest.raises(PlanError, match="degenerate"):
        cp.check_fit(tensor / tensor.norm(), factors, "layer")


def test_a_layer_without_a_fit_is_refused() -> None:
    """The iterations on this weight end at rank 1, whatever rank they were given."""
    a, b = torch.eye(3)[:2]
    layer = nn.Conv1d(3, 3, 3)
    with torch.no_grad():
        layer.weight.copy_(
            torch.einsum("i,j,k->ijk", a, a, b)
            + torch.einsum("i,j,k->ijk", a, b, a)
            + torch.einsum("i,j,k->ijk", b, a, a)
        )
    with pytest.raises(PlanError, match="degenerate"):
        decompose(layer, None, 0.7, "cp")


def test_the_closed_form_of_a_smaller_rank() -> None:
    tensor = torch.randn(
        5, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    errors = [cp.slices_error(tensor, rank) for rank in range(25)]
    assert errors[0] == pytest.approx(1) and errors[24] == pytest.approx(0, abs=1e-12)
    assert errors == sorted(errors, reverse=True)


def test_a_wide_layer_is_compressed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = separable_layer(nn.Conv2d(12, 10, 3), 2)
    rows = correlated_rows(300, 108, 0)
    whole = product_of(decompose(layer, rows, 0.2, "cp"))
    monkeypatch.setattr(cp, "_LARGEST_MODE", 4)
    small = product_of(decompose(layer, rows, 0.2, "cp"))
    np.testing.assert_allclose(small, whole, atol=0.05 * np.abs(whole).max())


@pytest.mark.parametrize("kind", ["svd", "spatial", "cp"])
def test_components_have_equal_norms_in_all_parts(kind: str) -> None:
    parts = decompose(random_conv(), conv_rows(), 0.3, kind, data_aware=kind != "svd")
    before, after = parts[0].weight.flatten(1), parts[1].weight
    after = after.flatten(1) if parts[1].groups > 1 else after.transpose(0, 1).flatten(1)
    torch.testing.assert_close(before.norm(dim=1), after.norm(dim=1), rtol=1e-4, atol=1e-6)
