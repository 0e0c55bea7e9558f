"""How well two orders agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rank_correlation(
    first: Sequence[float] | NDArray[np.float64], second: Sequence[float] | NDArray[np.float64]
) -> float:
    """Spearman's rank correlation (1904); values that are equal share their mean rank.

    Args:
        first: shape (n,), n > 1, not all equal.
        second: likewise.
    """
    # Importing it takes 0.6 s and more, and only reports need it.
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
