"""For what Tune is given and would pickle, in case it is to be restored from its own files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Unkept:
    """Pickled as nothing: the study is what a search is restored from."""

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return Unkept, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self
