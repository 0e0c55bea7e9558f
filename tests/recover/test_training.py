from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainable import (
    FAST,
    CrossEntropy,
    FromFunction,
    Killed,
    equal,
    killer,
    make_network,
    make_split,
    tensors,
)

from autocompress import Split
from autocompress.errors import (
    ConfigError,
    OutOfTimeError,
    PlanError,
    RunFolderError,
    WorkloadError,
)
from autocompress.recover import autocast as autocast_module
from autocompress.recover import training as training_module
from autocompress.recover.autocast import bf16_pays, takes_bf16
from autocompress.recover.schedule import epoch_batches, learning_rate_share, split_off
from autocompress.recover.training import (
    Batch,
    TrainingContext,
    TrainingReport,
    TrainingSettings,
    train,
)


def trained(
    settings: TrainingSettings = FAST, context: TrainingContext | None = None
) -> tuple[dict[str, Tensor], TrainingReport]:
    network = make_network()
    report = train(network, make_split(), CrossEntropy(), settings, context)
    return tensors(network), report


def results(report: TrainingReport) -> TrainingReport:
    return replace(report, seconds=0.0)


def test_the_loss_falls_and_the_network_is_left_in_evaluation_mode() -> None:
    network = make_network(width=16, dropout=0)
    settings = replace(FAST, epochs=20, learning_rate=0.1)
    report = train(network, make_split(), CrossEntropy(), settings)
    assert report.held_out_losses[report.best_epoch] < 0.8 * report.held_out_losses[0]
    assert report.train_losses[-1] < 0.7 * report.train_losses[0]
    assert report.steps == 20 * 6 and report.seconds > 0 and not report.bf16
    assert not any(m.training for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_seed_gives_one_result_and_another_seed_another(optimizer: str) -> None:
    settings = replace(FAST, optimizer=optimizer, bf16="auto")
    torch.manual_seed(1)
    first, report = trained(settings)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, report_again = trained(settings)
    assert equal(first, again) and results(report) == results(report_again)
    assert torch.equal(before, torch.get_rng_state())
    other, _ = trained(replace(settings, seed=1))
    assert not equal(first, other)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("every_s", [60.0, 0.0], ids=["epochs", "steps"])
@pytest.mark.parametrize("after", [1, 8, 12, 18])
def test_a_killed_training_goes_on_and_ends_as_if_nothing_had_been(
    optimizer: str, every_s: float, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(FAST, optimizer=optimizer)
    monkeypatch.setattr(training_module, "_CHECKPOINT_EVERY_S", every_s)
    whole, report = trained(settings)
    with pytest.raises(Killed):
        trained(settings, TrainingContext(tmp_path, "me", killer(after)))
    calls: list[int] = []
    seen: list[int] = []
    context = TrainingContext(
        tmp_path, "me", lambda: calls.append(1), lambda step, steps: seen.append(step)
    )
    resumed, report_resumed = trained(settings, context)
    assert equal(whole, resumed)
    assert results(report) == results(report_resumed)
    assert len(calls) == report.steps
    # The step of the kill is done again, and where only epochs are saved all since its beginning.
    done = after - 1 if every_s == 0 else (after - 1) // 6 * 6
    assert seen[0] == done and seen[-1] == report.steps - 1


@pytest.mark.parametrize("stops", [[1], [6], [5, 6, 7], [12, 17], list(range(1, 18))])
def test_a_stopped_training_goes_on_and_ends_as_if_nothing_had_been(
    stops: list[int], tmp_path: Path
) -> None:
    """Steps 6, 12 and 18 are the last of an epoch."""
    whole, report = trained(FAST)
    steps = [0]

    def count(step: int, number: int) -> None:
        steps[0] = step + 1

    for stop in stops:
        context = TrainingContext(
            tmp_path, "me", before_step=count, stop=lambda s=stop: steps[0] >= s
        )
        with pytest.raises(OutOfTimeError, match=f"{stop} of 18 steps") as caught:
            trained(FAST, context)
        assert "goes on from its checkpoint" in str(caught.value)
    resumed, report_resumed = trained(FAST, TrainingContext(tmp_path, "me", before_step=count))
    assert equal(whole, resumed) and results(report) == results(report_resumed)


def test_the_end_comes_before_the_stop() -> None:
    """After the last step there is nothing left to stop."""
    steps = [0]

    def count(step: int, number: int) -> None:
        steps[0] = step + 1

    context = TrainingContext(before_step=count, stop=lambda: steps[0] == 18)
    _, report = trained(FAST, context)
    assert report.steps == 18
    with pytest.raises(OutOfTimeError, match="give it a folder"):
        trained(FAST, TrainingContext(stop=lambda: True))


@pytest.mark.parametrize("before", [1, 0.5, 1.5])
def test_a_later_training_goes_on_in_the_order_of_samples(before: float) -> None:
    first, later = CrossEntropy(), CrossEntropy()
    train(make_network(), make_split(), first, replace(FAST, epochs=3))
    train(make_network(), make_split(), later, replace(FAST, epochs=1, epochs_before=before))
    start = round(6 * before)
    assert len(later.samples) == 6
    for one, other in zip(first.samples[start : start + 6], later.samples, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_random_numbers_do_not_come_again_in_a_later_training() -> None:
    drawn: list[float] = []

    def noise(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        drawn.append(float(torch.rand((), generator=generator)))
        drawn.append(float(torch.rand(())))
        return inputs

    for before in (0, 0.5, 1):
        settings = replace(FAST, epochs=0.5, epochs_before=before)
        trained(settings, TrainingContext(augment=noise))
    assert len(drawn) == len(set(drawn)) == 18


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first, report = trained(FAST, TrainingContext(tmp_path, "me"))
    (file,) = tmp_path.iterdir()

    def refuse(step: int, steps: int) -> None:
        raise AssertionError("trained again")

    again, report_again = trained(FAST, TrainingContext(tmp_path, "me", before_step=refuse))
    assert equal(first, again) and report == report_again
    saved = torch.load(file, weights_only=True)
    assert saved["state"]["optimizer"] is None and saved["state"]["best"] is None


def test_other_settings_or_identity_start_anew_and_damage_is_done_again(tmp_path: Path) -> None:
    first, _ = trained(FAST, TrainingContext(tmp_path, "me"))
    (file,) = tmp_path.iterdir()
    trained(FAST, TrainingContext(tmp_path, "another"))
    trained(replace(FAST, learning_rate=0.04), TrainingContext(tmp_path, "me"))
    assert len(list(tmp_path.iterdir())) == 3
    for content in (b"", file.read_bytes()[:5000], b"garbage"):
        file.write_bytes(content)
        again, _ = trained(FAST, TrainingContext(tmp_path, "me"))
        assert equal(first, again)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    trained(FAST, TrainingContext(tmp_path, "me"))
    with pytest.raises(RunFolderError, match="another network"):
        train(
            make_network(width=7), make_split(), CrossEntropy(), FAST,
            TrainingContext(tmp_path, "me"),
        )  # fmt: skip


def test_the_automatic_choice_of_bf16_outlives_a_move_to_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(FAST, bf16="auto")
    monkeypatch.setattr(training_module, "takes_bf16", lambda *args: True)
    whole, report = trained(settings)
    with pytest.raises(Killed):
        trained(settings, TrainingContext(tmp_path, "me", killer(8)))
    monkeypatch.setattr(training_module, "takes_bf16", lambda *args: False)
    resumed, report_resumed = trained(settings, TrainingContext(tmp_path, "me"))
    assert report.bf16 and report_resumed.bf16 and equal(whole, resumed)
    other, report_other = trained(settings)
    assert not report_other.bf16 and not equal(whole, other)


class Mixing(nn.Module):
    """Its last operator takes no mixture of bf16 and fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x, x)


def test_networks_that_do_not_run_in_bf16_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast_module, "bf16_pays", lambda device: True)
    network, x = Mixing().train(), (torch.randn(4, 4),)
    assert not takes_bf16(network, x)
    assert all(module.training for module in network.modules())
    assert takes_bf16(network.first, x)
    monkeypatch.setattr(autocast_module, "bf16_pays", lambda device: False)
    assert not takes_bf16(network.first, x)


@pytest.mark.parametrize(("flags", "pays"), [("avx2 avx512f", False), ("avx2 avx512_bf16", True)])
def test_bf16_is_chosen_by_the_processor(
    flags: str, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: f"cpu : 0\nflags\t\t: {flags}\n")
    assert bf16_pays(torch.device("cpu")) is pays
    assert not bf16_pays(torch.device("meta"))


def test_the_best_weights_are_kept_and_patience_stops() -> None:
    """Held-out losses that are made to be lowest after the second epoch."""
    script = iter([5.0, 3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    weights: list[dict[str, Tensor]] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        value = F.cross_entropy(network(*batch.inputs), batch.targets)
        if network.training:
            return value
        weights.append(tensors(network))
        return torch.tensor(next(script))

    network = make_network()
    settings = replace(FAST, epochs=10, holdout=16, patience=3)
    report = train(network, make_split(), FromFunction(loss), settings)
    assert report.held_out_losses == (5, 3, 1, 2, 2, 2)
    assert report.stopped_early and report.best_epoch == 2 and len(report.train_losses) == 5
    assert equal(tensors(network), weights[2])
    assert not equal(tensors(network), weights[5])


def test_a_training_that_only_harms_leaves_the_weights_from_before() -> None:
    values = iter([1.0, 2.0, 3.0, 4.0])

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        value = F.cross_entropy(network(*batch.inputs), batch.targets)
        return value if network.training else torch.tensor(next(values))

    network = make_network()
    before = tensors(network)
    report = train(network, make_split(), FromFunction(loss), replace(FAST, holdout=16))
    assert report.best_epoch == 0 and not report.stopped_early
    assert equal(tensors(network), before)


def test_the_held_out_loss_is_the_mean_over_samples_in_evaluation_mode() -> None:
    network = make_network()
    split = make_split(100)
    _, held = split_off(100, 20, FAST.seed)
    part = split.subset(held)
    with torch.no_grad():
        wanted = float(F.cross_entropy(network(*part.inputs), part.targets))
    report = train(network, split, CrossEntropy(), replace(FAST, holdout=20))
    assert report.held_out_losses[0] == pytest.approx(wanted, rel=1e-5)


def test_every_epoch_shows_all_samples_but_the_held_out_once_in_a_new_order() -> None:
    loss = CrossEntropy()
    train(make_network(), make_split(), loss, replace(FAST, epochs=2))
    seen = [s for s in loss.samples if s is not None]
    first, second = torch.cat(seen[:6]), torch.cat(seen[6:])
    _, held = split_off(128, 32, FAST.seed)
    assert sorted([*first.tolist(), *held.tolist()]) == list(range(128))
    assert sorted(first.tolist()) == sorted(second.tolist()) and not torch.equal(first, second)


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1.5, 9), (0.01, 1)])
def test_parts_of_epochs(epochs: float, steps: int) -> None:
    before = tensors(make_network())
    after, report = trained(replace(FAST, epochs=epochs))
    assert report.steps == steps and len(report.train_losses) == math.ceil(epochs)
    assert equal(before, after) == (report.best_epoch == 0)


def test_no_epochs_change_nothing() -> None:
    before = tensors(make_network())
    after, report = trained(replace(FAST, epochs=0))
    assert equal(before, after) and report.steps == 0


def test_masked_weights_stay_zero_and_others_move() -> None:
    network = make_network()
    conv = network[0]
    mask = torch.rand(conv.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        conv.weight.mul_(mask)
    conv.register_buffer("weight_mask", mask, persistent=False)
    before = conv.weight.detach().clone()
    train(network, make_split(), CrossEntropy(), replace(FAST, holdout=0))
    assert not conv.weight[~mask].any()
    assert bool((conv.weight != before)[mask].all())


@pytest.mark.parametrize(("start", "modes"), [(0.0, 0), (0.5, 9), (1.0, 18)])
def test_batch_norms_follow_until_they_are_frozen(start: float, modes: int) -> None:
    network = make_network()
    before = network[1].running_mean.clone()
    loss = CrossEntropy()
    train(
        network, make_split(), loss, replace(FAST, norms_frozen_from=start, holdout=0, epochs=2.25)
    )
    assert loss.norm_modes == [True] * modes + [False] * (18 - modes)
    assert torch.equal(network[1].running_mean, before) == (modes == 0)
    assert int(network[1].num_batches_tracked) == modes


def test_augmented_inputs_are_trained_on_and_not_numbered() -> None:
    seeds: list[int] = []

    def noise(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        seeds.append(generator.initial_seed())
        return (inputs[0] + torch.randn(inputs[0].shape, generator=generator),)

    plain, _ = trained()
    first, _ = trained(FAST, TrainingContext(augment=noise))
    again, _ = trained(FAST, TrainingContext(augment=noise))
    assert equal(first, again) and not equal(first, plain)
    assert seeds[:18] == seeds[18:] and len(set(seeds)) == 18
    loss = CrossEntropy()
    train(make_network(), make_split(), loss, FAST, TrainingContext(augment=noise))
    assert loss.samples and all(s is None for s in loss.samples)


def test_parameters_of_the_loss_are_trained_and_resumed(tmp_path: Path) -> None:
    class Shifted(FromFunction):
        def __init__(self) -> None:
            super().__init__(lambda network, batch: self.error(network, batch))
            self.extra = nn.ParameterList([torch.zeros(3)])

        def error(self, network: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(network(*batch.inputs) + self.extra[0], batch.targets)

    def run(context: TrainingContext | None = None) -> tuple[dict[str, Tensor], Tensor]:
        network, loss = make_network(), Shifted()
        train(network, make_split(), loss, FAST, context)
        return tensors(network), loss.extra[0].detach()

    whole, shift = run()
    assert bool(shift.any())
    with pytest.raises(Killed):
        run(TrainingContext(tmp_path, "me", killer(8)))
    resumed, shift_resumed = run(TrainingContext(tmp_path, "me"))
    assert equal(whole, resumed) and torch.equal(shift, shift_resumed)


def step_of(settings: TrainingSettings) -> tuple[Tensor, Tensor]:
    """Weights before and after one step on `10 * sum of weights`, whose gradient is all tens."""
    network = nn.Linear(2, 2).eval()
    before = network.weight.detach().clone()
    loss = FromFunction(lambda network, batch: 10 * network.weight.sum())
    train(network, Split(torch.zeros(4, 2)), loss, settings)
    return before, network.weight.detach()


def test_one_step_of_sgd_in_closed_form() -> None:
    """Nesterov's first step is (1 + momentum) times the gradient; decay adds a share of it."""
    settings = TrainingSettings(
        1, 0.1, 4, momentum=0.9, weight_decay=0.2, clip_norm=None, bf16=False
    )
    before, after = step_of(settings)
    torch.testing.assert_close(after, before - 0.1 * 1.9 * (10 + 0.2 * before))


def test_the_gradient_is_clipped_as_a_whole() -> None:
    settings = TrainingSettings(
        1, 0.1, 4, momentum=0.0, weight_decay=0.0, clip_norm=1.0, bf16=False
    )
    before, after = step_of(settings)
    torch.testing.assert_close(after, before - 0.1 * torch.full((2, 2), 0.5))


def test_an_infinite_loss_is_refused_with_the_remedy() -> None:
    network = make_network()
    loss = FromFunction(lambda network, batch: network(*batch.inputs).sum() * math.inf)
    with pytest.raises(PlanError, match=r"step 1 of 24, learning rate 0\.05") as caught:
        train(network, make_split(), loss, replace(FAST, holdout=0))
    assert "lower the learning rate" in str(caught.value)
    assert not network.training


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(WorkloadError, match="no samples left"):
        train(make_network(), make_split(32), CrossEntropy(), FAST)
    with pytest.raises(WorkloadError, match="Nothing of the network"):
        train(make_network().requires_grad_(False), make_split(), CrossEntropy(), FAST)
    for fields in ({"holdout": 0, "patience": 2}, {"holdout": 8, "patience": 0}):
        with pytest.raises(ConfigError, match="patience"):
            replace(FAST, **fields)


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [learning_rate_share(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert shares[10] == 1 and shares[55] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert learning_rate_share(0, 1, 0.9) == 1


def test_batches_are_whole_unless_there_is_less_than_one() -> None:
    sizes = [len(b) for b in epoch_batches(torch.arange(50), 16, 0, 0)]
    assert sizes == [16, 16, 16]
    assert [len(b) for b in epoch_batches(torch.arange(5), 16, 0, 0)] == [5]
