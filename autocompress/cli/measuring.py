"""Commands that measure: `measure`, `profile` and `explain`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autocompress.cli.app import AsJson, RunFolder, app
from autocompress.cli.output import make_console, say, tell
from autocompress.errors import ConfigError

if TYPE_CHECKING:
    from autocompress.device import DeviceProfile


@app.command()
def measure(  # noqa: PLR0913 - every parameter is an option of the command
    models: Annotated[list[Path], typer.Argument(help="ONNX files, of any origin.")],
    baseline: Annotated[
        Path | None, typer.Option(help="What the others are compared with; by default the first.")
    ] = None,
    device: Annotated[str, typer.Option(help="A device profile: short name or YAML file.")] = "cpu",
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these of the profile's runtimes, beside the baseline in the first one, "
            "which is always measured; repeatable."
        ),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="An .npz file, one array per input; else random values.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Size of an open axis, NAME=N; repeatable.")
    ] = None,
    energy: Annotated[bool, typer.Option("--energy", help="Meter the energy too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Wider intervals, sooner.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure ONNX files on a device, each in turn with a baseline: speed, memory, energy.

    Example: autocompress measure small.onnx --baseline original.onnx --device cpu
    """
    from autocompress.device import load_profile
    from autocompress.report.measured import Wanted, measure_files, measured_table

    profile = _settled(load_profile(device))
    names = tuple(runtime or profile.runtime_names)
    for name in names:
        profile.runtime(name)
    wanted = Wanted(
        baseline or models[0], tuple(models), names, inputs, _sizes(size or []), energy, quick
    )
    found, rows = measure_files(profile, wanted, say)
    if as_json:
        facts = found.model_dump(mode="json")
        print(json.dumps({"device": facts, "rows": [r.to_dict() for r in rows]}, indent=1))
    else:
        make_console().print(measured_table(profile, found, rows))


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
    as_json: AsJson = False,
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

    wanted = _settled(wanted)
    with tempfile.TemporaryDirectory() as scratch:
        with Worker(wanted, Path(scratch)) as worker:
            found, meter = worker.fingerprint, worker.meter()
        reports = {}
        for name in wanted.runtime_names:
            say(f"measuring in {name}: int8 against fp32, and the noise floor")
            reports[name] = probe(wanted, name, Path(scratch), 0)
    if as_json:
        probes = {name: report.to_dict() for name, report in reports.items()}
        data = {"device": found.model_dump(mode="json"), "probes": probes, "meter": asdict(meter)}
        print(json.dumps(data, indent=1))
    else:
        make_console().print(device_table(wanted, found, reports, meter))


@app.command()
def explain(
    run: RunFolder,
    candidate: Annotated[str, typer.Argument(help="A candidate, as front.csv calls it.")],
    everything: Annotated[bool, typer.Option("--all", help="Show every layer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say why a candidate is, or is not, faster than the original, layer by layer.

    Example: autocompress explain runs/digits stock_int8
    """
    from autocompress.report.explain import explanation_parts
    from autocompress.report.explain_run import explain as explain_candidate

    explanation = explain_candidate(run, candidate, say)
    if as_json:
        print(json.dumps(explanation.to_dict(), indent=1))
        return
    console = make_console()
    for part in explanation_parts(explanation, everything=everything):
        console.print(part)


def _settled(profile: DeviceProfile) -> DeviceProfile:
    """The profile as its device turns out to be; what it lacks is told."""
    from autocompress.measure.settle import settle

    with tempfile.TemporaryDirectory() as scratch:
        found, _, notes = settle(profile, Path(scratch))
    for note in notes:
        tell(note)
    return found


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
    console = make_console()
    for part in network_parts(report):
        console.print(part)


def _sizes(texts: list[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal() or not int(number):
            raise ConfigError("A size cannot be read.", given=text, allowed="NAME=N, N above zero")
        sizes[name] = int(number)
    return sizes
