"""Sweeps: which searches they mean, how they go on, and what their table says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import ConfigError
from autocompress.pareto import non_dominated
from autocompress.report.sweep import covered_share, sweep_parts, sweep_rows, write_sweep
from autocompress.search import sweep as sweep_module
from autocompress.search.columns import COLUMNS
from autocompress.search.progress import Silent
from autocompress.search.sweep import Cell, Finished, cells_of, load_sweep, run_sweep

MAXIMISE = (True, False)
values = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8)


@pytest.fixture
def write_sweep_file(tiny_experiment: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        experiment = tiny_experiment()
        content = {"version": 1, "name": "grid", "experiments": [experiment.name]}
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def test_every_combination_is_meant_once(write_sweep_file: Callable[..., Path]) -> None:
    path = write_sweep_file(
        search_spaces=["cnn", "quantize_only"], samplers=["tpe", "random"], seeds=[0, 1, 2],
        time="2m",
    )  # fmt: skip
    cells = cells_of(load_sweep(path), path)
    assert len(cells) == len({cell.name for cell in cells}) == 12
    assert cells[0].name == "tiny-quick-cnn-tpe-0"
    assert cells[0].label == "cnn, tpe, seed 0"
    assert {cell.group for cell in cells} == {"tiny on quick"}
    for cell in cells:
        search = cell.experiment["search"]
        assert (search["time_s"], search["trials"]) == (120.0, None)
        assert Path(cell.experiment["workload"].partition(":")[0]).is_absolute()
        assert Path(cell.experiment["device"]).is_absolute()


def test_what_a_sweep_leaves_out_is_the_experiments_own(
    write_sweep_file: Callable[..., Path],
) -> None:
    path = write_sweep_file()
    (cell,) = cells_of(load_sweep(path), path)
    assert cell.experiment["search_space"] == "cnn"
    assert cell.experiment["search"]["trials"] == 6
    assert cell.experiment["search"]["sampler"] == "mutation"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "are the same(.|\n)*files of different names"),
        ({"experiments": []}, "experiments"),
        ({"samplers": ["best"]}, "samplers"),
        ({"time": "soon"}, "cannot be read"),
        ({"grid": 3}, "unknown key"),
    ],
)
def test_sweeps_that_mean_nothing_are_refused(
    write_sweep_file: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    path = write_sweep_file(**changes)
    with pytest.raises(ConfigError, match=message):
        cells_of(load_sweep(path), path)


class FakeSearch:
    """Stands for `python -m autocompress search`: writes a front, or fails, and notes its times."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        script = folder / "fake.py"
        script.write_text(
            "import pathlib, sys, time\n"
            f"folder = pathlib.Path({str(folder)!r})\n"
            "run = pathlib.Path(sys.argv[sys.argv.index('--run') + 1])\n"
            "begin = time.time()\n"
            "time.sleep(0.3)\n"
            "run.mkdir(parents=True, exist_ok=True)\n"
            "with (folder / 'times.txt').open('a') as file:\n"
            "    file.write(f'{run.name} {begin} {time.time()}\\n')\n"
            "if (folder / f'{run.name}.fail').exists():\n"
            "    sys.exit('the moon is in the wrong house')\n"
        )
        real = sweep_module.subprocess.Popen

        def start(command: Sequence[str], **settings: Any) -> Any:
            assert command[1:4] == ["-m", "autocompress", "search"]
            return real([sys.executable, str(script), *command[4:]], **settings)

        monkeypatch.setattr(sweep_module.subprocess, "Popen", start)
        monkeypatch.setattr(sweep_module, "_POLL_S", 0.02)

    def times(self) -> list[tuple[str, float, float]]:
        path = self.folder / "times.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(n, float(a), float(b)) for n, a, b in map(str.split, lines)]


def cells(*places: str) -> list[Cell]:
    return [Cell(f"c{i}", "g", f"l{i}", place, {"name": f"c{i}"}) for i, place in enumerate(places)]


def test_searches_run_once_and_what_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, out = FakeSearch(tmp_path, monkeypatch), tmp_path / "out"
    (tmp_path / "c1.fail").touch()
    done = run_sweep(cells("here", "here", "here"), out, [], Silent())
    assert [one.failure for one in done] == ["", "the moon is in the wrong house", ""]
    assert [name for name, _, _ in fake.times()] == ["c0", "c1", "c2"]
    (tmp_path / "c1.fail").unlink()
    done = run_sweep(cells("here", "here", "here"), out, [], Silent())
    assert [one.failure for one in done] == [""] * 3
    assert [name for name, _, _ in fake.times()] == ["c0", "c1", "c2", "c1"]
    # Another experiment under the same name is another search.
    changed = [Cell("c0", "g", "l0", "here", {"name": "c0", "seed": 1})]
    run_sweep(changed, out, [], Silent())
    assert len(fake.times()) == 5


def test_one_machine_measures_for_one_search_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSearch(tmp_path, monkeypatch)
    places = ("here", "here", "pi", "here", "pi")
    run_sweep(cells(*places), tmp_path / "out", [], Silent(), parallel=4)
    spans = {name: (begin, end) for name, begin, end in fake.times()}
    assert len(spans) == 5
    for place in ("here", "pi"):
        own = sorted(spans[f"c{i}"] for i, p in enumerate(places) if p == place)
        assert all(a[1] <= b[0] for a, b in pairwise(own))
    assert spans["c2"][0] < spans["c0"][1] + 0.2


@given(values, values)
def test_coverage_by_its_definition(own: list[Any], other: list[Any]) -> None:
    share = covered_share(np.array(own, float), np.array(other, float), MAXIMISE)
    covered = [any(b[0] >= a[0] and b[1] <= a[1] for b in other) for a in own]
    assert share == pytest.approx(np.mean(covered))


@given(values)
def test_a_front_covers_itself_and_all_it_dominates(points: list[Any]) -> None:
    array = np.array(points, float)
    front = array[non_dominated(array, maximise=MAXIMISE)]
    assert covered_share(array, front, MAXIMISE) == 1.0
    assert covered_share(front, front, MAXIMISE) == 1.0
    assert covered_share(front, front[:0], MAXIMISE) == 0.0


def run_folder(path: Path, points: Sequence[tuple[float, float]]) -> Path:
    """A finished run whose finalists have so many points lost and such speed-ups."""
    rows = [("original", "original", 0.0, 1.0), *(
        (f"c{i}", "finalist", drop, speedup) for i, (drop, speedup) in enumerate(points)
    )]  # fmt: skip
    frame = pd.DataFrame(
        {
            "candidate": [r[0] for r in rows], "role": [r[1] for r in rows], "on_front": True,
            "metric_search": 0.9, "metric_test": [0.9 - r[2] / 100 for r in rows],
            "drop_test_pp": [r[2] for r in rows], "speedup": [r[3] for r in rows],
            "latency_ms": [1 / r[3] for r in rows], "file_bytes": 1000.0, "trusted": True,
            "runtime": "onnxruntime", "download_bytes": [1000 / r[3] for r in rows],
        }
    )  # fmt: skip
    path.mkdir(parents=True)
    for name in COLUMNS:
        if name not in frame:
            frame[name] = np.nan
    frame.to_csv(path / "front.csv", index=False)
    return path


def test_a_users_metric_may_lose_a_hundredth_of_the_originals(tmp_path: Path) -> None:
    one = finished(tmp_path, 0, [(0.5, 3.0), (50.0, 9.0)])
    frame = pd.read_csv(one.run / "front.csv").assign(metric_unit="metric")
    frame["drop_test_pp"] /= 100
    frame.to_csv(one.run / "front.csv", index=False)
    assert sweep_rows([one])[0].speedup == 3.0
    write_sweep(sweep_rows([one]), [one], tmp_path)
    page = (tmp_path / "sweep.html").read_text()
    assert "metric lost" in page and "points lost" not in page


def finished(tmp_path: Path, number: int, points: Sequence[tuple[float, float]]) -> Finished:
    experiment = {"objectives": ["metric", "latency"]}
    cell = Cell(f"c{number}", "tiny on quick", f"space {number}", "here", experiment)
    return Finished(cell, run_folder(tmp_path / cell.name, points), 60.0)


def test_the_table_says_who_dominates_whom(tmp_path: Path) -> None:
    better = finished(tmp_path, 0, [(0.2, 4.0), (0.8, 8.0)])
    worse = finished(tmp_path, 1, [(0.5, 3.0), (2.0, 9.0)])
    failed = Finished(Cell("c2", "tiny on quick", "x", "here", {}), tmp_path, 1.0, "it broke")
    rows = sweep_rows([better, worse, failed])
    assert [(row.points, row.on_joint_front) for row in rows] == [(2, 2), (2, 1)]
    assert [row.covered for row in rows] == [0.0, 0.5]
    assert rows[0].speedup == 8.0 and rows[1].speedup == 3.0
    assert rows[0].download_bytes == pytest.approx(125.0)
    assert 0 < rows[1].volume < rows[0].volume < 1
    write_sweep(rows, [better, worse, failed], tmp_path)
    frame = pd.read_csv(tmp_path / "sweep.csv")
    assert frame["label"].tolist() == ["space 0", "space 1"]
    assert "times faster" in (tmp_path / "sweep.html").read_text()
    assert any("it broke" in str(part) for part in sweep_parts(rows, [failed]))
