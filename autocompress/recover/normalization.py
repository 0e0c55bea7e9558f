"""Batch-norm statistics matched to a changed network, which undoes most of compression's harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from autocompress.graph.layers import NORM_TYPES

# A channel that hardly varies says nothing about how the variance has changed.
_SMALLEST_VARIANCE = 1e-10


@final
@dataclass(frozen=True)
class _Moments:
    """Mean and variance per channel of a batch norm's input, each of shape (channels,)."""

    mean: Tensor
    variance: Tensor


@final
class BatchNormRepair:
    """Re-estimates batch-norm statistics from few samples, without the noise of few samples.

    The original network is run on the same samples: how its moments there differ from its running
    statistics is sampling error, which the changed network shares. Only the *change* of the moments
    enters the new statistics (a control variate), so an unchanged network keeps its own exactly.

    Args:
        original: in evaluation mode.
        inputs: calibration inputs, n samples in dimension 0.
    """

    def __init__(self, original: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = inputs
        self._sample: dict[str, _Moments] = {}
        self._running: dict[str, _Moments] = {}
        for name, norm in _norms(original):
            mean, variance = norm.running_mean, norm.running_var
            self._running[name] = _Moments(mean.double(), variance.double())

        def observe(name: str, norm: Any, x: Tensor) -> None:
            self._sample[name] = _moments(x)

        self._run(original, observe)

    def __call__(self, network: nn.Module, kept_channels: Mapping[str, Sequence[int]]) -> None:
        """Set a changed network's statistics, layer after layer in one pass, in place.

        Args:
            network: stitched from the original; in evaluation mode.
            kept_channels: for batch norms that lost channels, the original numbers of the others.
        """

        def repair(name: str, norm: Any, x: Tensor) -> None:
            kept = list(kept_channels.get(name, range(len(self._running[name].mean))))
            sample, running = self._sample[name], self._running[name]
            base, spread = sample.mean[kept], sample.variance[kept]
            now = _moments(x)
            ratio = now.variance / spread.clamp(min=_SMALLEST_VARIANCE)
            ratio = torch.where(spread > _SMALLEST_VARIANCE, ratio, torch.ones_like(ratio))
            offset = (running.mean[kept] - base) * ratio.sqrt()
            norm.running_mean.copy_(now.mean + offset)
            norm.running_var.copy_(running.variance[kept] * ratio)

        self._run(network, repair)

    def _run(self, network: nn.Module, visit: Callable[[str, Any, Tensor], None]) -> None:
        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, args: visit(name, module, args[0])

        handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in _norms(network)]
        try:
            with torch.no_grad():
                network(*self._inputs)
        finally:
            for handle in handles:
                handle.remove()


def _norms(network: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, cast(Any, module))
        for name, module in network.named_modules()
        if isinstance(module, NORM_TYPES) and module.track_running_stats
    ]


def _moments(x: Tensor) -> _Moments:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    # Single precision is enough for a few hundred thousand values, and twice as fast.
    variance, mean = torch.var_mean(x, axes, correction=0)
    return _Moments(mean.double(), variance.double())
