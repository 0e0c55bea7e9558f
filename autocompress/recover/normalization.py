"""Batch-norm statistics re-estimated on calibration data, which undoes most of pruning's harm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autocompress.graph.layers import NORM_TYPES

_BATCH = 64


def repair_batch_norm(network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Replace running means and variances by averages over some inputs, in place.

    Everything but the batch norms stays in evaluation mode; no gradient, no label.

    Args:
        network: a stitched network.
        inputs: calibration inputs, n samples in dimension 0.

    Returns:
        How many batch norms were repaired.
    """
    norms = [m for m in network.modules() if isinstance(m, NORM_TYPES) and m.track_running_stats]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for start in range(0, len(inputs[0]), _BATCH):
                network(*(x[start : start + _BATCH] for x in inputs))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.eval()
    return len(norms)
