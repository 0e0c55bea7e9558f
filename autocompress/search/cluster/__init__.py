"""A search on a Ray cluster: candidates are built anywhere and measured where the device is.

`device_node` runs on the device and imports neither PyTorch nor Ray.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def _has_token() -> bool:
    """Whether a token of Ray's is at hand, where Ray itself looks for one."""
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or (Path.home() / ".ray" / "auth_token").is_file()


if _has_token() and "ray" not in sys.modules:
    # Read when Ray is imported. `ray start --head` asks for the token if there is one, but who
    # joins sends it only if told so.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
