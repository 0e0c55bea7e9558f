"""The command line: thin, with progress, tables of at most 100 columns, and exit codes.

Exit codes: 0 done, 1 nothing fits the limits of `pick` or `solve`, or a search of a sweep failed,
2 bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from autocompress.errors import AutocompressError, ConfigError, NoFitError

if TYPE_CHECKING:
    from autocompress.device import DeviceProfile

_WIDTH = 100
_BAD_INPUT, _NO_FIT, _INTERRUPTED = 2, 1, 130

# Which extra brings a package that a device does without.
_EXTRAS = {
    "search": (
        "torch", "torch_pruning", "onnxscript", "optuna", "tensorly", "moocore", "plotly",
        "sklearn", "safetensors",
    ),
    "ray": ("ray", "fsspec"),
}  # fmt: skip

# Arguments and options of more than one command.
_RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]
_MaxLatency = Annotated[float | None, typer.Option(help="Median latency on the device.")]
_MinSpeedup = Annotated[float | None, typer.Option(help="Times faster than the original.")]
_MaxBytes = Annotated[int | None, typer.Option(help="Size of the model file.")]
_MaxDownload = Annotated[int | None, typer.Option(help="Size of the model's coded container.")]

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
        from autocompress.measure.child import die_with

        die_with(int(parent))


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
    from autocompress.report.progress import SearchDisplay
    from autocompress.search.prepare import Options
    from autocompress.search.run import run_search

    with SearchDisplay() as display:
        where = (engine, address, storage, artifacts)
        options = Options(run, trials, time, seed, tuple(limit or ()), *where)
        front = run_search(experiment, options, display)
    console = _console()
    _print_front(front.run, console)
    _print_failures(front.run, console)
    console.print(
        f"\nThe front is in {front.run}/front.csv. Pick a model with, for example:\n"
        f"  autocompress pick {front.run} --max-drop 1 --out picked",
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
    console = _console()
    failed = [one for one in finished if one.failure]
    for part in sweep_parts(rows, failed):
        console.print(part)
    console.print(
        f"\nThe table is in {folder}/sweep.csv, the chart in {folder}/sweep.html.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if failed:
        raise typer.Exit(_NO_FIT)


@app.command()
def front(
    run: _RunFolder,
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
        _print_front(run, _console(), everything=everything)


@app.command()
def pick(  # noqa: PLR0913 - every parameter is an option of the command
    run: _RunFolder,
    out: Annotated[Path, typer.Option(help="Folder for the model and its card.")],
    max_latency_ms: _MaxLatency = None,
    min_speedup: _MinSpeedup = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Percentage points lost on the test split.")
    ] = None,
    max_bytes: _MaxBytes = None,
    max_download_bytes: _MaxDownload = None,
    knee: Annotated[bool, typer.Option("--knee", help="Take the knee of the front.")] = False,
) -> None:
    """Hand out one model of a run with a JSON card that says what it is.

    Picks among the finalists; all limits must hold. With --max-drop and no latency or speed-up
    limit: the fastest; with other limits: the most accurate; with --knee: the knee.

    Example: autocompress pick runs/digits --max-drop 1 --out picked
    """
    from autocompress.report.columns import read_front
    from autocompress.report.hand_out import hand_out
    from autocompress.report.pick import Limits
    from autocompress.report.pick import pick as choose

    limits = Limits(max_latency_ms, min_speedup, max_drop, max_bytes, max_download_bytes)
    choice = choose(read_front(run), limits, knee=knee)
    target = hand_out(run, choice, out)
    console = _console()
    console.print(choice.reason, highlight=False)
    console.print(f"model: {target}\ncard:  {target.with_suffix('.json')}", soft_wrap=True,
                  highlight=False)  # fmt: skip


@app.command()
def solve(  # noqa: PLR0913 - every parameter is an option of the command
    run: _RunFolder,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
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
    console = _console()
    for part in solved_parts(found):
        console.print(part)


@app.command()
def measure(  # noqa: PLR0913 - every parameter is an option of the command
    models: Annotated[list[Path], typer.Argument(help="ONNX files, of any origin.")],
    baseline: Annotated[
        Path | None, typer.Option(help="What the others are compared with; by default the first.")
    ] = None,
    device: Annotated[str, typer.Option(help="A device profile: short name or YAML file.")] = "cpu",
    runtime: Annotated[
        list[str] | None, typer.Option(help="Only these of the profile's runtimes; repeatable.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="An .npz file, one array per input; else random values.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Size of an open axis, NAME=N; repeatable.")
    ] = None,
    energy: Annotated[bool, typer.Option("--energy", help="Meter the energy too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Wider intervals, sooner.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure ONNX files on a device, each in turn with a baseline: speed, memory, energy.

    Example: autocompress measure small.onnx --baseline original.onnx --device cpu
    """
    from autocompress.device import load_profile
    from autocompress.report.measured import Wanted, measure_files, measured_table

    profile = load_profile(device)
    names = tuple(runtime or profile.runtime_names)
    for name in names:
        profile.runtime(name)
    wanted = Wanted(
        baseline or models[0], tuple(models), names, inputs, _sizes(size or []), energy, quick
    )
    found, rows = measure_files(profile, wanted, _say)
    if as_json:
        facts = found.model_dump(mode="json")
        print(json.dumps({"device": facts, "rows": [r.to_dict() for r in rows]}, indent=1))
    else:
        _console().print(measured_table(profile, found, rows))


@app.command()
def profile(
    device: Annotated[str, typer.Argument(help="A device profile: short name or YAML file.")],
    network: Annotated[
        Path | None, typer.Option(help="An experiment: build the latency table of its network.")
    ] = None,
    plans: Annotated[int, typer.Option(help="Random plans to check the table on.")] = 50,
    runtime: Annotated[
        str | None, typer.Option(help="The table's runtime; by default the profile's first.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what a device is and measure what it rewards; with --network, build its latency table.

    The table is kept for the device: interrupted, the same command goes on, and another network
    measures only what is new.

    Example: autocompress profile cpu --network experiments/digits.yaml
    """
    from autocompress.device import load_profile

    wanted = load_profile(device)
    if network is not None:
        _profile_network(wanted, network, plans, runtime, as_json)
        return
    from autocompress.measure.client import Worker
    from autocompress.measure.probe import probe
    from autocompress.report.device import device_table

    with tempfile.TemporaryDirectory() as scratch:
        with Worker(wanted, Path(scratch)) as worker:
            found, meter = worker.fingerprint, worker.meter()
        reports = {}
        for name in wanted.runtime_names:
            _say(f"measuring in {name}: int8 against fp32, and the noise floor")
            reports[name] = probe(wanted, name, Path(scratch), 0)
    if as_json:
        probes = {name: report.to_dict() for name, report in reports.items()}
        data = {"device": found.model_dump(mode="json"), "probes": probes, "meter": asdict(meter)}
        print(json.dumps(data, indent=1))
    else:
        _console().print(device_table(wanted, found, reports, meter))


@app.command()
def explain(
    run: _RunFolder,
    candidate: Annotated[str, typer.Argument(help="A candidate, as front.csv calls it.")],
    everything: Annotated[bool, typer.Option("--all", help="Show every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say why a candidate is, or is not, faster than the original, layer by layer.

    Example: autocompress explain runs/digits stock_int8
    """
    from autocompress.report.explain import explanation_parts
    from autocompress.report.explain_run import explain as explain_candidate

    explanation = explain_candidate(run, candidate, _say)
    if as_json:
        print(json.dumps(explanation.to_dict(), indent=1))
        return
    console = _console()
    for part in explanation_parts(explanation, everything=everything):
        console.print(part)


@app.command()
def encode(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    out: Annotated[
        Path | None, typer.Option(help="The container; by default beside the file, as .acz.")
    ] = None,
) -> None:
    """Code an ONNX file for download: smaller, and bit for bit the same file once decoded.

    Example: autocompress encode picked/model.onnx --out picked/model.acz
    """
    from autocompress.export.coding import CODED_SUFFIX, encode_file
    from autocompress.report.coded import coded_table
    from autocompress.report.figures import byte_size

    target = out or model.with_suffix(CODED_SUFFIX)
    sizes = encode_file(model, target)
    console = _console()
    console.print(coded_table(sizes))
    console.print(
        f"file {byte_size(sizes.file_bytes)}, download {byte_size(sizes.coded_bytes)}: "
        f"{sizes.ratio:.2f} times smaller\ncontainer: {target}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if sizes.external_tensors:
        console.print(
            f"warning: {sizes.external_tensors} tensors lie in other files and are not in it"
        )


@app.command()
def decode(
    container: Annotated[Path, typer.Argument(help="A coded container (.acz).")],
    out: Annotated[
        Path | None, typer.Option(help="The ONNX file; by default beside the container.")
    ] = None,
) -> None:
    """Give the ONNX file back that a container was made from, bit for bit.

    Example: autocompress decode picked/model.acz --out model.onnx
    """
    from autocompress.export.coding import decode_file
    from autocompress.report.figures import byte_size

    target = out or container.with_suffix(".onnx")
    if out is None and target.exists():
        raise ConfigError(
            "There is a file of that name already; it is not overwritten.",
            given=target,
            advice="say where the model is to go with --out",
        )
    size = decode_file(container, target)
    _console().print(f"model: {target} ({byte_size(size)})", soft_wrap=True, highlight=False)


def _profile_network(
    device: DeviceProfile, network: Path, plans: int, runtime: str | None, as_json: bool
) -> None:
    from autocompress.report.latency_table import network_parts
    from autocompress.report.progress import SearchDisplay
    from autocompress.search.network_table import profile_network

    with SearchDisplay() as display:
        report = profile_network(device, network, plans=plans, runtime=runtime, progress=display)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
        return
    console = _console()
    for part in network_parts(report):
        console.print(part)


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr)


def _sizes(texts: list[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal() or not int(number):
            raise ConfigError("A size cannot be read.", given=text, allowed="NAME=N, N above zero")
        sizes[name] = int(number)
    return sizes


def _console() -> Console:
    console = Console()
    # A log file has no width of its own; a narrower terminal keeps its own.
    return Console(width=min(console.width, _WIDTH) if console.is_terminal else _WIDTH)


def _print_front(run: Path, console: Console, *, everything: bool = False) -> None:
    from autocompress.report.chart import front_chart
    from autocompress.report.columns import read_device, read_front
    from autocompress.report.device import where
    from autocompress.report.tables import front_table

    frame, device = read_front(run), read_device(run)
    width = console.width
    console.print(front_table(frame, device=where(device), everything=everything, width=width))
    console.print(front_chart(frame, width=width))


def _print_failures(run: Path, console: Console) -> None:
    path = run / "failures.json"
    if path.is_file():
        failures = json.loads(path.read_text(encoding="utf-8"))
        first = next(iter(failures.values())).splitlines()[0]
        text = f"{len(failures)} candidates failed; reasons are in {path}. The first: {first}"
        console.print(text, highlight=False, markup=False)


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
        sys.exit(_NO_FIT if isinstance(error, NoFitError) else _BAD_INPUT)
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
