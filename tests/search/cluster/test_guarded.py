"""What is a plan's fault, what is the machine's, and what is waited for."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from autocompress.errors import DeviceError, ExportError
from autocompress.search.cluster.workshop import Broken, Failure, guarded
from autocompress.search.patience import Patience, may_pass


def raising(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def hasty(call: Callable[[], Any]) -> Any:
    """Patience that gives up after a few calls."""
    waited: list[float] = []
    return Patience(may_pass, "a disk", 10.0, clock=lambda: sum(waited), pause=waited.append)(call)


def test_a_plan_that_fails_has_a_reason() -> None:
    found = guarded(raising(ExportError("No such operator.")), hasty)
    assert found == Failure("ExportError: No such operator.")
    assert guarded(raising(), hasty) == "done"


def test_a_disk_that_was_full_for_a_while_costs_nothing() -> None:
    full = [OSError(errno.ENOSPC, "no space left") for _ in range(4)]
    assert guarded(raising(*full), hasty) == "done"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (DeviceError("The device is away."), "The device is away."),
        (PermissionError("denied"), "PermissionError: denied"),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(error: Exception, what: str) -> None:
    found = guarded(raising(error), hasty)
    assert isinstance(found, Broken) and what in str(found.error)


def test_a_disk_that_stays_full_is_no_plans_fault() -> None:
    full = [OSError(errno.ENOSPC, "no space left") for _ in range(100)]
    found = guarded(raising(*full), hasty)
    assert isinstance(found, Broken) and "no space left" in str(found.error)
