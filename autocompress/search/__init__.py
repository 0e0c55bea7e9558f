"""The search: spaces, studies, engines, and the front that comes out.

The package is callable: `autocompress.search("experiment.yaml")` runs one search.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import final

from autocompress.search.front import Front
from autocompress.search.progress import Progress
from autocompress.search.run import Options, run_search


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
        """Run or continue a search and return its front; see `run_search`."""
        options = Options(Path(run) if run is not None else None, trials, time, seed)
        return run_search(Path(experiment), options)


sys.modules[__name__].__class__ = _CallableModule

__all__ = ["Front", "Options", "Progress", "run_search"]
