"""The measuring worker, `python -m autocompress.measure.worker`; see `client.Worker`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from autocompress.device import local_facts
from autocompress.errors import MeasurementError
from autocompress.measure.abilities import find_abilities
from autocompress.measure.arrays import rows_of, write_arrays
from autocompress.measure.child import Beat, Handler, Request, Setup, serve
from autocompress.measure.energy import energy, meter_report
from autocompress.measure.lock import hold
from autocompress.measure.models import Models
from autocompress.measure.runtimes import runtime_for
from autocompress.measure.sampling import Stopping, sample_pairs
from autocompress.measure.session import Session

Operation = Callable[[Setup, Models, Request, Beat], dict[str, Any]]


def facts(setup: Setup, models: Models, request: Request, beat: Beat) -> dict[str, Any]:
    """What this machine is; see `device.MachineFacts`."""
    return local_facts(setup.profile).model_dump(mode="json")


def abilities(setup: Setup, models: Models, request: Request, beat: Beat) -> dict[str, Any]:
    """What this machine can do of what the profile names; see `abilities.Abilities`."""
    return find_abilities(setup.profile, setup.placement).model_dump(mode="json")


def predict(setup: Setup, models: Models, request: Request, beat: Beat) -> dict[str, Any]:
    """Run a whole split in batches and write the concatenated outputs to `request["outputs"]`.

    Raises:
        MeasurementError: an output's first axis is not the batch.
    """
    inputs = models.split(request["inputs"])
    session = models.session(request, inputs)
    beat()
    rows, batch_size = rows_of(inputs, request["inputs"]), request["batch_size"]
    parts = []
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


def compare(setup: Setup, models: Models, request: Request, beat: Beat) -> dict[str, Any]:
    """Sample baseline and candidate in turn on the first `batch_size` rows of the inputs."""
    batch = models.batch(request)

    def load(side: str) -> Session:
        session = models.load(request[side], batch)
        # Some runtimes compile for minutes.
        beat()
        return session

    loads = (partial(load, "baseline"), partial(load, "candidate"))
    stopping = Stopping(**request["stopping"])
    return asdict(sample_pairs(loads[0], loads[1], batch, stopping, setup.cores))


def profile(setup: Setup, models: Models, request: Request, beat: Beat) -> dict[str, Any]:
    """The runtime's own profile of a model; see `session.Runtime.profile`."""
    settings = setup.profile.runtime(request["runtime"])
    batch = models.batch(request)
    nodes = runtime_for(settings).profile(
        Path(request["model"]), settings, setup.placement, batch, request["runs"]
    )
    return {"nodes": [asdict(node) for node in nodes]}


def meter(setup: Setup, models: Models, request: Request, beat: Beat) -> dict[str, Any]:
    """Which energy meter there is; see `energy.meter_report`."""
    return asdict(meter_report(setup.profile))


OPERATIONS: Final[Mapping[str, Operation]] = {
    "facts": facts,
    "abilities": abilities,
    "predict": predict,
    "compare": compare,
    "energy": energy,
    "meter": meter,
    "profile": profile,
}
# These take no figures, so they need not wait for the device.
_LOCK_FREE: Final = ("facts", "abilities")


def make_handler(setup: Setup) -> Handler:
    """The handler of this worker's requests."""
    models = Models(setup)

    def handle(request: Request, beat: Beat) -> dict[str, Any]:
        operation = OPERATIONS[request["operation"]]
        if request["operation"] in _LOCK_FREE:
            return operation(setup, models, request, beat)
        with hold(setup.lock_keys, request["lock_wait_s"], beat):
            return operation(setup, models, request, beat)

    return handle


if __name__ == "__main__":
    serve(make_handler)
