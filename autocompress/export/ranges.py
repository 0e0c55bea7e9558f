"""Calibration: from values that a tensor was seen to have to the integer grid that stands for it.

Every method picks a real interval around zero; the grid spreads its integers over that interval
evenly, and zero is always exact. A signed grid is the unsigned one shifted by half its integers,
so both stand for the same real numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import ExportError

CALIBRATIONS = ("minmax", "percentile", "mse", "entropy")
# Shares of the observed range that are tried as the representable one; of so many values.
_CLIP_RATIOS = np.linspace(0.5, 1.0, 26)
_MSE_VALUES = 3_000
# Share of the values that lie below the upper end, and above the lower one.
_PERCENTILE = 0.9999
_HISTOGRAM_BINS = 2048
_HISTOGRAM_STEP = 8
_LEAST_COUNT = 1e-4
_SMALLEST_SCALE = 1e-12


@final
@dataclass(frozen=True)
class Observed:
    """Values of one tensor on calibration data.

    Attributes:
        low: the smallest of all values, or 0 if that is smaller.
        high: the largest of all values, or 0 if that is larger.
        sample: some of the values, shape (n,), float32.
    """

    low: float
    high: float
    sample: NDArray[np.float32]


@final
@dataclass(frozen=True)
class Grid:
    """Evenly spaced numbers `scale * (integer - zero_point)`."""

    scale: np.float32
    zero_point: int
    bits: int
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the integers."""
        return np.dtype(f"{'int' if self.signed else 'uint'}{self.bits}")

    @property
    def integers(self) -> tuple[int, int]:
        """The smallest and the largest."""
        information = np.iinfo(self.dtype)
        return int(information.min), int(information.max)

    def with_sign(self, signed: bool) -> Grid:
        """The same real numbers by signed or unsigned integers."""
        shift = 2 ** (self.bits - 1) * (int(self.signed) - int(signed))
        return Grid(self.scale, self.zero_point + shift, self.bits, signed)


def find_grid(observed: Observed, calibration: str, bits: int) -> Grid:
    """The grid of unsigned integers of a tensor by one of the `CALIBRATIONS`.

    Args:
        bits: 8 or 16.

    Raises:
        ExportError: an unknown calibration, or values that are not finite.
    """
    if not np.isfinite([observed.low, observed.high]).all():
        raise ExportError(
            "A tensor has values that are not finite on calibration data.",
            given=f"values from {observed.low} to {observed.high}",
            advice="leave the layer in floating point",
        )
    if calibration == "minmax":
        interval = observed.low, observed.high
    elif calibration == "percentile":
        interval = percentile_interval(observed)
    elif calibration == "mse":
        interval = mse_interval(observed, bits)
    elif calibration == "entropy":
        interval = entropy_interval(observed, bits)
    else:
        raise ExportError(
            "No such calibration.", given=calibration, allowed=", ".join(CALIBRATIONS)
        )
    scale, zero_point = _spread(*interval, bits)
    return Grid(np.float32(scale), zero_point, bits, signed=False)


def percentile_interval(observed: Observed) -> tuple[float, float]:
    """From the 0.01th to the 99.99th percentile (Wu et al. 2020, arXiv:2004.09602, section 3.3)."""
    low, high = np.quantile(observed.sample.astype(np.float64), [1 - _PERCENTILE, _PERCENTILE])
    return min(float(low), 0.0), max(float(high), 0.0)


def mse_interval(observed: Observed, bits: int) -> tuple[float, float]:
    """The share of the observed interval with the least squared error, by grid search."""
    sample, weight = _thinned(observed)
    errors = []
    for ratio in _CLIP_RATIOS.tolist():
        scale, zero_point = _spread(observed.low * ratio, observed.high * ratio, bits)
        rounded = sample / scale
        np.rint(rounded, out=rounded)
        np.clip(rounded, -zero_point, 2**bits - 1 - zero_point, out=rounded)
        rounded *= scale
        rounded -= sample
        errors.append(float(weight @ np.square(rounded, out=rounded)))
    ratio = float(_CLIP_RATIOS[int(np.argmin(errors))])
    return observed.low * ratio, observed.high * ratio


def _thinned(observed: Observed) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fewer values, and of how many each stands for one.

    Values that some interval cuts off decide, and are few: they are thinned apart from the others.
    """
    values = observed.sample
    least = float(_CLIP_RATIOS[0])
    cut = (values > least * observed.high) | (values < least * observed.low)
    parts, weights = [], []
    for part in (values[cut], values[~cut]):
        stride = max(1, len(part) // _MSE_VALUES)
        parts.append(part[::stride].astype(np.float64))
        weights.append(np.full(len(parts[-1]), float(stride)))
    return np.concatenate(parts), np.concatenate(weights)


def entropy_interval(observed: Observed, bits: int) -> tuple[float, float]:
    """The share of the observed interval that changes the distribution of values least.

    After Migacz, "8-bit inference with TensorRT" (GTC 2017): a histogram of 2048 bins is cut at
    both ends, what was cut is added to the outermost bins kept, and the bins are merged to as many
    as there are integers. The cut with the least Kullback-Leibler divergence between the two is
    taken. There the interval is symmetric; here both ends keep their proportion, as zero must be
    exact. Zeros themselves are left out, since no grid loses them. With more integers than bins
    nothing is cut.
    """
    values = observed.sample[observed.sample != 0]
    low, high, levels = observed.low, observed.high, 2**bits
    if values.size == 0 or levels >= _HISTOGRAM_BINS or high - low < _SMALLEST_SCALE:
        return low, high
    histogram, _ = np.histogram(values, bins=_HISTOGRAM_BINS, range=(low, high))
    zero = -low / (high - low) * _HISTOGRAM_BINS
    best, best_divergence = 1.0, np.inf
    for kept in range(levels, _HISTOGRAM_BINS + 1, _HISTOGRAM_STEP):
        ratio = kept / _HISTOGRAM_BINS
        start = min(round(zero * (1 - ratio)), _HISTOGRAM_BINS - kept)
        divergence = _divergence(histogram, start, start + kept, levels)
        # The widest of equals: a wider interval loses no outlier.
        if divergence <= best_divergence:
            best, best_divergence = ratio, divergence
    return low * best, high * best


def _divergence(histogram: NDArray[np.int64], start: int, stop: int, levels: int) -> float:
    """KL(cut ‖ merged) of bins `start` to `stop`, in nats."""
    inside = histogram[start:stop].astype(np.float64)
    cut = inside.copy()
    cut[0] += histogram[:start].sum()
    cut[-1] += histogram[stop:].sum()
    level = np.arange(len(inside)) * levels // len(inside)
    filled = inside > 0
    mass = np.bincount(level, inside, levels)
    bins = np.bincount(level, filled.astype(np.float64), levels)
    merged = np.where(filled, mass[level] / np.maximum(bins[level], 1), 0.0)
    seen = cut > 0
    # An outermost bin may hold outliers alone, which the merged histogram does not know.
    smoothed = np.maximum(merged[seen], _LEAST_COUNT)
    p, q = cut[seen] / cut.sum(), smoothed / smoothed.sum()
    return float((p * np.log(p / q)).sum())


def _spread(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of the unsigned grid over an interval that holds zero."""
    largest = 2**bits - 1
    scale = max((high - low) / largest, _SMALLEST_SCALE)
    return scale, int(np.clip(np.round(-low / scale), 0, largest))
