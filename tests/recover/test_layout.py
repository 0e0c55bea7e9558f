from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from trainable import FAST, CrossEntropy, FromFunction, make_network, make_split

from autocompress import Split
from autocompress.recover.layout import channels_last, gradients_are_safe, takes_channels_last
from autocompress.recover.training import Batch, train


class _Viewing(nn.Module):
    """Flattens by `view`, which a map of several channels and pixels refuses in channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def test_images_are_laid_out_and_nothing_else() -> None:
    for channels in (1, 3):
        image, vector = torch.randn(2, channels, 4, 5), torch.randn(2, 6)
        found, same = channels_last((image, vector))
        assert torch.equal(found, image) and same is vector
        assert found.stride() == (20 * channels, 1, 5 * channels, channels)
        # One channel must not be taken for the other layout by what comes after it.
        assert nn.Conv2d(channels, 8, 1)(found).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("kernel", "stride", "channels", "safe"),
    [(1, 2, 4, False), (1, 2, 16, True), (1, 1, 4, True), (3, 2, 4, True)],
)
def test_gradients_that_onednn_gets_wrong_are_avoided(
    kernel: int, stride: int, channels: int, safe: bool
) -> None:
    network = nn.Sequential(nn.Conv2d(channels, 8, kernel, stride)).eval()
    images = (torch.randn(2, channels, 6, 6),)
    assert gradients_are_safe(network) is takes_channels_last(network, images) is safe


def test_who_takes_channels_last() -> None:
    images = make_split().inputs
    assert takes_channels_last(make_network(), images)
    assert not takes_channels_last(_Viewing().eval(), images)
    assert not takes_channels_last(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), images)
    assert not takes_channels_last(nn.Linear(3, 3), (torch.randn(4, 3),))


def test_trainings_use_it_where_they_can() -> None:
    strides: set[bool] = set()

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        strides.add(batch.inputs[0].is_contiguous(memory_format=torch.channels_last))
        return network(*batch.inputs).square().mean()

    split = Split(make_split().inputs)
    train(make_network(), split, FromFunction(loss), FAST)
    assert strides == {True}
    strides.clear()
    report = train(_Viewing().eval(), split, FromFunction(loss), FAST)
    assert strides == {False} and report.steps == 18


def test_the_layout_leaves_weights_and_their_layout_alone() -> None:
    network = make_network()
    before = {name: x.stride() for name, x in network.named_parameters()}
    train(network, make_split(), CrossEntropy(), FAST)
    assert {name: x.stride() for name, x in network.named_parameters()} == before
