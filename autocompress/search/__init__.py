"""The search: spaces, studies, engines, and the front that comes out.

The package is callable: `autocompress.search("experiment.yaml")` runs one search.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from autocompress.search.front import Front


@final
class _CallableModule(ModuleType):
    """Lets the package stand for its main function, since both are rightly called `search`."""

    def __call__(
        self,
        experiment: str | Path,
        *,
        run: str | Path | None = None,
        trials: int | None = None,
        time: str | None = None,
        seed: int | None = None,
    ) -> Front:
        """Run or continue a search and return its front; see `run.run_search`."""
        # Imported here: reading a finished front needs neither PyTorch nor Optuna.
        from autocompress.search.prepare import Options
        from autocompress.search.run import run_search

        options = Options(Path(run) if run is not None else None, trials, time, seed)
        return run_search(Path(experiment), options)


sys.modules[__name__].__class__ = _CallableModule
