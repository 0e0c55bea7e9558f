"""A `Plan` says what is done to each layer or channel group; it is JSON with a stable hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from pydantic import BaseModel, ConfigDict, ValidationError

from autocompress.errors import PlanError

_RUNTIME_MARK = "@"


class Decision(BaseModel):
    """What one technique does to one layer or channel group.

    Every technique has its own final subclass; values are relative (shares, bits), so that a
    decision stays valid after an earlier stage has changed the layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    technique: ClassVar[str]


@final
@dataclass(frozen=True)
class Step:
    """One decision for one target: a layer's name or a channel group's name."""

    target: str
    decision: Decision


@final
@dataclass(frozen=True)
class Plan:
    """What is done to a network; the empty plan leaves it as it is.

    Steps are kept sorted by target and technique, so that equal plans have equal hashes.
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        key = [(step.target, step.decision.technique) for step in self.steps]
        if len(set(key)) != len(key):
            twice = next(k for k in key if key.count(k) > 1)
            raise PlanError("A plan decides one thing twice.", given=f"{twice[1]} of {twice[0]}")
        order = sorted(range(len(key)), key=key.__getitem__)
        object.__setattr__(self, "steps", tuple(self.steps[i] for i in order))

    def of(self, technique: str) -> dict[str, Decision]:
        """The decisions of one technique, by target."""
        return {s.target: s.decision for s in self.steps if s.decision.technique == technique}

    def to_rows(self) -> list[dict[str, Any]]:
        """Rows of `target`, `technique` and the decision's own fields, ready for JSON."""
        return [
            {
                "target": step.target,
                "technique": step.decision.technique,
                **step.decision.model_dump(mode="json"),
            }
            for step in self.steps
        ]

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits; equal for equal plans on every machine."""
        text = json.dumps(self.to_rows(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def plan_from_rows(rows: Sequence[dict[str, Any]], decisions: Sequence[type[Decision]]) -> Plan:
    """Read a plan back from `Plan.to_rows`.

    Raises:
        PlanError: an unknown technique, or a value outside the technique's range.
    """
    known = {decision.technique: decision for decision in decisions}
    steps = []
    for row in rows:
        fields = dict(row)
        target, name = fields.pop("target", None), fields.pop("technique", None)
        if not isinstance(target, str) or name not in known:
            raise PlanError(
                "A plan's row cannot be read.",
                given=row,
                allowed=f"a target and a technique of {', '.join(known)}",
            )
        steps.append(Step(target, make_decision(known[name], fields)))
    return Plan(tuple(steps))


def make_decision(decision: type[Decision], fields: dict[str, Any]) -> Decision:
    """Build a decision from its fields.

    Raises:
        PlanError: a field is unknown or its value is outside the allowed range.
    """
    try:
        return decision.model_validate(fields)
    except ValidationError as cause:
        allowed = {
            name: _allowed(schema)
            for name, schema in decision.model_json_schema()["properties"].items()
        }
        complaints = "; ".join(
            ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"])))
            for e in cause.errors()
        )
        raise PlanError(
            f"A decision of technique '{decision.technique}' is not valid: {complaints}.",
            given=fields,
            allowed=", ".join(f"{name} {text}" for name, text in allowed.items()),
        ) from cause


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", ">="), ("exclusiveMinimum", ">"),
            ("maximum", "<="), ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]  # fmt: skip
    return " and ".join(bounds) or str(schema.get("type", "any"))


def candidate_name(file: str, runtime: str, first_runtime: str) -> str:
    """What a file in a runtime is called: by the file alone in the device's first runtime.

    Args:
        file: `original`, `stock_int8` or a plan's hash.
        runtime: full name of one of the device's runtimes.
        first_runtime: full name of the first.
    """
    return file if runtime == first_runtime else f"{file}{_RUNTIME_MARK}{runtime}"


def file_of(candidate: str) -> str:
    """The file's part of a candidate's name."""
    return candidate.partition(_RUNTIME_MARK)[0]
