"""The errors that a user may meet; each says what, what was given, what is allowed, what to do."""

from __future__ import annotations

from typing import final


class AutocompressError(Exception):
    """Base of every error that autocompress raises on purpose.

    Args:
        what: what went wrong, in one sentence.
        given: the value or file that was given.
        allowed: what would have been accepted.
        advice: what to do next.
    """

    def __init__(
        self, what: str, *, given: object = None, allowed: object = None, advice: str | None = None
    ) -> None:
        self.what = what
        self.given = given
        self.allowed = allowed
        self.advice = advice
        lines = [what]
        if given is not None:
            lines.append(f"  given:   {given}")
        if allowed is not None:
            lines.append(f"  allowed: {allowed}")
        if advice is not None:
            lines.append(f"  to do:   {advice}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross processes whole."""
        fields = (self.what, self.given, self.allowed, self.advice)
        texts = tuple(None if f is None else str(f) for f in fields)
        return _again, (type(self), *texts)


@final
class ConfigError(AutocompressError):
    """An experiment, search space or option that cannot be used as written."""


@final
class DeviceError(AutocompressError):
    """A device profile that is unknown, malformed or asks for what this machine lacks."""


@final
class WorkloadError(AutocompressError):
    """A user's workload that breaks its contract (splits, shapes, metric, network)."""


@final
class GraphError(AutocompressError):
    """A network whose structure cannot be traced."""


@final
class PlanError(AutocompressError):
    """A plan or decision that does not fit the network it is applied to."""


@final
class ExportError(AutocompressError):
    """A candidate whose ONNX file cannot be written or does not match its network."""


@final
class MeasurementError(AutocompressError):
    """A model that crashed, hung or failed in the runtime while it was being measured."""


@final
class OutOfTimeError(AutocompressError):
    """A training or coding that was stopped before its end; a later call goes on."""


@final
class SearchError(AutocompressError):
    """A search in which nothing works."""


@final
class RunFolderError(AutocompressError):
    """A run folder that belongs to another experiment or device, or that holds no result."""


@final
class NoFitError(AutocompressError):
    """No point of a front meets the limits that were asked for."""


def _again(
    kind: type[AutocompressError],
    what: str,
    given: str | None,
    allowed: str | None,
    advice: str | None,
) -> AutocompressError:
    return kind(what, given=given, allowed=allowed, advice=advice)
