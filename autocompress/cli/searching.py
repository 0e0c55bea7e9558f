"""Commands that search: `search` and `sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from autocompress.cli.app import NO_FIT, app
from autocompress.cli.output import make_console, print_front


@app.command()
def search(  # noqa: PLR0913 - every parameter is an option of the command
    experiment: Annotated[Path, typer.Argument(help="An experiment's YAML file.")],
    run: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/NAME of the experiment.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Candidates to try in all.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Time in all, such as 90s, 10m or 1h30m.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search.")] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="A hard limit, such as 'drop <= 1.0' or 'speedup >= 4'; repeatable."),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, HOST:PORT or auto; else one is started.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Where the study is: a database's URL, grpc://HOST:PORT, or folder."),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(help="A location that all nodes see; by default the run folder."),
    ] = None,
) -> None:
    """Search for compressed models, or go on where an earlier call ended or was killed.

    A run may go on with another engine or storage than it was begun with.

    Example: autocompress search experiments/digits.yaml --trials 40

    Example: autocompress search experiments/digits.yaml --engine ray --address auto
    """
    from autocompress.report.figures import is_share
    from autocompress.report.progress import SearchDisplay
    from autocompress.search.prepare import Options
    from autocompress.search.run import run_search

    with SearchDisplay() as display:
        where = (engine, address, storage, artifacts)
        options = Options(run, trials, time, seed, tuple(limit or ()), *where)
        front = run_search(experiment, options, display)
    console = make_console()
    print_front(front.run, console)
    _print_failures(front.run, console)
    wish = "--max-drop 1" if is_share(front.table()) else "--knee"
    console.print(
        f"\nThe front is in {front.run}/front.csv. Pick a model with, for example:\n"
        f"  autocompress pick {front.run} {wish} --out picked",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep's YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of all runs; by default runs/sweeps/NAME.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(help="Searches at a time; never two on one machine.", min=1)
    ] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, for --engine ray.")
    ] = None,
) -> None:
    """Run a grid of searches and compare their fronts; interrupted, the same command goes on.

    Example: autocompress sweep experiments/sweeps/digits.yaml --out runs/sweeps/digits
    """
    from autocompress.report.progress import SearchDisplay
    from autocompress.report.sweep import sweep_parts, sweep_rows, write_sweep
    from autocompress.search.sweep import cells_of, load_sweep, run_sweep

    wanted = load_sweep(file)
    folder = out or Path("runs") / "sweeps" / wanted.name
    options = ["--engine", engine, *(["--address", address] if address else [])]
    cells = cells_of(wanted, file, clustered=engine == "ray")
    with SearchDisplay() as display:
        finished = run_sweep(cells, folder, options, display, parallel=parallel)
    rows = sweep_rows(finished)
    write_sweep(rows, finished, folder)
    console = make_console()
    failed = [one for one in finished if one.failure]
    for part in sweep_parts(rows, failed):
        console.print(part)
    console.print(
        f"\nThe table is in {folder}/sweep.csv, the chart in {folder}/sweep.html.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if failed:
        raise typer.Exit(NO_FIT)


def _print_failures(run: Path, console: Console) -> None:
    path = run / "failures.json"
    if path.is_file():
        failures = json.loads(path.read_text(encoding="utf-8"))
        first = next(iter(failures.values())).splitlines()[0]
        text = f"{len(failures)} candidates failed; reasons are in {path}. The first: {first}"
        console.print(text, highlight=False, markup=False)
