"""The command that looks at a network before anything is searched: `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autocompress.cli.app import AsJson, app
from autocompress.cli.output import make_console


@app.command()
def inspect(
    experiment: Annotated[Path, typer.Argument(help="An experiment's YAML file.")],
    as_json: AsJson = False,
) -> None:
    """Show what a search could change in a network, and why it leaves the rest alone.

    Every module that owns weights, with its share of weights and multiply-accumulates and the
    techniques of the search space that suit it; then the channel groups, and the blocks that can be
    taken out. Nothing is measured.

    Example: autocompress inspect experiments/digits.yaml
    """
    from autocompress.report.inspection import inspection_parts
    from autocompress.report.progress import SearchDisplay
    from autocompress.search.inspection import inspect as inspect_experiment

    with SearchDisplay() as display:
        found = inspect_experiment(experiment, display)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    console = make_console()
    for part in inspection_parts(found, console.width):
        console.print(part)
