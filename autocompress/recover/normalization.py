"""Batch-norm statistics re-estimated for a changed network, which undoes most of its harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from autocompress.graph.layers import NORM_TYPES, flatten_outputs
from autocompress.recover.autocast import takes_bf16

# Mean and variance.
Moments = tuple[Tensor, Tensor]
# Where the estimate for a channel's variance falls below this share of the sample's, the sample's
# own is taken: the control variate may overshoot on a channel that has little in common with it.
_SMALLEST_SHARE = 0.25
_TINY = 1e-12
# Of float32 sums seven digits are right: a variance below this share of the moment has too few.
_LOST_SHARE = 1e-3
_BATCH = 128


@final
@dataclass(frozen=True)
class _Observed:
    """First and second moment of a batch norm's input, per sample and channel: (n, channels)."""

    first: Tensor
    second: Tensor

    @property
    def variance(self) -> Tensor:
        """The variance that belongs to moments over all samples."""
        return self.second - self.first.square()


@final
class BatchNormRepair:
    """Re-estimates batch-norm statistics from few samples with the accuracy of many.

    The original network's moments over all samples are taken once. For a changed network, run on
    the first few samples only, they are control variates (Lavenberg & Welch 1981): the estimate is
    `m + b (m0_all - m0)` with the changed network's sample moment m, the original's m0 on the same
    samples, and the regression coefficient b between the two over the samples.

    A norm then gets statistics that give its output the moments that it had in the original:
    standard deviation and offset from the mean keep their ratio to the data's. Data to calibrate
    on need not be like those to train on, and a network that was not changed stays as it is.

    Args:
        original: in evaluation mode.
        inputs: calibration inputs in dimension 0.
        samples: how many of them a changed network is run on.
        bf16: whether to run networks under autocast, which changes moments by less than a
            thousandth.
    """

    def __init__(
        self,
        original: nn.Module,
        inputs: tuple[Tensor, ...],
        samples: int,
        *,
        bf16: bool = False,
    ) -> None:
        self._bf16 = bf16
        self._inputs = tuple(x[:samples] for x in inputs)
        self._running = {
            name: (norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in _norms(original)
        }
        self._before: dict[str, _Observed] = {}
        self._all: dict[str, _Observed] = {}
        batches: dict[str, list[_Observed]] = {}

        def keep(name: str, norm: Any, x: Tensor) -> None:
            batches.setdefault(name, []).append(_observe(x))

        starts = range(0, len(inputs[0]), _BATCH)
        for start in starts:
            _run(original, tuple(x[start : start + _BATCH] for x in inputs), keep, bf16=bf16)
        for name, parts in batches.items():
            if len(parts) != len(starts):
                # Called several times a pass, a norm has no moments of its own: it is left alone.
                continue
            first = torch.cat([part.first for part in parts])
            second = torch.cat([part.second for part in parts])
            # A norm may see several rows of each sample.
            rows = len(first) * len(self._inputs[0]) // len(inputs[0])
            self._before[name] = _Observed(first[:rows], second[:rows])
            self._all[name] = _Observed(first.mean(0), second.mean(0))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The samples that a changed network is run on."""
        return self._inputs

    def __call__(
        self,
        network: nn.Module,
        kept_channels: Mapping[str, Sequence[int]],
        beside: tuple[Tensor, ...] = (),
    ) -> list[Tensor]:
        """Set a changed network's statistics, layer after layer in one pass, in place.

        Args:
            network: stitched from the original; in evaluation mode.
            kept_channels: for batch norms that lost channels, the original numbers of the others.
            beside: further samples, which pass the repaired norms and have no say in them.

        Returns:
            The repaired network's outputs as a flat list, for `inputs` and then for `beside`.
        """
        own = len(self._inputs[0])
        inputs = self._inputs
        if beside:
            inputs = tuple(torch.cat(pair) for pair in zip(inputs, beside, strict=True))
        rows = len(inputs[0])

        def repair(name: str, norm: Any, x: Tensor) -> None:
            if name not in self._all:
                return
            true, before = self._all[name], self._before[name]
            kept = list(kept_channels.get(name, range(len(true.first))))
            now = _observe(x[: len(x) * own // rows])
            mean = _controlled(now.first, before.first[:, kept], true.first[kept])
            second = _controlled(now.second, before.second[:, kept], true.second[kept])
            sample = now.second.mean(0) - now.first.mean(0).square()
            variance = second - mean.square()
            sound = variance > _SMALLEST_SHARE * sample
            mean = torch.where(sound, mean, now.first.mean(0))
            variance = torch.where(sound, variance, sample)
            running = tuple(value[kept] for value in self._running[name])
            known = (true.first[kept], true.variance[kept])
            new_mean, new_variance = following(running, known, (mean, variance))
            norm.running_mean.copy_(new_mean)
            norm.running_var.copy_(new_variance)

        # A candidate may hand bf16 on where the original gave fp32.
        return _run(network, inputs, repair, bf16=self._bf16 and takes_bf16(network, inputs))


def _run(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    visit: Callable[[str, Any, Tensor], None],
    *,
    bf16: bool,
) -> list[Tensor]:
    """Run a network and visit each batch norm just before it does its work; its outputs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: visit(name, module, args[0])

    handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in _norms(network)]
    try:
        with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16, bf16):
            return flatten_outputs(network(*inputs))
    finally:
        for handle in handles:
            handle.remove()


def _norms(network: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, cast(Any, module))
        for name, module in network.named_modules()
        if isinstance(module, NORM_TYPES) and module.track_running_stats
    ]


def _observe(x: Tensor) -> _Observed:
    first, variance = moments(x)
    return _Observed(first, variance + first.square())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over positions, each of shape (n, channels), float64.

    Args:
        x: shape (n, channels, ...).
    """
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    first = flat.mean(2, dtype=torch.float32).double()
    second = _squares(flat).double() / flat.shape[2]
    variance = second - first.square()
    # Small variances around large means are lost in float32: these channels are centred first.
    lost = (variance < _LOST_SHARE * second).any(0).nonzero()[:, 0]
    if len(lost):
        variance[:, lost] = flat[:, lost].float().var(2, correction=0).double()
    return first, variance


def following(running: Moments, known: Moments, now: Moments) -> Moments:
    """Statistics that give a norm's output the moments that it had.

    Args:
        running: the norm's own mean and variance; shapes (channels,), or such that they broadcast.
        known: those of its input before a change.
        now: those of its input now.
    """
    (mean, variance), (known_mean, known_variance), (now_mean, now_variance) = running, known, now
    scale = _scale(now_variance, known_variance)
    # A channel that used not to vary has no ratio: what it varies by now comes on top.
    followed = torch.where(
        known_variance > _TINY, variance * scale.square(), variance + now_variance
    )
    return now_mean + (mean - known_mean) * scale, followed


def _squares(flat: Tensor) -> Tensor:
    """Sums of squares over dimension 2, in float32."""
    if flat.stride(2) == 1:
        norm: Tensor = torch.linalg.vector_norm(flat, dim=2, dtype=torch.float32)
        return norm.square()
    # With channels last the norm is four times as slow as squares that are written down.
    squares = flat.square() if flat.dtype == torch.float32 else flat.float().square_()
    return squares.sum(2)


def _scale(now: Tensor, before: Tensor) -> Tensor:
    """The ratio of two standard deviations; one for channels that do not vary."""
    varies = (before > _TINY) & (now > _TINY)
    return torch.where(varies, now / before.clamp(min=_TINY), torch.ones_like(now)).sqrt()


def _controlled(values: Tensor, control: Tensor, true: Tensor) -> Tensor:
    """The mean of values, shape (n, c), improved by a control of known mean, shape (c,)."""
    centred = control - control.mean(0)
    covariance = ((values - values.mean(0)) * centred).sum(0)
    coefficient = covariance / centred.square().sum(0).clamp(min=_TINY)
    return values.mean(0) + coefficient * (true - control.mean(0))
