"""The windows of convolutions and poolings: sizes, steps and padding of each spatial axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor

from autocompress.measure.runtimes.torch_graph.node import Node


@final
@dataclass(frozen=True)
class Window:
    """A sliding window, one number per spatial axis.

    Attributes:
        before: padding in front of each axis.
        after: padding behind each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether both ends of every axis are padded alike, as PyTorch's operators can."""
        return self.before == self.after

    def pad(self, x: Tensor, value: float) -> Tensor:
        """An input with its padding."""
        return F.pad(x, self.pads(), value=value)

    def pads(self) -> list[int]:
        """The padding as `torch.nn.functional.pad` takes it: the last axis first."""
        ends = zip(reversed(self.before), reversed(self.after), strict=True)
        return [pad for pair in ends for pad in pair]


def read_window(node: Node, kernel: Sequence[int]) -> Window:
    """The window that a node's attributes describe.

    Args:
        node: its first input has the shape (batch, channels, ...).
        kernel: the window's size.
    """
    sizes, rank = node.shape(0)[2:], len(kernel)
    strides = tuple(node.value("strides", [1] * rank))
    dilations = tuple(node.value("dilations", [1] * rank))
    mode = node.value("auto_pad", "NOTSET")
    pads = tuple(node.value("pads", [0] * 2 * rank))
    if mode == "VALID":
        pads = (0,) * 2 * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        totals = [
            max((-(-size // stride) - 1) * stride + span - size, 0)
            for size, stride, span in zip(sizes, strides, spans, strict=True)
        ]
        less = tuple(total // 2 for total in totals)
        more = tuple(total - small for total, small in zip(totals, less, strict=True))
        pads = (*less, *more) if mode == "SAME_UPPER" else (*more, *less)
    elif mode != "NOTSET":
        raise node.refused(f"auto_pad {mode} is not covered")
    if any(pad < 0 for pad in pads):
        raise node.refused("negative padding is not covered")
    return Window(tuple(kernel), strides, dilations, pads[:rank], pads[rank:])
