"""Statistics of a decomposed layer's parts, against those of the inputs that they really get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import bank_of
from torch import Tensor, nn

from autocompress.bank.parts import part_layer, part_statistics
from autocompress.bank.statistics import unfold_inputs
from autocompress.graph import Layer
from autocompress.graph.layers import observe_layers
from autocompress.techniques.low_rank import LOW_RANK, LowRank
from autocompress.techniques.technique import LayerProblem, LayerStatistics, unfolded

KINDS = ("svd", "spatial", "tucker", "cp")


def rows_of(module: nn.Module, inputs: Tensor) -> Tensor:
    return unfold_inputs(module, inputs, torch.Generator(), 10**9).double()


def statistics_of(rows: Tensor) -> LayerStatistics:
    return LayerStatistics(
        rows.T @ rows / len(rows), rows.mean(0), rows.abs().mean(0), (rows == 0).double().mean(0)
    )


def inputs_of(kind: str, *shape: int) -> Tensor:
    """Smooth inputs with a mean, a third of them zero: neighbours and channels are alike."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(len(kind)))
    for dimension in range(1, len(shape)):
        x = x + x.roll(1, dimension)
    return F.relu(x + 0.5)


def decomposed(
    module: nn.Module, x: Tensor, kind: str
) -> tuple[Layer, LayerStatistics, list[nn.Module]]:
    holder = nn.Sequential(module)
    layer = observe_layers(holder, (x,))[0]
    statistics = statistics_of(rows_of(module, x))
    problem = LayerProblem(layer, unfolded(module), None, statistics, True, 1)
    decision = LowRank(rank_ratio=0.5, kind=kind)  # type: ignore[arg-type]
    parts = LOW_RANK.install(module, LOW_RANK.solve(problem, decision), decision, 1)
    assert isinstance(parts, nn.Sequential)
    return layer, statistics, list(parts)


CASES = [
    (nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), (6, 4, 7, 8), kind) for kind in KINDS
] + [
    (nn.Conv2d(4, 5, (2, 3), padding="same", padding_mode="circular"), (6, 4, 7, 8), "spatial"),
    (nn.Conv2d(4, 5, (1, 3), padding=(0, 1), padding_mode="circular"), (6, 4, 7, 8), "tucker"),
    (nn.Conv1d(4, 5, 5, padding=2, padding_mode="circular"), (6, 4, 12), "tucker"),
    (nn.Conv1d(4, 5, 5, padding=2, padding_mode="circular"), (6, 4, 12), "cp"),
    (nn.Linear(6, 5), (9, 3, 6), "svd"),
]


@pytest.mark.parametrize(("module", "shape", "kind"), CASES)
def test_they_are_those_of_the_inputs_that_a_part_gets(
    module: nn.Module, shape: tuple[int, ...], kind: str
) -> None:
    """Exact where every input is seen at every place of the patch, as circular padding has it."""
    x = inputs_of(kind, *shape)
    layer, statistics, parts = decomposed(module, x, kind)
    for index, part in enumerate(parts):
        found = part_statistics(layer, parts, index, statistics)
        if getattr(part, "groups", 1) > 1:
            assert found is None and kind == "cp"
        else:
            assert found is not None
            wanted = statistics_of(rows_of(part, x.detach()))
            torch.testing.assert_close(found.moment, wanted.moment, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)
            if index == 0:
                torch.testing.assert_close(found.magnitude, wanted.magnitude)
                torch.testing.assert_close(found.zero_share, wanted.zero_share)
                assert wanted.zero_share.min() > 0.05
            else:
                # That of a Gaussian without a mean.
                share = found.magnitude / found.moment.diagonal().sqrt()
                torch.testing.assert_close(share, torch.full_like(share, (2 / np.pi) ** 0.5))
        with torch.no_grad():
            x = part(x)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_close_where_the_edges_count_less(kind: str) -> None:
    x = inputs_of(kind, 20, 4, 12, 12)
    module = nn.Conv2d(4, 5, 3, stride=1)
    layer, statistics, parts = decomposed(module, x, kind)
    for index, part in enumerate(parts):
        found = part_statistics(layer, parts, index, statistics)
        if found is not None:
            wanted = statistics_of(rows_of(part, x.detach()))
            exact = index == len(parts) - 1
            error = (found.moment - wanted.moment).norm() / wanted.moment.norm()
            assert error < (1e-5 if exact else 0.1)
        with torch.no_grad():
            x = part(x)


def test_parts_are_described_as_layers_of_their_own() -> None:
    module = nn.Conv2d(4, 5, 3)
    layer, _, parts = decomposed(module, inputs_of("cp", 6, 4, 7, 8), "cp")
    described = [part_layer(layer, part) for part in parts]
    rank = parts[0].out_channels
    assert [d.kernel_size for d in described] == [(1, 1), (3, 1), (1, 3), (1, 1)]
    assert [d.groups for d in described] == [1, rank, rank, 1]
    assert [(d.in_channels, d.out_channels) for d in described] == [
        (4, rank), (rank, rank), (rank, rank), (rank, 5),
    ]  # fmt: skip
    assert [d.in_features for d in described] == [4, 3, 3, rank]
    assert all(d.positions == layer.positions == 30 for d in described)
    assert sum(d.weights for d in described) == sum(
        p.numel() for part in parts for p in part.parameters()
    )


def test_a_pruned_layers_parts_read_what_is_left_of_its_statistics() -> None:
    bank = bank_of("residual")
    layer = bank.graph.layer("block2.conv2")
    whole = bank.statistics("block2.conv2")
    assert whole is not None
    columns = [i for i in range(layer.in_features) if i // 9 not in (1, 4)]
    kept = whole.select(columns)
    parts = [nn.Conv2d(10, 3, (3, 1)), nn.Conv2d(3, 12, (1, 3))]
    found = part_statistics(layer, parts, 1, kept)
    assert found is not None and found.moment.shape == (9, 9)
    first = part_statistics(layer, parts, 0, kept)
    assert first is not None and first.moment.shape == (30, 30)
    places = [[c * 9 + 3 * i + j for c in range(10) for i in range(3)] for j in range(3)]
    wanted = torch.stack([kept.moment[p][:, p] for p in places]).mean(0)
    torch.testing.assert_close(first.moment, wanted)
