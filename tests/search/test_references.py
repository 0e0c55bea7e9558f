"""Reference points where a runtime or a tool fails."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autocompress.errors import ExportError, MeasurementError, WorkloadError
from autocompress.evaluate import Measured
from autocompress.search.progress import Silent
from autocompress.search.references import measure_references
from autocompress.search.run_folder import RunFolder


def context_of(folder: Path, make: Any, fails: dict[str, Exception]) -> Any:
    """A search in two runtimes, of which `fails` names files in runtimes that fail."""
    (folder / "finals").mkdir()
    notes: list[str] = []

    def measure(artifact: str, plan: Any, runtime: str) -> Future[Measured]:
        name = artifact if runtime == "onnxruntime" else f"{artifact}@{runtime}"
        done: Future[Measured] = Future()
        if name in fails:
            done.set_exception(fails[name])
        else:
            done.set_result(Measured(make(name, 0.9, 1.0), None))
        return done

    progress = Silent()
    return SimpleNamespace(
        runtimes=("onnxruntime", "openvino"),
        folder=RunFolder(folder),
        measure_uncoded=measure,
        progress=SimpleNamespace(
            stage=progress.stage, advance=progress.advance, note=notes.append, notes=notes
        ),
        evaluator=SimpleNamespace(
            build_original=lambda: "original",
            build_stock=lambda name: name,
            with_code=lambda measured: measured.evaluation,
        ),
    )


@pytest.mark.parametrize("kind", [ExportError, MeasurementError, WorkloadError])
def test_a_runtime_that_fails_is_told_and_left_out(
    tmp_path: Path, make_evaluation: Any, kind: type[Exception]
) -> None:
    context = context_of(tmp_path, make_evaluation, {"original@openvino": kind("It overflows.")})
    found = measure_references(context)
    assert [e.candidate for e in found] == ["original", "stock_int8"]
    assert context.progress.notes == ["no reference point original@openvino: It overflows."]
    assert context.folder.evaluation("original", "search") == found[0]


@pytest.mark.parametrize("kind", [ExportError, MeasurementError, WorkloadError])
def test_the_original_has_to_work_in_the_first_runtime(
    tmp_path: Path, make_evaluation: Any, kind: type[Exception]
) -> None:
    context = context_of(tmp_path, make_evaluation, {"original": kind("It overflows.")})
    with pytest.raises(kind, match="overflows"):
        measure_references(context)
