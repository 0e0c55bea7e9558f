"""What is padding, and what is made of samples without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.bank import Bank
from autocompress.bank.gradients import collect_gradients
from autocompress.bank.observations import Counter
from autocompress.bank.usage import count_usage
from autocompress.config import CalibrationSettings
from autocompress.graph import trace
from autocompress.plan import Plan, Step
from autocompress.recover import Trainer
from autocompress.recover.normalization import BatchNormRepair
from autocompress.recover.recovery import (
    RecoveryContext,
    find_teacher_outputs,
    recover_network,
)
from autocompress.recover.schedule import epoch_batches
from autocompress.search.prepare import data_identity
from autocompress.techniques import NETWORK
from autocompress.techniques.recovery import Recover
from autocompress.workload import NO_PADDING, Padding, Split, Workload, find_padding

WORDS, LENGTH, WIDTH = 30, 12, 8
PADDED = Padding((1, 1))
FOUND = Padding((1, 1), shortest=2)
AXES = ({1: "length"}, {1: "length"})


class Reader(nn.Module):
    """Class scores of texts; what is masked has no say unless `leaky`."""

    def __init__(self, *, leaky: bool = False, per_token: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.norm, self.inner, self.head = (
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        )  # fmt: skip
        self.leaky, self.per_token = leaky, per_token

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.inner(self.norm(self.table(tokens))).relu()
        if self.per_token:
            return self.head(hidden)
        weight = torch.ones_like(mask) if self.leaky else mask
        weight = weight.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


class Fixed(Reader):
    """Needs the full length."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        assert tokens.shape[1] == LENGTH
        return super().forward(tokens, mask)


class AtLeastFour(Reader):
    """Needs a few words, as one with a convolution over them does."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        assert tokens.shape[1] >= 4
        return super().forward(tokens, mask)


def reader(kind: type[Reader] = Reader, **how: bool) -> Reader:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**how).eval()


def texts(count: int = 70, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return texts_of(torch.randint(1, LENGTH // 2, (count,), generator=generator).tolist(), seed)


def texts_of(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """So many words each, no two of them alike in a row."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, WORDS - 1, (len(lengths), 1), generator=generator)
    tokens = 1 + (first + torch.arange(LENGTH) * 7) % (WORDS - 1)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_one_position_of_the_padding_stays(lengths: list[int], seed: int) -> None:
    wanted = torch.tensor(lengths)
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(LENGTH) < wanted[:, None]).long()
    tokens = torch.randint(1, WORDS, mask.shape, generator=generator) * mask
    # A text of full length may end in equal words: where it does, one of them stays as well.
    tokens[:, -2] += WORDS * mask[:, -2]
    assert PADDED.lengths((tokens, mask)).tolist() == [min(n + 1, LENGTH) for n in lengths]
    cut = PADDED.cut((tokens, mask))
    longest = min(max(lengths) + 1, LENGTH)
    for before, after in zip((tokens, mask), cut, strict=True):
        assert torch.equal(after, before[:, :longest])


def test_batches_hold_every_sample_once_by_rising_length() -> None:
    inputs = texts()
    batches = list(PADDED.batches(inputs, 16))
    assert [len(tokens) for tokens, _ in batches] == [16, 16, 16, 16, 6]
    widths = [tokens.shape[1] for tokens, _ in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1] < LENGTH
    found = [
        tokens[mask.bool()].tolist() for t, m in batches for tokens, mask in zip(t, m, strict=True)
    ]
    wanted = [tokens[mask.bool()].tolist() for tokens, mask in zip(*inputs, strict=True)]
    assert sorted(found) == sorted(wanted)
    plain = list(NO_PADDING.batches(inputs, 16))
    assert torch.equal(torch.cat([tokens for tokens, _ in plain]), inputs[0])
    assert NO_PADDING.cut(inputs) is inputs and NO_PADDING.positions(inputs) == 70


def test_padding_is_found_where_outputs_do_not_depend_on_it() -> None:
    inputs = texts()
    assert find_padding(reader(), inputs, AXES) == FOUND
    for other in (reader(leaky=True), reader(per_token=True), reader(Fixed)):
        assert find_padding(other, inputs, AXES) == NO_PADDING
    assert find_padding(reader(), inputs, ()) == NO_PADDING
    full = torch.randint(1, WORDS, (20, LENGTH)), torch.ones(20, LENGTH, dtype=torch.long)
    assert find_padding(reader(), full, AXES) == NO_PADDING


MIXED = [LENGTH // 2 if i % 7 == 6 else LENGTH for i in range(210)]


@pytest.mark.parametrize(
    "lengths",
    [
        # Few of the first are short, so that batches of them would hold a full one each.
        MIXED,
        [LENGTH // 2, *[LENGTH] * 7],
        # Texts without words: their mean is that of any of their positions.
        [0 if i % 7 == 6 else LENGTH for i in range(210)],
    ],
)
def test_what_depends_on_padding_is_found_out_by_the_short_samples(lengths: list[int]) -> None:
    for other in (reader(leaky=True), reader(per_token=True), reader(Fixed)):
        assert find_padding(other, texts_of(lengths), AXES) == NO_PADDING


def test_padding_is_found_where_few_samples_have_any() -> None:
    half = replace(PADDED, shortest=LENGTH // 2 + 1)
    assert find_padding(reader(), texts_of(MIXED), AXES) == half
    assert find_padding(reader(), texts_of([LENGTH // 2, *[LENGTH] * 7]), AXES) == half


def test_samples_of_all_lengths_are_tried() -> None:
    """The shortest alone would suit a network that takes even lengths only."""

    class Even(Reader):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            assert tokens.shape[1] % 2 == 0
            return super().forward(tokens, mask)

    assert find_padding(reader(Even), texts_of([3] * 40 + [4] * 20), AXES) == NO_PADDING
    assert find_padding(reader(Even), texts_of([3] * 40 + [5] * 20), AXES).axes == (1, 1)


def test_no_batch_is_cut_to_less_than_what_was_tried() -> None:
    network = reader(AtLeastFour)
    padding = find_padding(network, texts_of([3, 5, 7, LENGTH] * 10), AXES)
    assert padding == replace(PADDED, shortest=4)
    shorter = texts_of([1, 2, 2, 1, 1, 5])
    assert padding.lengths(shorter).tolist() == [4, 4, 4, 4, 4, 6]
    wanted = network(*shorter)
    batches = zip(padding.batches(shorter, 2), padding.parts(shorter, 2), strict=True)
    for batch, part in batches:
        torch.testing.assert_close(network(*batch), wanted[part])
    # Statistics and outputs on disk are of batches as they were cut.
    assert padding.key != PADDED.key and NO_PADDING.key == ()
    # What is shorter as a whole stays whole.
    whole = tuple(x[:, :3] for x in shorter)
    assert padding.cut(whole)[0].shape == (6, 3)
    # A network that does not take the shortest sample gets all of them whole.
    assert find_padding(network, texts_of([2, 5, 7, LENGTH] * 10), AXES) == NO_PADDING


def test_words_behind_padding_are_never_cut() -> None:
    tokens, mask = (x.flip(1) for x in texts_of(MIXED))
    for network in (reader(), reader(leaky=True)):
        assert find_padding(network, (tokens, mask), AXES) == NO_PADDING
        # Ends of equal words look like padding.
        again = tokens.clone()
        again[:, -LENGTH // 2 :] = tokens[:, -1:]
        assert PADDED.lengths((again, mask)).double().mean() < 0.9 * LENGTH
        assert find_padding(network, (again, mask), AXES) == NO_PADDING


def test_statistics_leave_padding_out(tmp_path: Path) -> None:
    network, inputs = reader(), texts()
    graph = trace(network, tuple(x[:2] for x in inputs))
    whole = Bank(network, graph, 1, tmp_path / "whole")
    whole.calibrate(inputs, CalibrationSettings(rows_per_layer=10**6))
    bank = Bank(network, graph, 1, tmp_path / "cut")
    bank.calibrate(inputs, CalibrationSettings(rows_per_layer=10**6), Counter(), PADDED)
    # By hand: each text's words and, in a batch with longer ones, what is filled up.
    rows = [
        network.norm(network.table(tokens)).reshape(-1, WIDTH)
        for tokens, _ in PADDED.batches(inputs, 64)
    ]
    x = torch.cat(rows).detach().double()
    found, before = bank.statistics("inner"), whole.statistics("inner")
    assert found is not None and before is not None
    torch.testing.assert_close(found.moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before.moment, found.moment, rtol=1e-2)
    # What is told apart by nothing but the padding must not be mixed up on disk.
    again = Bank(network, graph, 1, tmp_path / "cut")
    again.calibrate(inputs, CalibrationSettings(rows_per_layer=10**6))
    kept = again.statistics("inner")
    assert kept is not None and torch.equal(kept.moment, before.moment)


def test_gradients_stay_as_they_are_and_usage_counts_words() -> None:
    network, inputs = reader(), texts()
    layers = trace(network, tuple(x[:2] for x in inputs)).layers
    counts = count_usage(network, layers, inputs, PADDED)["table"]
    whole = count_usage(network, layers, inputs)["table"]
    assert torch.equal(counts[1:], whole[1:])
    assert 0 < counts[0] < whole[0]
    # Padding has no gradients; labels are drawn in another order, so few samples are too few.
    several = tuple(x.repeat(40, 1) for x in inputs)
    found = collect_gradients(network, layers, several, lambda: None, PADDED)
    wanted = collect_gradients(network, layers, several)
    for name, one in found.items():
        torch.testing.assert_close(one.fisher.sum(), wanted[name].fisher.sum(), rtol=0.1, atol=0)


def test_batches_of_a_training_hold_samples_of_about_the_same_length() -> None:
    lengths = PADDED.lengths(texts(2000))
    samples = torch.arange(2000)
    batches = epoch_batches(samples, 32, 0, 0, lengths)
    plain = epoch_batches(samples, 32, 0, 0)
    assert [len(b) for b in batches] == [32] * 62
    # The same samples, so that a teacher's outputs are asked for in the same order.
    for start in range(0, 62, 16):
        parts = [torch.cat(list(b[start : start + 16])).sort().values for b in (batches, plain)]
        assert torch.equal(*parts)

    def positions(some: tuple[Tensor, ...]) -> float:
        return sum(float(lengths[b].max()) for b in some) / len(some)

    assert positions(batches) < 0.75 * positions(plain)
    widths = [int(lengths[b].max()) for b in batches[:16]]
    assert widths != sorted(widths)
    assert not torch.equal(batches[0], epoch_batches(samples, 32, 0, 1, lengths)[0])


def test_a_teacher_says_the_same_without_padding() -> None:
    network, split = reader(), Split(texts(300))
    samples = torch.tensor([3, 299, 0])
    plain, cut = (
        find_teacher_outputs(network, split, RecoveryContext(bf16=False, padding=padding))
        for padding in (NO_PADDING, PADDED)
    )
    (wanted,), (found,) = plain.of(samples) or [], cut.of(samples) or []
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", ["response", "feature"])
def test_trainings_see_cut_batches(method: str) -> None:
    network, split = reader(), Split(texts(300))
    teacher, widths = reader(), []
    network.head.weight.data.mul_(0.5)
    handle = network.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    recover_network(
        network, teacher, split, Recover(epochs=1.0, method=method),
        RecoveryContext(bf16=False, padding=PADDED),
    )  # fmt: skip
    handle.remove()
    # Maps of features are looked for at full length, once.
    assert widths.count(LENGTH) <= 1 and len(set(widths)) > 2


def test_a_training_with_padding_goes_on_from_none_without(tmp_path: Path) -> None:
    for padding in (NO_PADDING, PADDED):
        context = RecoveryContext(bf16=False, folder=tmp_path, padding=padding)
        recover_network(reader(), reader(), Split(texts(64)), Recover(epochs=0.5), context)
    assert len(list(tmp_path.iterdir())) == 2


def make_workload() -> Workload:
    some = Split(texts(8))
    return Workload(
        network=reader(), example_inputs=texts(1), calibration=some, train=some,
        search_split=some, test_split=some, metric="agreement",
    )  # fmt: skip


def test_what_was_trained_with_padding_is_not_taken_without(tmp_path: Path) -> None:
    plain = make_workload()
    bank = Bank(plain.network, trace(plain.network, plain.example_inputs), 1, tmp_path)
    repair = BatchNormRepair(plain.network, plain.calibration.inputs, 4)
    plan = Plan((Step(NETWORK, Recover(epochs=0.5)),))
    files = [
        Trainer(bank, repair, each, tmp_path).files(plain.network, plan)
        for each in (plain, replace(plain, padding=PADDED))
    ]
    assert files[0] != files[1] and len(files[0]) == len(files[1]) == 1


def test_a_run_with_other_open_axes_is_another_one() -> None:
    plain = make_workload()
    one, both = replace(plain, dynamic_axes=({1: "length"}, {})), replace(plain, dynamic_axes=AXES)
    assert len({data_identity(each) for each in (plain, one, both)}) == 3
    assert data_identity(replace(plain, dynamic_axes=({}, {}))) == data_identity(plain)
