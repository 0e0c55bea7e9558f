"""What a training moves: the optimizer and its parameters, masked weights, frozen batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.errors import WorkloadError
from autocompress.graph.layers import NORM_TYPES
from autocompress.recover.training_types import TrainingSettings


@final
@dataclass(frozen=True)
class Manner:
    """How networks of a kind are trained.

    Attributes:
        rate: what a decision's learning rate is multiplied by.
    """

    optimizer: Literal["sgd", "adamw"]
    batch_size: int
    weight_decay: float
    rate: float


SGD = Manner("sgd", batch_size=128, weight_decay=1e-4, rate=1.0)
# Transformers diverge or stand still under plain gradient steps (Zhang et al. 2020, "Why are
# adaptive methods good for attention models?"); without batch norms small batches do no harm.
ADAMW = Manner("adamw", batch_size=32, weight_decay=1e-2, rate=1e-2)


def manner_of(network: nn.Module) -> Manner:
    """AdamW for networks with norms of each sample alone and no batch norms, else SGD."""
    modules = list(network.modules())
    batch = any(isinstance(m, NORM_TYPES) for m in modules)
    own = any(isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm") for m in modules)
    return ADAMW if own and not batch else SGD


def make_optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """The optimizer of the settings; tensors of fewer than two dimensions have no weight decay.

    Raises:
        WorkloadError: there are no parameters.
    """
    if not parameters:
        raise WorkloadError(
            "Nothing of the network can be trained.",
            given="no parameter with requires_grad",
            advice="call network.requires_grad_(True) before you return the workload",
        )
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, settings.learning_rate)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, nesterov=nesterov)


def masked_weights(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weights with the masks of those that stay; a parametrized weight's own tensor, if it fits."""
    found = []
    for module in network.modules():
        mask = getattr(module, "weight_mask", None)
        if not isinstance(mask, Tensor):
            continue
        if parametrize.is_parametrized(module, "weight"):
            weight = module.parametrizations["weight"].original  # type: ignore[union-attr, index]
        else:
            weight = module.weight
        # A codebook has another shape than the weight that it stands for: its zeros are its own.
        if isinstance(weight, Tensor) and weight.shape == mask.shape:
            found.append((weight, mask))
    return found


def freeze_norms(network: nn.Module) -> None:
    """Let batch norms keep their statistics."""
    for module in network.modules():
        if isinstance(module, NORM_TYPES):
            module.eval()
