"""Weights that one training of quantized layers must leave as another technique stored them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn


@contextmanager
def frozen_weights(network: nn.Module, attribute: str) -> Iterator[None]:
    """Within, weights of the layers that carry an attribute are not trained."""
    weights = [
        cast(Tensor, module.weight) for module in network.modules() if hasattr(module, attribute)
    ]
    trained = [weight for weight in weights if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
