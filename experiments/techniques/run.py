"""Every technique alone on the Fashion-MNIST network: one row each of `rows.yaml`, measured.

Example: python experiments/techniques/run.py --only filter_prune

Each row is on disk as soon as it is finished; calling it again measures what is missing, and writes
the table of this folder's README anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fashion_mnist import workload as load_workload  # noqa: E402

from autocompress.bank import Bank  # noqa: E402
from autocompress.build import BASELINE, Builder  # noqa: E402
from autocompress.config import CalibrationSettings  # noqa: E402
from autocompress.device import DeviceProfile, load_profile  # noqa: E402
from autocompress.errors import AutocompressError  # noqa: E402
from autocompress.evaluate import Device, Evaluator, Extras  # noqa: E402
from autocompress.evaluation import Evaluation  # noqa: E402
from autocompress.export.exporter import Exporter  # noqa: E402
from autocompress.files import write_json  # noqa: E402
from autocompress.graph import NetworkGraph, trace  # noqa: E402
from autocompress.measure.host import host_of  # noqa: E402
from autocompress.plan import Decision, Plan, Step, make_decision  # noqa: E402
from autocompress.search.arrange import arranged  # noqa: E402
from autocompress.techniques import (  # noqa: E402
    NETWORK,
    BlockTechnique,
    GroupTechnique,
    LayerTechnique,
    technique_named,
)

TABLE_BEGIN, TABLE_END = "<!-- table -->", "<!-- end of table -->"
EXAMPLE_DEVICE = "cpu"


@final
@dataclass(frozen=True)
class Row:
    """One row of the table: what is done everywhere, and how it is recovered afterwards.

    `exclude` names layers that stay as they are; `coupled` takes coupled channel groups in.
    """

    name: str
    strength: str
    decisions: tuple[Decision, ...]
    recovery: Decision | None
    exclude: tuple[str, ...]
    coupled: bool

    @property
    def key(self) -> str:
        """The row's file name."""
        return f"{self.name} {self.strength}".replace("/", "-").replace(" ", "_")


def read_rows(path: Path) -> list[Row]:
    """The rows of a YAML file: a list of name, strength, steps, recovery, exclude and coupled."""
    rows = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        recovery = entry.get("recovery")
        rows.append(
            Row(
                entry["name"],
                str(entry["strength"]),
                tuple(_decision(step) for step in entry["steps"]),
                _decision(recovery) if recovery else None,
                tuple(entry.get("exclude", ())),
                bool(entry.get("coupled", False)),
            )
        )
    return rows


def _decision(step: Mapping[str, Any]) -> Decision:
    fields = dict(step)
    return make_decision(technique_named(fields.pop("technique")).decision, fields)


def plan_of(row: Row, graph: NetworkGraph, device: DeviceProfile, *, recovered: bool) -> Plan:
    """The row's decisions wherever they make sense; of the groups, uncoupled ones or all.

    Of the blocks the last alone: a network without any is none.
    """
    steps: list[Step] = []
    decisions = [*row.decisions, *([row.recovery] if recovered and row.recovery else [])]
    for decision in decisions:
        technique = technique_named(decision.technique)
        if isinstance(technique, GroupTechnique):
            for group in graph.groups:
                free = row.coupled or "+" not in group.name
                if free and technique.choices(group, [decision], device):
                    steps.append(Step(group.name, decision))
        elif isinstance(technique, BlockTechnique):
            steps += [Step(block.name, decision) for block in graph.blocks[-1:]]
        elif isinstance(technique, LayerTechnique):
            for layer in graph.layers:
                free = layer.name not in row.exclude
                if free and technique.choices(layer, [decision], device):
                    steps.append(Step(layer.name, decision))
        else:
            steps.append(Step(NETWORK, decision))
    return Plan(tuple(steps))


@final
class Bench:
    """Measures rows in one folder, each once."""

    def __init__(self, folder: Path) -> None:
        workload = arranged(load_workload())
        self._device = load_profile(EXAMPLE_DEVICE)
        self._graph = trace(workload.network, workload.example_inputs)
        parity = tuple(x[:8] for x in workload.calibration.inputs)
        exporter = Exporter(workload.network, self._graph, workload.example_inputs, parity)
        settings = CalibrationSettings()
        bank = Bank(workload.network, self._graph, self._device.channel_multiple, folder / "bank")
        bank.calibrate(workload.calibration.inputs, settings)
        builder = Builder(workload, exporter, bank, self._device, settings, folder)
        self._builder = builder
        device = Device(self._device, host_of(self._device))
        extras = Extras(coded=True, energy=False, memory=True)
        self.evaluator = Evaluator(workload, builder, device, folder, extras)
        self._folder = folder / "rows"
        self._folder.mkdir(exist_ok=True)

    def original(self) -> Evaluation:
        """The original network's figures."""
        return self._evaluate("original", Plan())

    def row(self, row: Row) -> dict[str, Any]:
        """A row's figures before and after recovery."""
        before = self._measured(row, recovered=False)
        after = self._measured(row, recovered=True) if row.recovery else None
        return {"name": row.name, "strength": row.strength, "before": before, "after": after}

    def _measured(self, row: Row, *, recovered: bool) -> dict[str, Any] | str:
        plan = plan_of(row, self._graph, self._device, recovered=recovered)
        try:
            return self._evaluate(row.key + ("_recovered" if recovered else ""), plan).to_dict()
        except AutocompressError as reason:
            return str(reason)

    def _evaluate(self, name: str, plan: Plan) -> Evaluation:
        kept = self._folder / f"{name}.json"
        if kept.is_file():
            found = Evaluation.from_dict(json.loads(kept.read_text(encoding="utf-8")))
            same = found.plan == tuple(plan.to_rows())
            if same and found.latency.device == self.evaluator.fingerprint.id:
                return found
        # Speed-ups are relative to the original's file.
        artifact = self._builder.build(name if plan.steps else BASELINE, plan)
        runtime = self._device.runtime_names[0]
        found = self.evaluator.measure(artifact, plan, runtime, "test", final=False)
        write_json(kept, found.to_dict())
        return found


def table(original: Evaluation, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| technique | strength | accuracy | recovered | speed-up | file | coded | peak memory "
        "| put together in | runs as |",
        "|---|---|---|---|---|---|---|---|---|---|",
        _line("original", "", original.to_dict(), None),
    ]
    lines += [_line(row["name"], row["strength"], row["before"], row["after"]) for row in rows]
    return "\n".join(lines) + "\n"


def _line(name: str, strength: str, before: Any, after: Any) -> str:
    if isinstance(before, str):
        return f"| {name} | {strength} | refused: {before.splitlines()[0]} | | | | | | | |"
    speedup, seconds = before["speedup"], before["seconds"]
    solved = sum(v for k, v in seconds.items() if k in ("stitch", "round", "equalize"))
    kinds = sorted(set(before["details"].get("layers", {}).values()))
    recovered = "" if after is None else _percent(after)
    cells = [
        name, strength, _percent(before), recovered,
        f"{speedup['value']:.2f}x [{speedup['ci_low']:.2f}, {speedup['ci_high']:.2f}]",
        _kilobytes(before["file_bytes"]), _kilobytes(before["download_bytes"]),
        f"{before['peak_memory_bytes'] / 1e6:.1f} MB", f"{solved:.1f} s",
        ", ".join(kinds) or "float",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _percent(evaluation: Mapping[str, Any] | str) -> str:
    if isinstance(evaluation, str):
        return f"failed: {evaluation.splitlines()[0]}"
    return f"{100 * evaluation['metric']['value']:.2f} %"


def _kilobytes(count: int) -> str:
    return f"{count / 1000:.0f} kB"


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name begins so")
    parser.add_argument("--folder", type=Path, default=Path("runs/techniques"))
    parser.add_argument("--rows", type=Path, default=HERE / "rows.yaml")
    arguments = parser.parse_args()
    rows = [r for r in read_rows(arguments.rows) if r.name.startswith(arguments.only)]
    bench = Bench(arguments.folder)
    with bench.evaluator:
        original = bench.original()
        measured = []
        for number, row in enumerate(rows, 1):
            print(f"[{number}/{len(rows)}] {row.name} {row.strength}", flush=True)
            measured.append(bench.row(row))
            print(_line(row.name, row.strength, measured[-1]["before"], measured[-1]["after"]))
    if not arguments.only and arguments.rows.resolve() == HERE / "rows.yaml":
        readme = HERE / "README.md"
        head, _, rest = readme.read_text(encoding="utf-8").partition(TABLE_BEGIN)
        tail = rest.partition(TABLE_END)[2]
        text = f"{head}{TABLE_BEGIN}\n{table(original, measured)}{TABLE_END}{tail}"
        readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
