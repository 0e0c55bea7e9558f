"""An end to torch-pruning's search for a group's members, which may go round in circles.

Reshapes that repeat channels (keys and values that several queries share) give ever new indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from torch_pruning.dependency.group import Group

# More members than any group of a real network has.
_MOST_MEMBERS = 4000


@final
class EndlessGroup(Exception):  # noqa: N818 - what it says, and never seen by a user
    """A group that grows without end."""


@contextmanager
def bounded_groups() -> Iterator[None]:
    """While it lasts, a group that grows beyond all measure raises `EndlessGroup`."""
    original = Group.has_pruning_op

    def bounded(group: Any, dep: Any, indices: Any) -> bool:
        if len(group) > _MOST_MEMBERS:
            raise EndlessGroup
        return bool(original(group, dep, indices))

    Group.has_pruning_op = bounded
    try:
        yield
    finally:
        Group.has_pruning_op = original
