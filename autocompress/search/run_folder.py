"""A run folder: what belongs to one search, and who may go on with it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import yaml

from autocompress.config import Experiment, SearchSpace
from autocompress.device import DeviceProfile, Fingerprint
from autocompress.errors import RunFolderError
from autocompress.evaluate import Evaluation
from autocompress.files import write_json, write_whole
from autocompress.plan import Plan

# These may change from one call to the next: they say how long to search, not what for.
_LIMITS = ("trials", "time_s", "finalists")


@final
@dataclass(frozen=True)
class Identity:
    """All that makes two runs the same search.

    Attributes:
        network: hash of the network's structure and weights.
    """

    experiment: Experiment
    space: SearchSpace
    profile: DeviceProfile
    device: Fingerprint
    network: str

    def resolved(self) -> dict[str, Any]:
        """Plain values for `experiment.yaml`."""
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "search_space": self.space.model_dump(mode="json"),
            "device_profile": self.profile.model_dump(mode="json"),
            "network": self.network,
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
        self._check(identity)
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as cause:
                raise RunFolderError(
                    "Another search is working in this run folder.",
                    given=self.path,
                    advice="wait for it, or give another folder with --run",
                ) from cause
            text = yaml.safe_dump(identity.resolved(), sort_keys=False)
            write_whole(self.path / "experiment.yaml", text.encode())
            write_json(self.path / "device.json", identity.device.model_dump(mode="json"))
            for name in ("artifacts", "plans", "finals"):
                (self.path / name).mkdir(exist_ok=True)
            yield

    @property
    def database(self) -> Path:
        """The study's SQLite file."""
        return self.path / "study.sqlite3"

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
        path = self.path / "experiment.yaml"
        if not path.is_file():
            if self.path.exists() and any(self.path.iterdir()):
                raise RunFolderError(
                    "The run folder holds something else.",
                    given=self.path,
                    allowed="an empty or new folder, or an earlier run of this experiment",
                    advice="give another folder with --run",
                )
            return
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        wanted = identity.resolved()
        differences = sorted(_differences(_comparable(found), _comparable(wanted)))
        device = json.loads((self.path / "device.json").read_text(encoding="utf-8"))
        differences += sorted(
            _differences(device, identity.device.model_dump(mode="json"), "device")
        )
        if differences:
            raise RunFolderError(
                "The run folder belongs to another experiment or device; it is not touched.",
                given="; ".join(differences[:4]) + (" ..." if len(differences) > 4 else ""),
                allowed="the same experiment, seed, search space, device and network",
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
