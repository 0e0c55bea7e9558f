from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import bank_of, graph_of, make_case
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor, nn
from trainable import FAST, equal, make_network, make_split, tensors

from autocompress import Split
from autocompress.bank import stitch
from autocompress.errors import PlanError, WorkloadError
from autocompress.plan import Plan, Step
from autocompress.recover.distillation import (
    LabelLoss,
    ResponseLoss,
    ResponseTerm,
    hard_label_loss,
    relative_error,
    softened_divergence,
)
from autocompress.recover.features import Adapters, FeatureLoss, FeatureMap, find_maps
from autocompress.recover.teacher import Teacher
from autocompress.recover.training import Batch, train
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank


def scores(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(split: Split, count: int = 8) -> Batch:
    part = split.subset(range(count))
    return Batch(part.inputs, part.targets, torch.arange(count))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_that_of_scipy_times_the_squared_temperature(temperature: float) -> None:
    mine, wanted = scores(5, 4), scores(5, 4, seed=1)
    p = softmax(wanted.double().numpy() / temperature, axis=1)
    q = softmax(mine.double().numpy() / temperature, axis=1)
    expected = temperature**2 * np.mean([entropy(a, b) for a, b in zip(p, q, strict=True)])
    found = float(softened_divergence(mine, wanted, temperature))
    assert found == pytest.approx(expected, rel=1e-5) and found > 0.1
    assert float(softened_divergence(wanted, wanted, temperature)) == pytest.approx(0, abs=1e-6)


def test_two_classes_by_hand() -> None:
    """Teacher 3/4 to 1/4, student even: 3/4 log(3/2) + 1/4 log(1/2)."""
    found = softened_divergence(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), 1)
    assert float(found) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_positions_count_as_samples() -> None:
    mine, wanted = scores(2, 4, 3), scores(2, 4, 3, seed=1)
    flat = [x.movedim(1, 2).reshape(6, 4) for x in (mine, wanted)]
    torch.testing.assert_close(
        softened_divergence(mine, wanted, 2), softened_divergence(flat[0], flat[1], 2)
    )


def test_hard_labels_of_both_kinds() -> None:
    uniform = torch.zeros(2, 4)
    assert float(hard_label_loss(uniform, torch.tensor([0, 3]))) == pytest.approx(math.log(4))
    assert float(hard_label_loss(uniform, torch.full((2, 4), 3.0))) == 9
    assert float(hard_label_loss(torch.zeros(2, 4, 5), torch.zeros(2, 5, dtype=torch.uint8))) > 0
    for targets in (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)):
        with pytest.raises(WorkloadError, match="do not fit"):
            hard_label_loss(uniform, targets)


def test_the_response_and_the_labels_are_added() -> None:
    student, teacher, split = make_network(1), make_network(0), make_split()
    batch = batch_of(split)
    mine, wanted = student(*batch.inputs), teacher(*batch.inputs)
    loss = ResponseLoss(Teacher(teacher), ResponseTerm(4.0), alpha=0.3)
    soft = softened_divergence(mine, wanted, 4.0)
    torch.testing.assert_close(
        loss(student, batch), soft + 0.3 * F.cross_entropy(mine, batch.targets)
    )
    unlabelled = Batch(batch.inputs, None, batch.samples)
    torch.testing.assert_close(loss(student, unlabelled), soft)


def test_outputs_that_are_no_class_scores_are_compared_by_squares() -> None:
    mine = [torch.full((2, 3), 1.0), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)]
    wanted = [torch.full((2, 3), 2.0), torch.ones(2, 1), torch.ones(2, dtype=torch.long)]
    term = ResponseTerm(4.0, class_scores=False)
    assert float(term(mine, wanted)) == pytest.approx((1 / 4 + 1) / 2)
    assert float(relative_error(mine[0], wanted[0])) == pytest.approx(1 / 4)
    with pytest.raises(WorkloadError, match="None of the network's outputs"):
        term(mine[2:], wanted[2:])
    with pytest.raises(WorkloadError, match="axis 1"):
        ResponseTerm(4.0)([torch.zeros(3)], [torch.zeros(3)])


def test_integers_are_labels_only_of_class_scores() -> None:
    student, batch = make_network(1), batch_of(make_split())
    term = ResponseTerm(4.0, class_scores=False)
    with_labels = ResponseLoss(Teacher(make_network()), term, alpha=0.5)(student, batch)
    without = ResponseLoss(Teacher(make_network()), term, alpha=0)(student, batch)
    assert torch.equal(with_labels, without)


def test_the_ends_of_blocks_are_chosen() -> None:
    case = make_case("residual")
    inputs = case.example_inputs
    maps = find_maps(case.network, case.network, inputs, 2)
    assert [m.name for m in maps] == ["block1", "block2"]
    assert all(m.axis == 1 and m.channels == m.teacher_channels for m in maps)


def test_layers_are_chosen_evenly_where_there_are_too_few_blocks() -> None:
    network = make_network()
    maps = find_maps(network, network, make_split().subset(2).inputs)
    assert [m.name for m in maps] == ["1", "5", "7"]
    assert len(find_maps(network, network, make_split().subset(2).inputs, 50)) == 7


class _Nested(nn.Module):
    """A stage whose end is the end of its last block, and an identity that repeats an output."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 1)), nn.Sequential(nn.ReLU()))
        self.two = nn.Sequential(nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1)))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


def test_one_map_counts_once_and_the_response_not_at_all() -> None:
    network = _Nested().eval()
    maps = find_maps(network, network, (torch.randn(2, 2, 2, 2),))
    assert [m.name for m in maps] == ["one.0", "one", "two"]


def test_ends_of_stages_come_before_what_is_inside_them() -> None:
    block = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()) for _ in range(7)]
    stages = nn.Sequential(nn.Sequential(*block[:5]), *block[5:])
    network = nn.Sequential(stages, nn.Flatten(), nn.Linear(8, 3)).eval()
    maps = find_maps(network, network, (torch.randn(2, 2, 2, 2),))
    assert [m.name for m in maps] == ["0.0", "0.1", "0"]


def test_maps_of_pruned_and_decomposed_networks_are_found_with_their_channels() -> None:
    case, graph = make_case("residual"), graph_of("residual")
    pruned = Plan(
        tuple(Step(g.name, FilterPrune(pruning_ratio=0.5)) for g in graph.groups if g.prunable)
    )
    network = stitch(bank_of("residual"), pruned).network
    maps = find_maps(network, case.network, case.inputs, 2)
    assert [(m.channels, m.teacher_channels) for m in maps] == [(4, 8), (6, 12)]
    low_rank = Plan((Step("block1.conv1", LowRank(rank_ratio=0.25)),))
    network = stitch(bank_of("residual"), low_rank).network
    names = [m.name for m in find_maps(network, case.network, case.inputs, 50)]
    assert "block1.conv1" in names and "block1.conv1.0" not in names


def test_networks_without_a_common_map_are_refused() -> None:
    one = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    other = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(PlanError, match="No intermediate map") as caught:
        find_maps(one, other, (torch.zeros(2, 4),))
    assert "response" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 3), 1), ((2, 3, 5), 1), ((2, 5, 3), 2), ((2, 3, 4, 5), 1)]
)
def test_adapters_are_linear_maps_over_the_channels(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    adapters = Adapters([FeatureMap("a", axis, 3, 7)], seed=0)
    assert torch.equal(before, torch.get_rng_state())
    x = scores(*shape)
    layer = adapters.layers[0]
    wanted = layer(x.movedim(axis, -1)).movedim(-1, axis)
    torch.testing.assert_close(adapters([x])[0], wanted)
    again, other = Adapters(adapters._maps, seed=0), Adapters(adapters._maps, seed=1)
    assert torch.equal(again.layers[0].weight, layer.weight)
    assert not torch.equal(other.layers[0].weight, layer.weight)
    assert Adapters([FeatureMap("a", axis, 3, 3)], seed=0)([x])[0] is x


def feature_loss(student: nn.Module, teacher: nn.Module, response: bool = False) -> FeatureLoss:
    maps = find_maps(student, teacher, make_split().subset(2).inputs)
    term = ResponseTerm(4.0) if response else None
    return FeatureLoss(Teacher(teacher), maps, Adapters(maps, 0), term, alpha=0.0)


def test_the_feature_loss_in_closed_form() -> None:
    student, teacher = make_network(1), make_network(0)
    batch = batch_of(make_split())
    errors = []
    for end in (2, 6, 8):
        mine, wanted = student[:end](*batch.inputs), teacher[:end](*batch.inputs)
        errors.append(((mine - wanted) ** 2).mean() / (wanted**2).mean())
    wanted_loss = sum(errors) / 3
    torch.testing.assert_close(feature_loss(student, teacher)(student, batch), wanted_loss)
    both = feature_loss(student, teacher, response=True)(student, batch)
    soft = softened_divergence(student(*batch.inputs), teacher(*batch.inputs), 4.0)
    torch.testing.assert_close(both, wanted_loss + soft)
    assert not any(m._forward_hooks for n in (student, teacher) for m in n.modules())


@pytest.mark.parametrize("kind", ["response", "feature", "both"])
def test_distillation_lowers_its_loss_and_leaves_the_teacher_alone(kind: str) -> None:
    """On a narrower student without labels; the student's adapters are trained along."""
    teacher, student = make_network(0, dropout=0), make_network(1, width=3, dropout=0)
    split = Split(make_split().inputs)
    loss = (
        ResponseLoss(Teacher(teacher), ResponseTerm(4.0))
        if kind == "response"
        else feature_loss(student, teacher, kind == "both")
    )
    before, adapters = tensors(teacher), copy.deepcopy(loss.extra)
    report = train(student, split, loss, FAST)
    assert report.held_out_losses[-1] < 0.8 * report.held_out_losses[0]
    assert equal(before, tensors(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m.training for n in (teacher, student) for m in n.modules())
    moved = not equal(tensors(adapters), tensors(loss.extra))
    assert moved == (kind != "response")
    assert "layers" not in dict(student.named_children())


def test_fine_tuning_without_labels_is_refused() -> None:
    with pytest.raises(WorkloadError, match="needs targets"):
        train(make_network(), Split(make_split().inputs), LabelLoss(), FAST)
    report = train(make_network(), make_split(), LabelLoss(), FAST)
    assert report.steps == 18
