from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from trainable import FAST, CrossEntropy, Killed, equal, killer, make_network, make_split, tensors

from autocompress.errors import PlanError
from autocompress.recover.codebook_tuning import shared_codebooks, tune_codebooks
from autocompress.recover.recovery import RecoveryContext
from autocompress.recover.training import TrainingReport, train
from autocompress.techniques.codebook_tuning import TuneCodebooks
from autocompress.workload import Padding


def add_codebook(layer: nn.Module, words: int, width: int, zero: bool = True) -> None:
    """A random codebook with, if wanted, a word of zeros, and the weight that it gives."""
    generator = torch.Generator().manual_seed(words)
    weight = layer.weight
    codes = torch.randint(
        words, (len(weight), weight[0].numel() // width), generator=generator, dtype=torch.int16
    )
    codebook = 0.4 * torch.randn(words, width, generator=generator)
    if zero:
        codebook[1] = 0
    layer.register_buffer("codebook", codebook, persistent=False)
    layer.register_buffer("codes", codes, persistent=False)
    with torch.no_grad():
        weight.copy_(looked_up(layer))


def looked_up(layer: nn.Module) -> Tensor:
    return layer.codebook[layer.codes.long()].reshape(layer.weight.shape)


def coded_network() -> nn.Module:
    network = make_network(dropout=0)
    add_codebook(network[0], 5, 3)
    add_codebook(network[4], 4, 1)
    return network


def tune(network: nn.Module, context: RecoveryContext | None = None) -> TrainingReport:
    decision = TuneCodebooks(epochs=8, learning_rate=0.05)
    return tune_codebooks(network, make_network(1), make_split(512), decision, context)


@pytest.mark.parametrize("width", [1, 3])
def test_a_codewords_gradient_is_the_sum_over_its_places(width: int) -> None:
    layer = nn.Conv2d(3, 4, 3)
    add_codebook(layer, 5, width, zero=False)
    codebook, codes = layer.codebook.clone(), layer.codes.long()
    outer = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    with shared_codebooks(layer):
        assert torch.equal(layer.weight, looked_up(layer))
        (layer.weight * outer).sum().backward()
        found = layer.parametrizations.weight.original.grad
    pieces = outer.reshape(*codes.shape, width)
    wanted = torch.stack([pieces[codes == word].sum(0) for word in range(5)])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(layer.codebook, codebook)


def test_a_scale_per_row_is_kept_and_counts_in_the_sum() -> None:
    layer = nn.Linear(6, 4)
    add_codebook(layer, 5, 2, zero=False)
    scale = torch.tensor([[0.5], [1.0], [2.0], [-3.0]])
    layer.register_buffer("weight_scale", scale.clone(), persistent=False)
    outer = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with shared_codebooks(layer):
        (layer.weight * outer).sum().backward()
        found = layer.parametrizations.weight.original.grad
    pieces = (scale * outer).reshape(4, 3, 2)
    wanted = torch.stack([pieces[layer.codes.long() == word].sum(0) for word in range(5)])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(layer.weight, scale * looked_up(layer))
    assert torch.equal(layer.weight_scale, scale)


def test_no_epochs_are_the_identity() -> None:
    network = coded_network()
    before = tensors(network)
    split = make_split()
    assert tune_codebooks(network, make_network(), split, TuneCodebooks(epochs=0)).steps == 0
    assert equal(before, tensors(network))


def test_layers_have_plain_weights_of_the_trained_codebook_afterwards() -> None:
    network = coded_network()
    before, kinds = tensors(network), [type(m) for m in network]
    weights = [network[i].weight for i in (0, 4)]
    report = tune(network)
    after = tensors(network)
    assert report.best_epoch > 0 and after.keys() == before.keys()
    assert [type(m) for m in network] == kinds
    for layer, weight in zip((network[0], network[4]), weights, strict=True):
        assert layer.weight is weight and isinstance(weight, nn.Parameter)
        assert weight.is_leaf and weight.grad is None and weight.requires_grad
        assert not parametrize.is_parametrized(layer)
        assert torch.equal(layer.weight, looked_up(layer))
        assert not torch.equal(layer.codebook, before[f"{list(network).index(layer)}.codebook"])
    assert torch.equal(after["0.codes"], before["0.codes"])
    assert not torch.equal(after["8.weight"], before["8.weight"])


def test_zeros_of_a_codebook_stay_zero() -> None:
    network = coded_network()
    with torch.no_grad():
        network[0].codebook[2, 1] = 0
    zeros = network[0].codebook == 0
    assert int(zeros.sum()) == 4
    tune(network)
    assert torch.equal(network[0].codebook == 0, zeros)
    assert torch.equal(network[0].weight == 0, zeros[network[0].codes.long()].reshape(6, 3, 3, 3))


def test_a_mask_of_a_coded_layer_is_left_to_its_codebook() -> None:
    network = coded_network()
    network[4].register_buffer("weight_mask", network[4].weight != 0, persistent=False)
    tune(network)
    assert torch.equal(network[4].weight, looked_up(network[4]))
    assert torch.equal(network[4].weight != 0, network[4].weight_mask)


def test_a_killed_tuning_goes_on_and_leaves_plain_weights_behind(tmp_path: Path) -> None:
    whole = coded_network()
    tune(whole)
    killed = coded_network()
    with pytest.raises(Killed):
        tune(killed, RecoveryContext(0, tmp_path, killer(9)))
    assert torch.equal(killed[0].weight, looked_up(killed[0]))
    assert not any(parametrize.is_parametrized(m) for m in killed)
    resumed = coded_network()
    tune(resumed, RecoveryContext(0, tmp_path))
    assert equal(tensors(whole), tensors(resumed))


def test_checkpoints_of_other_codes_are_not_taken(tmp_path: Path) -> None:
    context = RecoveryContext(folder=tmp_path)
    tune(coded_network(), context)
    network = coded_network()
    network[4].codes.copy_(network[4].codes.flip(0))
    tune(network, context)
    assert len(list(tmp_path.iterdir())) == 2
    # Nor those of other batches.
    tune(coded_network(), replace(context, padding=Padding((None,))))
    assert len(list(tmp_path.iterdir())) == 3


def test_two_threads_sum_gradients_in_one_order() -> None:
    """Plain indexing adds in any order when there are threads; a codebook's sums are large."""
    layer = nn.Linear(1000, 1000)
    add_codebook(layer, 16, 1)
    outer = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        with shared_codebooks(layer):
            for _ in range(3):
                layer.zero_grad()
                (layer.weight * outer).sum().backward()
                found.append(layer.parametrizations.weight.original.grad.clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_codebooks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match="No layer"):
        tune(make_network())
    for name, value in (
        ("codes", torch.full((4, 6), 4)),
        ("codes", torch.full((4, 6), -1)),
        ("codes", torch.zeros(4, 5, dtype=torch.long)),
        ("codes", torch.zeros(4, 6)),
        ("codebook", torch.zeros(4, 2)),
        ("codebook", torch.zeros(4, 1, dtype=torch.float64)),
    ):
        network = coded_network()
        setattr(network[4], name, value)
        with pytest.raises(PlanError, match="does not fit") as caught, shared_codebooks(network):
            pass
        assert "codes (4, 6 / d)" in str(caught.value)
        assert not any(parametrize.is_parametrized(m) for m in network)


def test_masks_of_parametrized_weights_of_equal_shape_hold() -> None:
    """Such as those of quantization-aware training."""

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    network = make_network()
    mask = torch.rand(network[0].weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        network[0].weight.mul_(mask)
    network[0].register_buffer("weight_mask", mask, persistent=False)
    parametrize.register_parametrization(network[0], "weight", Double())
    train(network, make_split(), CrossEntropy(), FAST)
    assert not network[0].weight[~mask].any() and network[0].weight[mask].all()
