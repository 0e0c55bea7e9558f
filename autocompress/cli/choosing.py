"""Commands that look at what a run has found: `front`, `pick` and `solve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autocompress.cli.app import AsJson, RunFolder, app
from autocompress.cli.output import make_console, print_front

_MaxLatency = Annotated[
    float | None, typer.Option(help="Quiet latency on the device: the 2nd percentile.")
]
_MinSpeedup = Annotated[float | None, typer.Option(help="Times faster than the original.")]
_MaxBytes = Annotated[int | None, typer.Option(help="Size of the model file.")]
_MaxDownload = Annotated[int | None, typer.Option(help="Size of the model's coded container.")]


@app.command()
def front(
    run: RunFolder,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every row as JSON instead of tables.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show dominated points too.")] = False,
) -> None:
    """Show the front of a run.

    Example: autocompress front runs/digits --json
    """
    from autocompress.report.columns import front_rows, read_front

    if as_json:
        print(json.dumps(front_rows(read_front(run)), indent=1))
    else:
        print_front(run, make_console(), everything=everything)


@app.command()
def pick(  # noqa: PLR0913 - every parameter is an option of the command
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder for the model and its card.")],
    max_latency_ms: _MaxLatency = None,
    min_speedup: _MinSpeedup = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Percentage points lost on the test split; with a metric of your own, its unit."
        ),
    ] = None,
    max_bytes: _MaxBytes = None,
    max_download_bytes: _MaxDownload = None,
    knee: Annotated[bool, typer.Option("--knee", help="Take the knee of the front.")] = False,
) -> None:
    """Hand out one model of a run with a JSON card that says what it is.

    Picks among the finalists; all limits must hold. With --max-drop and no latency or speed-up
    limit: the fastest; with other limits: the most accurate; with --knee: the knee. The original
    network or the stock int8 file is handed out where it alone is within the limits, or where it
    beats the pick in accuracy and latency.

    Example: autocompress pick runs/digits --max-drop 1 --out picked
    """
    from autocompress.report.columns import read_front
    from autocompress.report.hand_out import hand_out
    from autocompress.report.pick import Limits
    from autocompress.report.pick import pick as choose

    limits = Limits(max_latency_ms, min_speedup, max_drop, max_bytes, max_download_bytes)
    choice = choose(read_front(run), limits, knee=knee)
    target = hand_out(run, choice, out)
    console = make_console()
    console.print(choice.reason, highlight=False)
    console.print(f"model: {target}\ncard:  {target.with_suffix('.json')}", soft_wrap=True,
                  highlight=False)  # fmt: skip


@app.command()
def solve(  # noqa: PLR0913 - every parameter is an option of the command
    run: RunFolder,
    max_latency_ms: _MaxLatency = None,
    min_speedup: _MinSpeedup = None,
    max_bytes: _MaxBytes = None,
    max_download_bytes: _MaxDownload = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="Only these of the run's runtimes; repeatable.")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Build the plan, and measure it if it was not.")
    ] = False,
    experiment: Annotated[
        Path | None, typer.Option(help="For --measure: the run's experiment file, if it moved.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the best plan for new limits from what a run has measured, in seconds.

    The plan loses least by the run's sensitivities and keeps all limits by its cost models. Figures
    are predicted, unless --measure takes them. The run's study and front stay as they are.

    Example: autocompress solve runs/digits --max-latency-ms 0.05
    """
    from autocompress.report.solved import solved_parts
    from autocompress.search.solve import solve as solve_run
    from autocompress.search.solve_limits import Limits

    limits = Limits(max_latency_ms, min_speedup, max_bytes, max_download_bytes)
    found = solve_run(run, limits, tuple(runtime or ()))
    if measured:
        from autocompress.report.progress import SearchDisplay
        from autocompress.search.measure_solved import measure_solved

        with SearchDisplay() as display:
            found = measure_solved(found, experiment, display)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    console = make_console()
    for part in solved_parts(found):
        console.print(part)
