"""The experiment file and the search space file: strict, frozen and versioned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from autocompress.errors import AutocompressError, ConfigError

Objective = Literal[
    "metric", "latency", "energy", "file_bytes", "download_bytes", "peak_memory", "gpu_memory"
]
Sampler = Literal["tpe", "nsga2", "nsga3", "gp", "random", "mutation"]
# A technique's fields and the values that each may take: every combination is meant.
Grid = dict[str, tuple[Any, ...]]
ModelT = TypeVar("ModelT", bound=BaseModel)

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class SearchSettings(Strict):
    """How long the search runs and how it proposes plans.

    Attributes:
        trials: finished trials in all; None is no limit.
        time_s: seconds in all, set-up and final judging included; None is no limit.
        limits: hard limits such as `drop <= 1.0`; see `autocompress.search.limits`.
        survivors: whether members of the front are trained by distillation, if there are training
            data and time.
        seeds: whether the search starts from plans that were solved for, or without any.
    """

    trials: int | None = Field(default=None, ge=1)
    time_s: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    sampler: Sampler = "mutation"
    finalists: int = Field(default=20, ge=1)
    limits: tuple[str, ...] = ()
    survivors: bool = True
    seeds: bool = True


class CalibrationSettings(Strict):
    """How much calibration data each step reads."""

    statistics_samples: int = Field(default=1024, ge=1)
    repair_samples: int = Field(default=128, ge=1)
    rows_per_layer: int = Field(default=65536, ge=64)


class Experiment(Strict):
    """One experiment file.

    Paths in it are relative to the file's own folder, else to the working directory.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    workload: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")
    device: str
    search_space: str
    objectives: tuple[Objective, ...] = Field(
        default=("metric", "latency"), min_length=1, max_length=4
    )
    search: SearchSettings = SearchSettings()
    calibration: CalibrationSettings = CalibrationSettings()

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len(set(value)) != len(value):
            raise ValueError("each objective may be named once")
        return value


class Sweep(Strict):
    """One sweep file: a search for every combination of its lists.

    Paths in it are relative to the file's own folder, else to the working directory.

    Attributes:
        experiments: experiment files; each brings a workload and its objectives.
        devices: device profiles; empty for each experiment's own. So are `search_spaces`,
            `samplers` and `seeds`.
        trials: finished trials of each search; with `time` it replaces the experiment's limits.
        time: of each search, such as `10m`.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    experiments: tuple[str, ...] = Field(min_length=1)
    devices: tuple[str, ...] = ()
    search_spaces: tuple[str, ...] = ()
    samplers: tuple[Sampler, ...] = ()
    seeds: tuple[int, ...] = ()
    trials: int | None = Field(default=None, ge=1)
    time: str | None = None

    @field_validator("time")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            parse_duration(value)
        return value


class SearchSpace(Strict):
    """One search space file: for each technique the values that its fields may take.

    All patterns are shell-style (`encoder.*.query`) and are held against the names of layers and
    channel groups, and against `network`, the target of what works on the network as a whole.

    Attributes:
        techniques: by a technique's name its decision's fields and their values, in order from the
            mildest to the strongest, or a list of such mappings, whose combinations are joined;
            leaving a layer as it is needs no entry.
        exclude: patterns of targets that stay untouched.
        exclude_techniques: by a pattern of targets the techniques that they are spared.
        fix: by a pattern of targets, then a technique's name, one value for each field: these
            targets always get that decision, and have no other choice at its stage. It may be a
            technique that `techniques` does not name. A decision that changes nothing, such as
            `precision: {weight_bits: 32, activation_bits: 32}`, keeps them as they are.
        tie: lists of patterns; targets that match one of a list's patterns take the same decision
            at every stage, one that all of them take. Layers and channel groups have stages of
            their own, and a target without a choice at a stage has no part in it.
    """

    version: Literal[1]
    name: str
    techniques: dict[str, Annotated[tuple[Grid, ...], Field(min_length=1)]]
    exclude: tuple[str, ...] = ()
    exclude_techniques: dict[str, tuple[str, ...]] = {}
    fix: dict[str, dict[str, dict[str, Any]]] = {}
    tie: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = ()

    @field_validator("techniques", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A single mapping of fields stands for a list of one."""
        if not isinstance(value, Mapping):
            return value
        return {k: (grids,) if isinstance(grids, Mapping) else grids for k, grids in value.items()}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `90`, `90s`, `10m` or `1h30m`.

    Raises:
        ConfigError: the text is no positive duration.
    """
    match = _DURATION.fullmatch(text.strip())
    parts = match.groups() if match else (None, None, None)
    if not any(parts):
        raise ConfigError("A duration cannot be read.", given=text, allowed="90s, 10m, 1h30m")
    seconds = sum(float(p or 0) * unit for p, unit in zip(parts, (3600, 60, 1), strict=True))
    if seconds <= 0:
        raise ConfigError("A duration must be longer than nothing.", given=text, allowed="> 0s")
    return seconds


def read_yaml(path: Path, error: type[AutocompressError]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        error: the file is missing, is no YAML or holds no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"The file cannot be read: {cause}", given=path) from cause
    except yaml.YAMLError as cause:
        raise error(f"The file is not valid YAML: {cause}", given=path) from cause
    if not isinstance(data, dict):
        raise error("The file must hold a mapping of keys to values.", given=path)
    return data


def validate(
    model: type[ModelT], data: Mapping[str, Any], source: object, error: type[AutocompressError]
) -> ModelT:
    """Build a model from parsed data; every complaint is gathered in one readable error."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as cause:
        complaints = []
        for item in cause.errors():
            place = ".".join(str(part) for part in item["loc"]) or "(top level)"
            if item["type"] == "extra_forbidden":
                complaints.append(f"{place}: unknown key")
            else:
                complaints.append(f"{place}: {item['msg']} (given: {item['input']!r})")
        keys = ", ".join(model.model_fields)
        raise error(
            f"{source} is not a valid {model.__name__}: " + "; ".join(complaints),
            given=source,
            allowed=f"keys {keys}",
            advice="correct the named keys",
        ) from cause


def shipped(folder: Literal["hw_profiles", "search_spaces"]) -> Path:
    """The folder of YAML files that come with autocompress, installed or in a checkout."""
    installed = Path(str(resources.files("autocompress"))) / "_shipped" / folder
    checkout = Path(__file__).resolve().parent.parent / folder
    return installed if installed.is_dir() else checkout


def find_named(
    name: str, folder: Literal["hw_profiles", "search_spaces"], near: Path | None = None
) -> Path:
    """Resolve a short name (`cpu`) or a path of a YAML file.

    A path is looked up beside `near` (the experiment file) first, then from the working directory.

    Raises:
        ConfigError: neither a shipped name nor a file.
    """
    home = shipped(folder)
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        candidates = [home / f"{name}.yaml"]
    else:
        candidates = [*([near.parent / name] if near else []), Path(name)]
    for path in candidates:
        if path.is_file():
            return path.resolve()
    names = ", ".join(sorted(p.stem for p in home.glob("*.yaml")))
    raise ConfigError(
        f"There is no such file in {folder}.",
        given=name,
        allowed=f"{names}, or the path of a .yaml file",
    )


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        ConfigError: the file is missing, malformed or has unknown keys.
    """
    return validate(Experiment, read_yaml(path, ConfigError), path, ConfigError)


def load_search_space(name: str, near: Path | None = None) -> SearchSpace:
    """Read a search space by short name or path.

    Raises:
        ConfigError: the file is missing, malformed or has unknown keys.
    """
    path = find_named(name, "search_spaces", near)
    return validate(SearchSpace, read_yaml(path, ConfigError), path, ConfigError)
