"""The memory layout of images: channels last is faster wherever a network takes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocompress.recover.training_types import Inputs

_TRIAL_SAMPLES = 2
# The widest block of channels of oneDNN's kernels, in float32 numbers of AVX-512.
_BLOCK = 16


def takes_channels_last(network: nn.Module, inputs: Inputs) -> bool:
    """Whether a network has 2-D convolutions and computes from images in channels-last layout.

    Tried on two samples, since a `view` of a map may refuse that layout. The convolutions pass
    their inputs' layout on, so the weights may stay as they are. See `gradients_are_safe`, too.

    Args:
        network: in evaluation mode; not changed.
        inputs: one tensor per network input, on the network's device.
    """
    images = any(x.ndim == 4 and x.is_floating_point() for x in inputs)
    if not images or not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return False
    if not gradients_are_safe(network):
        return False
    try:
        with torch.no_grad():
            network(*channels_last(tuple(x[:_TRIAL_SAMPLES] for x in inputs)))
    except RuntimeError:
        return False
    return True


def gradients_are_safe(network: nn.Module) -> bool:
    """Whether gradients of the weights may be taken in channels-last layout.

    For 1x1 convolutions with a stride and fewer input channels than a block oneDNN writes past its
    workspace: gradients are wrong, or the process is aborted (its issue 6035; seen with AVX2).
    """
    return not any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < _BLOCK
        for module in network.modules()
    )


def channels_last(inputs: Inputs) -> Inputs:
    """The inputs with those of shape (n, channels, height, width) copied to channels last."""
    return tuple(_copied(x) if x.ndim == 4 else x for x in inputs)


def _copied(x: Tensor) -> Tensor:
    # Not `contiguous`: with one channel it takes both layouts for the same and changes nothing.
    target = torch.empty_like(x, memory_format=torch.channels_last)
    return target.copy_(x)
