"""The metric of few samples, steadied by how far a candidate's outputs are from the original's.

On a hundred samples an accuracy is mostly luck, and the best of many candidates is the luckiest.
The outputs' loss is of all outputs, not of those alone that change the decision, and hardly changes
from one set of samples to the next. So each measured difference is drawn towards what candidates of
its loss have lost in general, the more the less certain it is: empirical Bayes estimation (Fay &
Herriot 1979, "Estimates of income for small places", section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autocompress.evaluation import CHANGED, OUTPUT_LOSS, SAMPLES, Evaluation

# With fewer candidates next to nothing is known of what a loss costs.
_FEWEST = 8
# Two samples more that gained and two that lost: a few unchanged ones do not prove certainty.
_ADDED = 4.0
# A squared distance of losses, in logarithms of their roots, at which a candidate counts half.
_NEAR = 0.1
_BINS = 64
_TINY = 1e-3

Array = NDArray[np.float64]


def steadied(evaluations: Sequence[Evaluation], original: Evaluation) -> list[Evaluation]:
    """Evaluations on the search split with steadied metrics, in the same order; all else stays.

    A metric whose uncertainty is not known stays, and so do all while there are few.

    Args:
        original: the original network on the same samples.
    """
    known = [i for i, e in enumerate(evaluations) if _is_known(e)]
    if len(known) < _FEWEST:
        return list(evaluations)
    details = [evaluations[i].details for i in known]
    lost = np.array([original.metric.value - evaluations[i].metric.value for i in known])
    losses = np.array([d[OUTPUT_LOSS] for d in details], dtype=np.float64)
    counts = np.array([d[SAMPLES] for d in details], dtype=np.float64)
    changed = np.array([d[CHANGED] for d in details], dtype=np.float64)
    found = list(evaluations)
    values = shrunk(lost, losses, (changed + _ADDED / counts) / counts)
    for i, value in zip(known, values.tolist(), strict=True):
        metric = replace(evaluations[i].metric, value=original.metric.value - value)
        found[i] = replace(evaluations[i], metric=metric)
    return found


def shrunk(lost: Array, losses: Array, variances: Array) -> Array:
    """What is lost of the metric, drawn towards `a sqrt(loss) + b loss` with a, b >= 0.

    Args:
        lost: shape (n,), as measured.
        losses: of the outputs, shape (n,), 0 or more.
        variances: of `lost`, shape (n,), positive.
    """
    roots = np.sqrt(losses)
    terms = np.stack([roots, losses], axis=1)
    weights = 1 / np.sqrt(variances)
    factors, _ = nnls(terms * weights[:, None], lost * weights)
    expected = terms @ factors
    # By how much candidates of about that loss really differ.
    left = np.square(lost - expected) - variances
    spread = np.maximum(_near_mean(np.log(roots + _TINY), left), 0.0)
    result: Array = expected + spread / (spread + variances) * (lost - expected)
    return result


def _near_mean(places: Array, values: Array) -> Array:
    """Means of values with weights that fall with the distance of places; both shape (n,)."""
    # Of bins, not of all pairs: a long search has thousands of candidates.
    edges = np.linspace(places.min(), places.max() + _TINY, _BINS + 1)
    bins = np.clip(np.digitize(places, edges) - 1, 0, _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    sums = np.bincount(bins, values, minlength=_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    near = 1 / (np.square(places[:, None] - centres[None]) + _NEAR)
    result: Array = (near @ sums) / (near @ counts)
    return result


def _is_known(evaluation: Evaluation) -> bool:
    return OUTPUT_LOSS in evaluation.details and CHANGED in evaluation.details
