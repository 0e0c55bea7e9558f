"""Learning rates that suit the distance to a teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autocompress.recover.step_size import rate_share


class Outputs(nn.Module):
    """Gives what it was given, and what is added."""

    def __init__(self, added: Tensor | int = 0) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return x + self.added


@pytest.mark.parametrize(
    ("off", "share"),
    # (off / 0.5) ** 1.5, to the next power of two, down to an eighth.
    [(0.0, 0.125), (0.05, 0.125), (0.15, 0.125), (0.2, 0.25), (0.3, 0.5), (0.45, 1.0), (9.0, 1.0)],
)
def test_shares_by_the_unexplained_part_of_the_outputs(off: float, share: float) -> None:
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    variance = (x - x.mean(0)).square().mean()
    assert rate_share(Outputs((off * variance).sqrt()), Outputs(), (x,)) == share


def test_what_cannot_be_compared_leaves_the_rate() -> None:
    numbers = torch.arange(8)
    assert rate_share(Outputs(1), Outputs(), (numbers,)) == 1.0
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert rate_share(nn.Linear(4, 3), Outputs(), (x,)) == 1.0
    assert rate_share(Outputs(torch.tensor(torch.nan)), Outputs(), (x,)) == 1.0
