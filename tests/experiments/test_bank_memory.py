from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from test_plain_loop import SEARCH

MOST_BYTES = 8e9


@pytest.fixture
def bank_memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SEARCH.parent / "memory"))
    return importlib.import_module("bank_memory")


def figures(**changes: Any) -> dict[str, Any]:
    phases = [{"phase": "fill bank", "seconds": 1.25, "steps": 3, "peak_bytes": 2_500_000_000}]
    found = {"parameters": 1e8, "phases": phases, "peak_bytes": 2_600_000_000}
    return {**found, "bank_bytes": 10_000_000, "seconds": 9.6, **changes}


def test_the_table_stands_in_the_place_of_the_last_one(bank_memory, tmp_path, monkeypatch) -> None:
    readme = tmp_path / "README.md"
    begin, end = bank_memory.TABLE_BEGIN, bank_memory.TABLE_END
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(bank_memory, "HERE", tmp_path)
    bank_memory.write_table(bank_memory.table({"one": figures(), "two": figures()}))
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["before", begin] and lines[-2:] == [end, "after"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-2]]
    assert rows[0] == list(bank_memory.COLUMNS) and len(rows) == 2 + 2 * 2
    assert rows[2] == ["one", "fill bank", "1.2", "2.50 GB", ""]
    assert rows[3] == ["**one**, 100 million parameters", "all", "10", "2.60 GB", "0.01 GB"]


@pytest.mark.parametrize("named", [[], ["encoder_quick"]])
def test_a_run_for_named_networks_leaves_the_published_table(
    bank_memory, monkeypatch, capsys, named: list[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(bank_memory, "measured", lambda name: figures())
    monkeypatch.setattr(bank_memory, "write_table", written.append)
    monkeypatch.setattr(sys, "argv", ["bank_memory.py", *named])
    bank_memory.main()
    assert len(written) == (0 if named else 1)
    assert ("encoder_quick" in capsys.readouterr().out) == bool(named)
    assert all("encoder" in text and "convolutions" in text for text in written)


_PHASES = """
import json, sys
from bank_memory import Phases

phases = Phases()
phases.stage("large", 2)
held = bytearray(300_000_000)
phases.advance()
phases.advance(2)
phases.stage("small")
del held
phases.stage("end")
print(json.dumps(list(phases.rows)))
"""


def test_phases_keep_what_they_took() -> None:
    # In a process of its own: this one may have had a higher peak before.
    folder = str(SEARCH.parent / "memory")
    paths = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", _PHASES],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    start, large, small = json.loads(run.stdout.splitlines()[-1])
    assert [row["phase"] for row in (start, large, small)] == ["start", "large", "small"]
    assert [row["steps"] for row in (start, large, small)] == [0, 3, 0]
    assert large["peak_bytes"] - start["peak_bytes"] > 0.8 * 300_000_000


@pytest.mark.slow
def test_the_bank_of_a_hundred_million_parameters_needs_less_than_8_gb(bank_memory) -> None:
    pytest.importorskip("transformers")
    found = bank_memory.measured("encoder_quick")
    assert found["parameters"] > 1e8
    steps = {row["phase"]: row["steps"] for row in found["phases"]}
    assert steps["calibrate"] == 1 and steps["fill bank"] > 10
    assert steps.keys() >= {"export network", "candidate"}
    assert max(found["peak_bytes"], found["child_peak_bytes"]) < MOST_BYTES
