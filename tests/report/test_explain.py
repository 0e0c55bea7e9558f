from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import yaml
from rich.console import Console

from autocompress.device import (
    DeviceProfile,
    OnnxRuntimeCpuSettings,
    OpenVinoSettings,
    make_fingerprint,
)
from autocompress.device.facts import local_facts
from autocompress.errors import RunFolderError
from autocompress.measure.arrays import write_arrays
from autocompress.measure.explain.explanation import Explanation, Speed
from autocompress.report.explain import explanation_parts, layer_table
from autocompress.report.explain_run import explain, explain_files

MEASURE = Path(__file__).parents[1] / "measure"
sys.path[:0] = [str(MEASURE / "explain"), str(MEASURE)]

from explain_models import CHANNELS, Rounded, chain  # noqa: E402
from measuring import make_profile  # noqa: E402

PAIRED = {
    "baseline_ms": 1.0, "candidate_ms": 1.25, "speedup": 0.8, "speedup_low": 0.79,
    "speedup_high": 0.81, "reason": "",
}  # fmt: skip
SIGNED = Rounded(input_type=np.int8, output_type=np.int8, shared=True)


@pytest.fixture(scope="module")
def profile() -> DeviceProfile:
    return make_profile()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = folder / "float.onnx", folder / "signed.onnx"
    onnx.save(chain((CHANNELS, CHANNELS)), paths[0])
    onnx.save(SIGNED.model(), paths[1])
    return paths


@pytest.fixture(scope="module")
def explained(models: tuple[Path, Path], profile: DeviceProfile) -> Explanation:
    return explain_files(*models, profile, "onnxruntime")


@pytest.fixture
def finished(
    tmp_path: Path, models: tuple[Path, Path], profile: DeviceProfile, make_row: Any
) -> Path:
    """A run folder with the original and one slower plan, measured on this machine."""
    run = tmp_path / "run"
    for name in ("artifacts", "measurements", "scratch"):
        (run / name).mkdir(parents=True)
    for name, path in zip(("original", "plan"), models, strict=True):
        (run / "artifacts" / f"{name}.onnx").write_bytes(path.read_bytes())
    rows = [make_row("original", "original"), make_row("plan")]
    pd.DataFrame(rows).to_csv(run / "front.csv", index=False)
    device = make_fingerprint(profile, local_facts(profile))
    (run / "device.json").write_text(json.dumps(device.model_dump(mode="json")))
    settings = {"device_profile": profile.model_dump(mode="json")}
    (run / "experiment.yaml").write_text(yaml.safe_dump(settings))
    (run / "measurements" / "plan-search.json").write_text(json.dumps(PAIRED))
    return run


def printed(explanation: Explanation, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for part in explanation_parts(explanation, width=width):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_signed_activations_are_named_as_the_cause(explained: Explanation) -> None:
    # Which finding comes first is a matter of measured times.
    finding = next(f for f in explained.findings if f.kind == "float_fallback")
    assert finding.layers == ("l",)
    assert "QUInt8" in finding.advice
    assert sum(explained.to_dict()["time_ms"]["candidate"].values()) == pytest.approx(
        explained.speed.candidate_ms
    )


def test_random_inputs_are_owned_up_to(explained: Explanation) -> None:
    assert any("random inputs" in note for note in explained.notes)


@pytest.mark.parametrize("width", [80, 100])
def test_everything_fits_the_width(explained: Explanation, width: int) -> None:
    lines = printed(explained, width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(line.strip() for line in lines)
    for finding in explained.findings:
        assert finding.seen.split()[0] in text
    assert "(not int8)" in text


def test_many_layers_are_cut_to_those_that_take_the_time(explained: Explanation) -> None:
    change = explained.changes[0]
    changes = tuple(change for _ in range(60))
    many = replace(
        explained, changes=tuple(replace(c, name=f"l{i}") for i, c in enumerate(changes))
    )
    assert layer_table(many).row_count == 40
    assert "20 more layers" in str(layer_table(many).caption)
    assert layer_table(many, everything=True).row_count == 60


def test_a_runs_candidate_is_explained_by_the_runs_own_measurement(finished: Path) -> None:
    told: list[str] = []
    explanation = explain(finished, "plan", told.append)
    assert explanation.speed == Speed(1.0, 1.25, 0.8, 0.79, 0.81)
    assert explanation.verdict.startswith("Slower: 0.80 x")
    assert "float_fallback" in {finding.kind for finding in explanation.findings}
    assert all(text.startswith("profiling") for text in told)


def test_stored_inputs_that_fit_are_used(finished: Path) -> None:
    write_arrays(finished / "scratch" / "inputs-a.npz", [np.ones((1, 3), np.float32)])
    write_arrays(finished / "scratch" / "inputs-b.npz", SIGNED.inputs())
    assert not any("random" in note for note in explain(finished, "plan").notes)


def test_a_candidate_that_is_not_there(finished: Path) -> None:
    with pytest.raises(RunFolderError, match="no such candidate") as error:
        explain(finished, "plam")
    assert error.value.allowed == "original, plan"


def test_the_original_is_what_others_are_compared_with(finished: Path) -> None:
    with pytest.raises(RunFolderError, match="compared with"):
        explain(finished, "original")


def test_a_model_that_is_gone(finished: Path) -> None:
    (finished / "artifacts" / "plan.onnx").unlink()
    with pytest.raises(RunFolderError, match="gone"):
        explain(finished, "plan")


def test_a_run_of_another_device_is_refused(finished: Path) -> None:
    path = finished / "device.json"
    device = json.loads(path.read_text()) | {"cpu_model": "Another CPU"}
    path.write_text(json.dumps(device))
    with pytest.raises(RunFolderError, match="another device") as error:
        explain(finished, "plan")
    assert "Another CPU" in str(error.value.given)


def test_a_run_of_an_earlier_version_is_refused_in_words(finished: Path) -> None:
    (finished / "experiment.yaml").write_text(yaml.safe_dump({"device_profile": {"version": 1}}))
    with pytest.raises(RunFolderError, match="not a valid DeviceProfile"):
        explain(finished, "plan")


def test_a_layer_that_is_gone_and_one_that_is_new_have_their_rows(explained: Explanation) -> None:
    whole = explained.changes[0]
    changes = (replace(whole, after=()), replace(whole, name="new", before=None))
    text = printed(replace(explained, changes=changes))
    assert "gone" in text and "new" in text


def test_a_candidate_of_another_runtime_is_compared_within_it(
    finished: Path, make_row: Any
) -> None:
    openvino = OpenVinoSettings(name="openvino")
    profile = make_profile(OnnxRuntimeCpuSettings(name="onnxruntime"), openvino)
    settings = {"device_profile": profile.model_dump(mode="json")}
    (finished / "experiment.yaml").write_text(yaml.safe_dump(settings))
    rows = [make_row("plan@openvino-f32", runtime="openvino-f32", artifact="artifacts/plan.onnx")]
    pd.DataFrame(rows).to_csv(finished / "front.csv", index=False)
    own = {**PAIRED, "candidate_ms": 0.5, "speedup": 2.0}
    for name, figures in (("original", own), ("plan", PAIRED)):
        path = finished / "measurements" / f"{name}@openvino-f32-test.json"
        path.write_text(json.dumps(figures))
    explanation = explain(finished, "plan@openvino-f32")
    assert explanation.runtime == "openvino-f32"
    assert explanation.runtime_speedup == 2.0
    assert explanation.baseline.latency_ms == 0.5
    # OpenVINO runs the signed layer in integers.
    assert [f.kind for f in explanation.findings if f.kind == "float_fallback"] == []
