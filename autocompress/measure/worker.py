"""The measuring worker, `python -m autocompress.measure.worker`; see `client.Worker`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import numpy as np

from autocompress.errors import MeasurementError
from autocompress.measure.arrays import file_key, read_arrays, rows_of, write_arrays
from autocompress.measure.child import Beat, Handler, Request, Setup, serve
from autocompress.measure.lock import core_keys, hold
from autocompress.measure.runtime import Array, Session, runtime_for
from autocompress.measure.sampling import Stopping, clock_mhz, sample_pairs

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
class _Models:
    """Loads models and splits, and keeps the last few of each."""

    def __init__(self, setup: Setup) -> None:
        self._settings = setup.runtime
        self._runtime = runtime_for(setup.runtime)
        self._runtime.check_available(setup.runtime)
        self._sessions = _Recent[Session](_SESSIONS)
        self._splits = _Recent[tuple[Array, ...]](_SPLITS)

    def session(self, text: str, inputs: Sequence[Array]) -> Session:
        """The loaded model.

        Raises:
            MeasurementError: the model takes another number of inputs.
        """
        path = Path(text)
        load = partial(self._runtime.load, path, self._settings)
        session = self._sessions.get(file_key(path), load)
        if len(session.input_names) != len(inputs):
            raise MeasurementError(
                "The model takes another number of inputs.",
                given=f"{len(inputs)} arrays for {path}",
                allowed=f"one array each for {', '.join(session.input_names)}",
            )
        return session

    def split(self, text: str) -> tuple[Array, ...]:
        """The arrays of an .npz file."""
        path = Path(text)
        return self._splits.get(file_key(path), partial(read_arrays, path))


def predict(models: _Models, request: Request, beat: Beat) -> dict[str, Any]:
    """Run a whole split in batches and write the concatenated outputs to `request["outputs"]`.

    Raises:
        MeasurementError: an output's first axis is not the batch.
    """
    inputs = models.split(request["inputs"])
    session = models.session(request["model"], inputs)
    beat()
    rows, batch_size = rows_of(inputs, request["inputs"]), request["batch_size"]
    parts: list[tuple[Array, ...]] = []
    for start in range(0, rows, batch_size):
        outputs = session.run([array[start : start + batch_size] for array in inputs])
        expected = min(batch_size, rows - start)
        shapes = [output.shape for output in outputs]
        if any(not shape or shape[0] != expected for shape in shapes):
            raise MeasurementError(
                "Every output's first axis must be the batch.",
                given=f"outputs of shapes {shapes} for {expected} rows, {request['model']}",
                allowed=f"outputs of {expected} rows",
            )
        parts.append(outputs)
        beat()
    whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
    write_arrays(Path(request["outputs"]), whole)
    return {}


def compare(models: _Models, request: Request, beat: Beat) -> dict[str, Any]:
    """Sample baseline and candidate in turn on the first `batch_size` rows of the inputs.

    Raises:
        MeasurementError: the inputs have fewer rows.
    """
    inputs, batch_size = models.split(request["inputs"]), request["batch_size"]
    if rows_of(inputs, request["inputs"]) < batch_size:
        raise MeasurementError(
            "The inputs have fewer rows than the profile's batch.",
            given=f"shapes {[array.shape for array in inputs]}",
            allowed=f"at least {batch_size} rows",
        )
    batch = [np.ascontiguousarray(array[:batch_size]) for array in inputs]
    sides = []
    for key in ("baseline", "model"):
        sides.append(partial(models.session(request[key], inputs).run, batch))
        beat()
    samples = sample_pairs(sides[0], sides[1], Stopping(**request["stopping"]))
    return {**asdict(samples), "clock_mhz": clock_mhz(request["cores"])}


def make_handler(setup: Setup) -> Handler:
    """The handler of this worker's requests: `predict` and `compare`."""
    models = _Models(setup)
    operations = {"predict": predict, "compare": compare}

    def handle(request: Request, beat: Beat) -> dict[str, Any]:
        with hold(core_keys(setup.cores), request["lock_wait_s"], beat):
            return operations[request["operation"]](models, {**request, "cores": setup.cores}, beat)

    return handle


if __name__ == "__main__":
    serve(make_handler)
