"""The models and splits that a worker holds, loaded once and kept while they are in use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar, final

import numpy as np

from autocompress.errors import MeasurementError
from autocompress.measure.arrays import file_key, read_arrays, rows_of
from autocompress.measure.child import Request, Setup
from autocompress.measure.runtimes import runtime_for
from autocompress.measure.session import Array, Session

_SESSIONS = 3
_SPLITS = 3
ValueT = TypeVar("ValueT")


@final
class _Recent(Generic[ValueT]):
    """The most recently used values, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, ValueT] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], ValueT]) -> ValueT:
        """The value of `key`, made if it is not there; the oldest one gives way first."""
        if key not in self._values:
            while len(self._values) >= self._size:
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]


@final
class Models:
    """Loads models and splits, and keeps the last few of each.

    A model is named by `{"model": path, "runtime": full name}`, a part of a request.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._sessions = _Recent[Session](_SESSIONS)
        self._splits = _Recent[tuple[Array, ...]](_SPLITS)

    def load(self, subject: Request, inputs: Sequence[Array]) -> Session:
        """Load a model anew.

        Raises:
            DeviceError: its runtime is not available.
            MeasurementError: the model takes another number of inputs.
        """
        path = Path(subject["model"])
        settings = self._setup.profile.runtime(subject["runtime"])
        runtime = runtime_for(settings)
        runtime.check_available(settings)
        session = runtime.load(path, settings, self._setup.placement)
        if len(session.input_names) != len(inputs):
            raise MeasurementError(
                "The model takes another number of inputs.",
                given=f"{len(inputs)} arrays for {path}",
                allowed=f"one array each for {', '.join(session.input_names)}",
            )
        return session

    def session(self, subject: Request, inputs: Sequence[Array]) -> Session:
        """The loaded model, kept for later requests; see `load`."""
        key = (file_key(Path(subject["model"])), subject["runtime"])
        return self._sessions.get(key, partial(self.load, subject, inputs))

    def split(self, text: str) -> tuple[Array, ...]:
        """The arrays of an .npz file."""
        path = Path(text)
        return self._splits.get(file_key(path), partial(read_arrays, path))

    def batch(self, request: Request) -> list[Array]:
        """The first `batch_size` rows of a request's inputs.

        Raises:
            MeasurementError: the inputs have fewer rows.
        """
        inputs, size = self.split(request["inputs"]), self._setup.profile.batch_size
        if rows_of(inputs, request["inputs"]) < size:
            raise MeasurementError(
                "The inputs have fewer rows than the profile's batch.",
                given=f"shapes {[array.shape for array in inputs]}",
                allowed=f"at least {size} rows",
            )
        return [np.ascontiguousarray(array[:size]) for array in inputs]
