"""What a search tells whoever watches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import pandas as pd

from autocompress.config import Objective


class Progress(Protocol):
    """A display of the search's stages and its best front so far."""

    def stage(self, name: str, total: int | None = None, *, limit_s: float | None = None) -> None:
        """Begin a stage; the one before it is finished."""

    def advance(self, steps: int = 1) -> None:
        """Count finished steps of the stage."""

    def note(self, text: str) -> None:
        """Show one sentence that must not be missed."""

    def show_front(self, frame: pd.DataFrame, objectives: Sequence[Objective]) -> None:
        """Show a front, with the columns of `front.csv`, by what it is searched for."""


@final
class Silent:
    """A display that shows nothing."""

    def stage(self, name: str, total: int | None = None, *, limit_s: float | None = None) -> None:
        """Nothing is shown."""

    def advance(self, steps: int = 1) -> None:
        """Nothing is shown."""

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def show_front(self, frame: pd.DataFrame, objectives: Sequence[Objective]) -> None:
        """Nothing is shown."""
