"""How long the steps of a training may be where the network is near its teacher already."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autocompress.graph.layers import flatten_outputs
from autocompress.recover.training_types import Inputs

# A network whose outputs are off by more than this share of their variance may take full steps.
_FAR = 0.5
# Measured on a transformer whose outputs were off by 4, 14 and 48 %: a tenth, a tenth and all of
# the largest rate left the least loss after two epochs.
_POWER = 1.5
_SMALLEST = 2.0**-3
_TINY = 1e-12


def rate_share(network: nn.Module, teacher: nn.Module, inputs: Inputs) -> float:
    """The share of a learning rate that suits a network at this distance from its teacher.

    Plain gradient steps shorten by themselves where the loss is small. Those of Adam are as long
    whatever the gradient (Kingma & Ba 2015, section 2.1), and would first destroy what is there.

    Args:
        network: in evaluation mode, as is the teacher, with floating outputs of equal shapes.
        inputs: some samples to train on.

    Returns:
        A power of two up to 1: it must not depend on how sums are rounded, or a training that was
        killed would not go on.
    """
    with torch.no_grad():
        found, wanted = (flatten_outputs(each(*inputs)) for each in (network, teacher))
    errors = [
        _unexplained(one.float(), other.float())
        for one, other in zip(found, wanted, strict=True)
        if other.is_floating_point() and one.shape == other.shape
    ]
    if not errors or not all(map(math.isfinite, errors)):
        return 1.0
    share = min(1.0, (max(errors) / _FAR) ** _POWER)
    return float(2.0 ** round(math.log2(max(share, _SMALLEST))))


def _unexplained(found: Tensor, wanted: Tensor) -> float:
    """The squared error as a share of the variance over samples."""
    varies = (wanted - wanted.mean(0)).square().sum()
    return float((found - wanted).square().sum() / varies.clamp(min=_TINY))
