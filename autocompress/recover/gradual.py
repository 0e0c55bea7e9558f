"""Weights pruned in rounds, with training after each, so that the network can adapt."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from autocompress.errors import PlanError


def cubic_share(done: int, rounds: int) -> float:
    """Share of the final sparsity after some rounds: much is pruned early, little at the end.

    Zhu & Gupta 2017 (To prune, or not to prune), eq. 1, from no sparsity:
    `s_t / s_f = 1 - (1 - t/n)^3`.

    Args:
        done: rounds done, t, from 0 to `rounds`.
        rounds: of the whole pruning, n, at least 1.

    Raises:
        PlanError: numbers outside these ranges.
    """
    if not 0 <= done <= rounds or rounds < 1:
        raise PlanError(
            "There is no such pruning round.",
            given=f"{done} of {rounds}",
            allowed="0 to the number of rounds, which is at least 1",
        )
    return 1 - (1 - done / rounds) ** 3


def gradual(
    network: nn.Module,
    prune: Callable[[nn.Module, float], None],
    rounds: int,
    train: Callable[[nn.Module, int], None],
) -> None:
    """Prune and train in turn; after the last round the network is sparse in full and trained.

    Args:
        network: changed in place.
        prune: brings every sparse layer to this share, above 0 and at most 1, of its final
            sparsity, and renews the masks that hold the zeros.
        rounds: 1 prunes at once.
        train: gets the round's number, from 0.

    Raises:
        PlanError: fewer than one round.
    """
    cubic_share(0, rounds)
    for number in range(rounds):
        prune(network, cubic_share(number + 1, rounds))
        train(network, number)
