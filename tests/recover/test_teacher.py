"""The teacher's outputs: computed once, the same each time, kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from trainable import make_network, make_split

from autocompress.errors import WorkloadError
from autocompress.recover import teacher as teacher_module
from autocompress.recover.recovery import RecoveryContext, recover_network
from autocompress.recover.schedule import epoch_batches, split_off
from autocompress.recover.teacher import Teacher, TeacherOutputs, chunks_in_order_of_use
from autocompress.recover.training import Batch
from autocompress.techniques.recovery import Recover

SAMPLES = 300


class _Counting(nn.Module):
    """Counts the samples that a network is run on, trials of its layout left out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x) if len(x) > 2 else 0
        return self.network(x)


def counting() -> _Counting:
    return _Counting(make_network()).eval()


def outputs_of(
    network: nn.Module, folder: Path | None = None, bf16: bool = False
) -> TeacherOutputs:
    chunks = chunks_in_order_of_use(SAMPLES, 20, 0)
    return TeacherOutputs(network, make_split(SAMPLES).inputs, chunks, folder, bf16)


@pytest.mark.parametrize(("samples", "holdout"), [(300, 20), (300, 0), (1500, 150), (5, 0)])
def test_chunks_hold_every_sample_once_and_begin_with_what_trainings_use(
    samples: int, holdout: int
) -> None:
    chunks = chunks_in_order_of_use(samples, holdout, 3)
    assert sorted(torch.cat(chunks).tolist()) == list(range(samples))
    assert max(map(len, chunks)) <= 128
    trained, held_out = split_off(samples, holdout, 3)
    assert torch.cat(chunks)[:holdout].tolist() == held_out.tolist()
    first = epoch_batches(trained, 128, 3, 0)[0]
    assert any(torch.equal(first, chunk) for chunk in chunks)


def test_outputs_are_computed_once_and_are_those_of_the_network() -> None:
    network, split = counting(), make_split(SAMPLES)
    shared = outputs_of(network)
    teacher = Teacher(network, shared)
    for first in (0, 7):
        samples = torch.arange(first, SAMPLES, 9)
        inputs = split.subset(samples).inputs
        (kept,) = teacher.outputs(Batch(inputs, None, samples))
        torch.testing.assert_close(kept, network.network(*inputs))
        assert not kept.requires_grad
    assert network.samples == SAMPLES and shared.seconds > 0
    augmented = Batch((split.inputs[0][:4] + 1,), None, None)
    torch.testing.assert_close(teacher.outputs(augmented)[0], network.network(*augmented.inputs))


def test_a_short_training_computes_only_what_it_sees() -> None:
    network, split = counting(), make_split(1500)
    chunks = chunks_in_order_of_use(1500, 150, 0)
    context = RecoveryContext(teacher_outputs=TeacherOutputs(network, split.inputs, chunks))
    report = recover_network(make_network(1), network, split, Recover(epochs=0.3), context)
    assert report.steps == 3 and network.samples == 150 + 3 * 128
    recover_network(make_network(2), network, split, Recover(epochs=0.3), context)
    assert network.samples == 150 + 3 * 128


@pytest.mark.parametrize("bf16", [False, True])
def test_numbers_depend_neither_on_who_asks_first_nor_on_the_disk(
    bf16: bool, tmp_path: Path
) -> None:
    everything = torch.arange(SAMPLES)
    one, other = (outputs_of(make_network(), tmp_path / n, bf16) for n in ("one", "other"))
    for first in range(9):
        other.of(torch.arange(SAMPLES - 1 - first, 0, -9))
    (wanted,) = one.of(everything) or []
    assert wanted.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert torch.equal(wanted, (other.of(everything) or [])[0])
    one.keep()
    again = outputs_of(make_network(), tmp_path / "one", bf16)
    assert torch.equal((again.of(everything) or [])[0], wanted) and again.seconds == 0


def test_a_part_on_disk_is_completed_and_damage_is_computed_again(tmp_path: Path) -> None:
    first = counting()
    shared = outputs_of(first, tmp_path)
    shared.of(torch.arange(3))
    shared.keep()
    (file,) = tmp_path.iterdir()
    seen = first.samples
    assert 0 < seen < SAMPLES
    second = counting()
    wanted = outputs_of(second, tmp_path).of(torch.arange(SAMPLES)) or []
    assert second.samples == SAMPLES - seen
    file.write_bytes(file.read_bytes()[:100])
    third = counting()
    found = outputs_of(third, tmp_path).of(torch.arange(SAMPLES)) or []
    assert third.samples == SAMPLES and torch.equal(found[0], wanted[0])


def test_outputs_of_other_networks_data_and_precisions_are_not_taken(tmp_path: Path) -> None:
    outputs_of(make_network(), tmp_path).keep()
    assert not list(tmp_path.iterdir())
    split = make_split(SAMPLES, seed=1)
    chunks = chunks_in_order_of_use(SAMPLES, 20, 0)
    cases = (
        outputs_of(make_network(), tmp_path),
        outputs_of(make_network(1), tmp_path),
        outputs_of(make_network(), tmp_path, bf16=True),
        TeacherOutputs(make_network(), split.inputs, chunks, tmp_path, False),
        TeacherOutputs(make_network(), make_split(SAMPLES).inputs, chunks[::-1], tmp_path, False),
    )
    for count, shared in enumerate(cases, 1):
        shared.of(torch.arange(3))
        shared.keep()
        assert len(list(tmp_path.iterdir())) == count


def test_they_are_written_by_themselves_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs_of(make_network(), tmp_path).of(torch.arange(3))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(teacher_module, "_KEEP_EVERY_S", 0.0)
    outputs_of(make_network(), tmp_path).of(torch.arange(3))
    assert len(list(tmp_path.iterdir())) == 1


def test_outputs_that_are_too_large_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "_CACHE_BYTES", SAMPLES * 3 * 4 - 1)
    network, samples = counting(), torch.arange(8)
    shared = outputs_of(network, tmp_path)
    batch = Batch(make_split(SAMPLES).subset(samples).inputs, None, samples)
    for _ in range(2):
        found = Teacher(network, shared).outputs(batch)[0]
        torch.testing.assert_close(found, make_network()(*batch.inputs))
    shared.keep()
    assert network.samples <= 128 + 2 * 8 and not list(tmp_path.iterdir())


def test_a_teacher_in_training_mode_is_refused() -> None:
    with pytest.raises(WorkloadError, match="training mode"):
        Teacher(make_network().train())
