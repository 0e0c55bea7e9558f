"""The application that commands are added to, and arguments that several of them have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

NO_FIT = 1

# Arguments and options of more than one command.
RunFolder: TypeAlias = Annotated[Path, typer.Argument(help="A run folder.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress a trained network for your device: search, look at the front, pick a model.\n\n"
    "Example: autocompress search experiments/digits.yaml --trials 40",
)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    context.obj = debug
    parent = os.environ.pop("AUTOCOMPRESS_PARENT", None)
    if parent:
        from autocompress.processes import die_with

        die_with(int(parent))
