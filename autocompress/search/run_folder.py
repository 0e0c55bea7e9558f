"""A run folder: what belongs to one search, and who may go on with it."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import yaml

from autocompress.config import Experiment, SearchSpace
from autocompress.device import DeviceProfile, Fingerprint
from autocompress.errors import RunFolderError
from autocompress.evaluation import Evaluation
from autocompress.files import write_json, write_whole
from autocompress.plan import Plan

_EXPERIMENT, _DEVICE = "experiment.yaml", "device.json"
# Counted up whenever a study of an earlier version could not be gone on with.
_FORMAT = 3
# These may change from one call to the next: they say how long to search, not what for.
_LIMITS = ("trials", "time_s", "finalists")


@final
@dataclass(frozen=True)
class Identity:
    """All that makes two runs the same search.

    Attributes:
        network: hash of the network's structure and weights.
        data: hash of the splits and the metric.
    """

    experiment: Experiment
    space: SearchSpace
    profile: DeviceProfile
    device: Fingerprint
    network: str
    data: str

    def resolved(self) -> dict[str, Any]:
        """Plain values for `experiment.yaml`."""
        return {
            "format": _FORMAT,
            "experiment": self.experiment.model_dump(mode="json"),
            "search_space": self.space.model_dump(mode="json"),
            "device_profile": self.profile.model_dump(mode="json"),
            "network": self.network,
            "data": self.data,
        }


@final
class RunFolder:
    """The folder of one search.

    Args:
        path: made by `claim`, not before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def claim(self, identity: Identity) -> Iterator[None]:
        """Make the folder, or go on with it, and keep other searches out meanwhile.

        Raises:
            RunFolderError: it belongs to another experiment or device, holds something else, or
                another search is using it.
        """
        with self._lock():
            self._check(identity)
            try:
                self._set_up(identity)
            except OSError as cause:
                raise RunFolderError(
                    f"The run folder cannot be written: {cause}", given=self.path
                ) from cause
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the folder's lock, which dies with this process."""
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as cause:
            raise RunFolderError(
                f"The run folder cannot be used: {cause}",
                given=self.path,
                advice="give another folder with --run",
            ) from cause
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as cause:
                raise RunFolderError(
                    "Another search is working in this run folder.",
                    given=self.path,
                    advice="wait for it, or give another folder with --run",
                ) from cause
            try:
                yield
            except RunFolderError:
                self._forget_lock(new)
                raise

    def _forget_lock(self, new: bool) -> None:
        """Leave a refused folder as it was found."""
        if new or not (self.path / _EXPERIMENT).is_file():
            (self.path / ".lock").unlink(missing_ok=True)

    def _set_up(self, identity: Identity) -> None:
        # Whatever a killed call left half-done is made anew.
        shutil.rmtree(self.path / "scratch", ignore_errors=True)
        for partial in self.path.rglob(".*.part"):
            partial.unlink(missing_ok=True)
        for name in ("artifacts", "plans", "finals"):
            (self.path / name).mkdir(exist_ok=True)
        write_json(self.path / _DEVICE, identity.device.model_dump(mode="json"))
        # Last, because it makes the folder this experiment's.
        text = yaml.safe_dump(identity.resolved(), sort_keys=False)
        write_whole(self.path / _EXPERIMENT, text.encode())

    @property
    def bank(self) -> Path:
        """The folder of calibration statistics and solved variants."""
        return self.path / "bank"

    def save_plan(self, plan: Plan) -> None:
        """Write a plan to `plans/<hash>.json`."""
        write_json(self.path / "plans" / f"{plan.hash}.json", plan.to_rows())

    def save_evaluation(self, evaluation: Evaluation) -> None:
        """Keep an evaluation that is no trial: a reference point's or a finalist's."""
        write_json(
            self._evaluation_path(evaluation.candidate, evaluation.split), evaluation.to_dict()
        )

    def evaluation(self, candidate: str, split: str) -> Evaluation | None:
        """Read back what `save_evaluation` kept."""
        path = self._evaluation_path(candidate, split)
        if not path.is_file():
            return None
        return Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def seconds_spent(self) -> float:
        """Seconds that earlier calls searched in this folder."""
        path = self.path / "spent.json"
        return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0

    def save_seconds_spent(self, seconds: float) -> None:
        """Keep how long was searched so far."""
        write_json(self.path / "spent.json", {"seconds": round(seconds, 2)})

    def _evaluation_path(self, candidate: str, split: str) -> Path:
        return self.path / "finals" / f"{candidate}-{split}.json"

    def _check(self, identity: Identity) -> None:
        path = self.path / _EXPERIMENT
        if not path.is_file():
            begun = {"artifacts", "plans", "finals", _DEVICE}
            names = {p.name for p in self.path.iterdir() if not p.name.startswith(".")}
            if names - begun:
                raise RunFolderError(
                    "The run folder holds something else.",
                    given=self.path,
                    allowed="an empty or new folder, or an earlier run of this experiment",
                    advice="give another folder with --run",
                )
            return
        wanted = identity.resolved()
        try:
            found = _comparable(yaml.safe_load(path.read_text(encoding="utf-8")))
            device = json.loads((self.path / _DEVICE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as cause:
            raise RunFolderError(
                "The run folder's files are not those of a search.",
                given=self.path,
                advice="give another folder with --run",
            ) from cause
        differences = sorted(_differences(found, _comparable(wanted)))
        differences += sorted(
            _differences(device, identity.device.model_dump(mode="json"), "device")
        )
        if differences:
            raise RunFolderError(
                "The run folder belongs to another experiment or device; it is not touched.",
                given="; ".join(differences[:4]) + (" ..." if len(differences) > 4 else ""),
                allowed="the same experiment, limits, sampler, seed, search space, device, network "
                "and data",
                advice="give another folder with --run, or remove this one",
            )


def _comparable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(resolved))
    for key in _LIMITS:
        result["experiment"]["search"].pop(key, None)
    return result


def _differences(found: Any, wanted: Any, place: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(found.get(key), wanted.get(key), inner)
    elif found != wanted:
        yield f"{place}: {found} in the folder, {wanted} now"
