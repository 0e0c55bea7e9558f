"""Running the command line: errors become messages and exit codes."""

from __future__ import annotations

import sys

import typer

from autocompress.cli.app import NO_FIT, app
from autocompress.errors import AutocompressError, ConfigError, NoFitError

_BAD_INPUT, _INTERRUPTED = 2, 130

# Which extra brings a package that a device does without.
_EXTRAS = {
    "search": (
        "torch", "torch_pruning", "onnxscript", "optuna", "tensorly", "moocore", "plotly",
        "sklearn", "safetensors",
    ),
    "ray": ("ray", "fsspec"),
}  # fmt: skip


def main() -> None:
    """Run the command line and exit."""
    debug = "--debug" in sys.argv
    try:
        code = app(args=_hoist_debug(sys.argv[1:]), standalone_mode=False)
        # Newer versions of Typer turn an interrupt into a returned exit code.
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except AutocompressError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(NO_FIT if isinstance(error, NoFitError) else _BAD_INPUT)
    except ModuleNotFoundError as cause:
        extra = next((e for e, names in _EXTRAS.items() if _top(cause.name) in names), None)
        if debug or extra is None:
            raise
        missing = ConfigError(
            "This command needs a package that is not installed.",
            given=cause.name,
            advice=f"pip install 'autocompress[{extra}]'",
        )
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        # Typer's own complaints about the command line carry their message and exit code.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", _BAD_INPUT))


def _top(name: str | None) -> str:
    return (name or "").partition(".")[0]


def _hoist_debug(arguments: list[str]) -> list[str]:
    """Let --debug stand anywhere in the line."""
    rest = [a for a in arguments if a != "--debug"]
    return ["--debug", *rest] if len(rest) < len(arguments) else rest
