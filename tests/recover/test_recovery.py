from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from trainable import Killed, equal, killer, make_network, make_split, tensors

from autocompress import Split
from autocompress.errors import PlanError, WorkloadError
from autocompress.plan import make_decision
from autocompress.recover.gradual import cubic_share, gradual
from autocompress.recover.recovery import (
    RecoveryContext,
    recover_network,
    recovery_settings,
    step_count_of,
)
from autocompress.techniques.recovery import Recover

METHODS = ["fine_tune", "response", "feature", "response_feature"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_recovers_and_repeats(method: str) -> None:
    teacher, split = make_network(0), make_split(512)
    decision = Recover(method=method, epochs=20, learning_rate=0.1)
    before = tensors(teacher)
    networks = [make_network(1, width=8, dropout=0) for _ in range(2)]
    reports = [recover_network(n, teacher, split, decision) for n in networks]
    assert equal(tensors(networks[0]), tensors(networks[1]))
    assert reports[0].held_out_losses == reports[1].held_out_losses
    assert min(reports[0].held_out_losses) < 0.9 * reports[0].held_out_losses[0]
    assert reports[0].best_epoch > 0
    assert equal(tensors(teacher), before)
    assert not any(m.training for n in (teacher, *networks) for m in n.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [2, 6])
def test_a_killed_recovery_ends_as_if_nothing_had_been(
    method: str, after: int, tmp_path: Path
) -> None:
    teacher, split = make_network(0), make_split(512)
    decision = Recover(method=method, epochs=3)

    def recover(folder: Path | None, kill: int = 0) -> nn.Module:
        network = make_network(1, width=4)
        context = RecoveryContext(1, folder, killer(kill))
        recover_network(network, teacher, split, decision, context)
        return network

    whole = recover(None)
    with pytest.raises(Killed):
        recover(tmp_path, after)
    assert equal(tensors(whole), tensors(recover(tmp_path)))


def test_checkpoints_of_other_networks_data_and_decisions_are_not_taken(tmp_path: Path) -> None:
    context = RecoveryContext(folder=tmp_path)
    base = Recover(epochs=0.5)
    cases = [
        (1, 0, 128, base), (2, 0, 128, base), (1, 3, 128, base), (1, 0, 100, base),
        (1, 0, 128, Recover(epochs=0.5, temperature=3)),
    ]  # fmt: skip
    for count, (student, teacher, samples, decision) in enumerate(cases, 1):
        split = make_split(samples)
        recover_network(make_network(student), make_network(teacher), split, decision, context)
        assert len(list(tmp_path.iterdir())) == count
    rounds = base.model_copy(update={"pruning_rounds": 3})
    recover_network(make_network(1), make_network(0), make_split(), rounds, context)
    assert len(list(tmp_path.iterdir())) == len(cases)


def test_a_cycle_is_a_training_of_its_own(tmp_path: Path) -> None:
    """Twice as long as the one before it; the same samples are held out."""
    network, split = make_network(1), make_split(512)
    decision = Recover(epochs=1, cycles=3)
    reports = [
        recover_network(
            network, make_network(), split, decision, RecoveryContext(folder=tmp_path, cycle=cycle)
        )
        for cycle in range(3)
    ]
    assert [report.steps for report in reports] == [3, 6, 12]
    assert len(list(tmp_path.iterdir())) == 3
    for one, next_one in pairwise(reports):
        assert next_one.held_out_losses[0] == pytest.approx(min(one.held_out_losses), rel=1e-3)


def test_without_labels_everything_but_fine_tuning_works() -> None:
    split = Split(make_split().inputs)
    for method in METHODS[1:]:
        report = recover_network(
            make_network(1), make_network(), split, Recover(method=method, epochs=1)
        )
        assert report.steps == 1
    with pytest.raises(WorkloadError, match="needs targets") as caught:
        recover_network(
            make_network(1), make_network(), split, Recover(method="fine_tune", epochs=1)
        )
    assert "response_feature" in str(caught.value)


def test_outputs_that_are_no_scores() -> None:
    """A regression; by class scores' rules its outputs of one column would teach nothing."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 5, generator=generator)
    teacher, student = nn.Linear(5, 1).eval(), nn.Linear(5, 1).eval()
    for parameter in (*teacher.parameters(), *student.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=generator)
    recover_network(
        student, teacher, Split(inputs), Recover(epochs=100, learning_rate=0.2),
        RecoveryContext(class_scores=False, bf16=False),
    )  # fmt: skip
    torch.testing.assert_close(student.weight, teacher.weight, atol=0.05, rtol=0)


def test_no_epochs_are_the_identity() -> None:
    network = make_network(1)
    before = tensors(network)
    assert recover_network(network, make_network(), make_split(), Recover(epochs=0)).steps == 0
    assert equal(before, tensors(network))


def test_settings_follow_the_decision_and_the_data() -> None:
    network = nn.BatchNorm1d(4)
    settings = recovery_settings(network, 50_000, (30, 0.3), RecoveryContext(seed=7))
    assert (settings.epochs, settings.learning_rate, settings.seed) == (30, 0.3, 7)
    assert (settings.holdout, settings.patience) == (1000, 12)
    few = recovery_settings(network, 5, (30, 0.3), RecoveryContext())
    assert (few.holdout, few.patience) == (0, None)


@pytest.mark.parametrize(
    ("modules", "optimizer"),
    [
        ([nn.Linear(2, 2)], "sgd"),
        ([nn.LayerNorm(2)], "adamw"),
        ([nn.RMSNorm(2)], "adamw"),
        # Squeeze-and-excite blocks and the like may have layer norms among batch norms.
        ([nn.LayerNorm(2), nn.BatchNorm2d(2)], "sgd"),
    ],
)
def test_transformers_are_trained_by_adamw(modules: list[nn.Module], optimizer: str) -> None:
    network = nn.Sequential(*modules)
    settings = recovery_settings(network, 500, (2, 0.05), RecoveryContext())
    assert settings.optimizer == optimizer
    rate, steps = {"sgd": (0.05, 6), "adamw": (5e-4, 28)}[optimizer]
    assert settings.learning_rate == pytest.approx(rate)
    assert step_count_of(network, 500, 2) == steps


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"epochs": -1}, {"epochs": 101}, {"epochs": 1, "learning_rate": 0},
        {"epochs": 1, "temperature": 0.5}, {"epochs": 1, "pruning_rounds": 17},
        {"epochs": 1, "method": "magic"}, {"epochs": 1, "cycles": 0}, {"epochs": 1, "cycles": 9},
    ],
)  # fmt: skip
def test_decisions_out_of_range_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        make_decision(Recover, fields)


def test_the_cubic_schedule() -> None:
    assert [cubic_share(t, 4) for t in range(5)] == [0, 37 / 64, 56 / 64, 63 / 64, 1]
    for done, rounds in ((-1, 4), (5, 4), (0, 0)):
        with pytest.raises(PlanError, match="round"):
            cubic_share(done, rounds)


def test_gradual_prunes_and_trains_in_turn() -> None:
    calls: list[tuple[str, float]] = []
    network = nn.Linear(1, 1)

    def prune(given: nn.Module, share: float) -> None:
        assert given is network
        calls.append(("prune", share))

    def train(given: nn.Module, number: int) -> None:
        assert given is network
        calls.append(("train", number))

    gradual(network, prune, 2, train)
    assert calls == [("prune", 0.875), ("train", 0), ("prune", 1.0), ("train", 1)]
    with pytest.raises(PlanError):
        gradual(network, prune, 0, train)
