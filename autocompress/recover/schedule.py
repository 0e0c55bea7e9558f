"""Pure functions of step and seed: learning rate and order of samples, nothing to be stored."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# Batches of which samples are sorted by length together.
_SORTED_BATCHES = 16


def learning_rate_share(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to zero.

    Loshchilov & Hutter 2017 (SGDR), eq. 5, without restarts. The warm-up never starts at zero.

    Args:
        step: from 0.
        steps: of the whole training.
        warmup_share: share of the steps that the warm-up takes.
    """
    warmup = int(warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def derived_seed(seed: int, purpose: str, position: int = 0) -> int:
    """A seed of its own for every purpose and position, so that no generator's state is kept."""
    text = f"{seed}|{purpose}|{position}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def derived_generator(seed: int, purpose: str, position: int = 0) -> torch.Generator:
    """A generator on the CPU with a `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, position))


def split_off(count: int, holdout: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random indices, int64: of `count - holdout` samples that train, and of those held out."""
    order = torch.randperm(count, generator=derived_generator(seed, "holdout"))
    return order[holdout:].sort().values, order[:holdout].sort().values


def epoch_batches(
    samples: Tensor, batch_size: int, seed: int, epoch: int, lengths: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Sample indices of an epoch's batches, shuffled.

    What is left over after the last whole batch is dropped, since batch norms cannot learn from a
    few samples; where there are fewer samples than a batch, they make one batch.

    Args:
        lengths: of all samples, int64; then samples of about the same length share a batch, within
            every few batches in their random order, and those batches are shuffled.
    """
    generator = derived_generator(seed, "order", epoch)
    order = torch.randperm(len(samples), generator=generator)
    whole = max(len(samples) // batch_size, 1)
    chosen = samples[order][: whole * batch_size]
    if lengths is None:
        return torch.split(chosen, batch_size)
    batches: list[Tensor] = []
    for part in torch.split(chosen, _SORTED_BATCHES * batch_size):
        near = torch.split(part[lengths[part].argsort(stable=True)], batch_size)
        batches.extend(near[i] for i in torch.randperm(len(near), generator=generator).tolist())
    return tuple(batches)
