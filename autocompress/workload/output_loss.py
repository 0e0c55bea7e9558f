"""How far the outputs of a network are from the original's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from autocompress.workload.types import Array

_TINY = 1e-12


def output_loss(
    original: Sequence[Tensor], changed: Sequence[Tensor], *, class_scores: bool
) -> float:
    """How far outputs are from the original's.

    Of class scores the mean Kullback-Leibler divergence in nats, of the first output; else the
    squared error as a share of the outputs' mean square, on average over floating outputs.

    Args:
        original: flat list of outputs, samples in dimension 0; likewise `changed`.
    """
    if class_scores:
        log_p, log_q = (F.log_softmax(x[0].double(), 1) for x in (original, changed))
        loss = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    else:
        shares = [
            float(
                (a.double() - b.double()).square().mean() / a.double().square().mean().clamp(_TINY)
            )
            for a, b in zip(original, changed, strict=True)
            if a.is_floating_point()
        ]
        loss = float(np.mean(shares)) if shares else 0.0
    # A network that overflows is as far off as can be.
    return max(loss, 0.0) if np.isfinite(loss) else 1e6


def changed_share(original: Array, changed: Array) -> float:
    """The share of decisions that differ; both of class scores, shape (n, classes, ...)."""
    return float((original.argmax(1) != changed.argmax(1)).mean())


def constant_loss(outputs: Sequence[Tensor], *, class_scores: bool) -> float:
    """The loss of a network that gives the same, the mean, whatever its inputs.

    Of class probabilities that is their mutual information with the inputs, in nats.

    Args:
        outputs: the original's, as a flat list; samples in dimension 0.
    """
    if class_scores:
        mean = outputs[0].double().softmax(1).mean(0, keepdim=True).log()
        constant: Sequence[Tensor] = [mean.expand_as(outputs[0])]
    else:
        constant = [
            x.double().mean(0, keepdim=True).expand_as(x) if x.is_floating_point() else x
            for x in outputs
        ]
    return output_loss(outputs, constant, class_scores=class_scores)
