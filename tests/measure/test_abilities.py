"""What a device turns out to be able to do, and what becomes of its profile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from networks import assemble, bank_of, exporter_of, graph_of, make_case, make_device
from pydantic import ValidationError

from autocompress.device import (
    DeviceProfile,
    OnnxRuntimeCpuSettings,
    OpenVinoSettings,
    TensorRtSettings,
    local_facts,
    make_fingerprint,
)
from autocompress.errors import DeviceError
from autocompress.export.quantize import quantize
from autocompress.measure import abilities
from autocompress.measure.abilities import Abilities, find_abilities, settled
from autocompress.measure.session import Placement
from autocompress.measure.settle import settle
from autocompress.plan import Plan, Step
from autocompress.search.space_rules import on_device
from autocompress.techniques import technique_named
from autocompress.techniques.precision import Precision

PLACEMENT = Placement(threads=1, gpu=0)
PLAIN = OnnxRuntimeCpuSettings(name="onnxruntime")
OPTIONAL = OpenVinoSettings(name="openvino", precision="bf16", optional=True)
INTEGERS = Precision(weight_bits=8, activation_bits=8)


class Fake:
    """A runtime that gives one value, or that is missing."""

    def __init__(self, share: float, missing: bool = False) -> None:
        self.share, self.missing = share, missing

    def check_available(self, settings: object) -> None:
        if self.missing:
            raise DeviceError("It has no kernels.", given="this CPU")

    def load(self, path: Path, settings: object, placement: object) -> Fake:
        session = ort.InferenceSession(path, _unfused(), providers=["CPUExecutionProvider"])
        self.session = session
        return self

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return [self.share * y for y in self.session.run(None, {"x": inputs[0]})]


def _unfused() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def device(*runtimes: OnnxRuntimeCpuSettings | OpenVinoSettings, **fields: object) -> DeviceProfile:
    return make_device().model_copy(update={"runtimes": runtimes or (PLAIN,), **fields})


def found(monkeypatch: pytest.MonkeyPatch, profile: DeviceProfile, **fakes: Fake) -> Abilities:
    monkeypatch.setattr(abilities, "runtime_for", lambda settings: fakes[settings.name])
    return find_abilities(profile, PLACEMENT)


def test_the_sums_are_as_large_as_bytes_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, cut = Fake(1.0), Fake(32767 / (2 * 255 * 127))
    assert found(monkeypatch, device(), onnxruntime=exact).saturating == ()
    assert found(monkeypatch, device(), onnxruntime=cut).saturating == ("onnxruntime",)


@pytest.mark.parametrize(
    "fields", [{"kernels": {"Conv": (32,)}}, {"integer_sums": "exact"}, {"kind": "cuda"}]
)
def test_sums_are_tried_only_where_they_matter(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, object]
) -> None:
    assert found(monkeypatch, device(**fields), onnxruntime=Fake(0.5)).saturating == ()


def test_only_optional_runtimes_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {"onnxruntime": Fake(1.0), "openvino": Fake(1.0, missing=True)}
    what = found(monkeypatch, device(PLAIN, OPTIONAL), **fakes)
    assert what.absent == {"openvino-bf16": "It has no kernels (this CPU)"}
    wanted = OPTIONAL.model_copy(update={"optional": False})
    with pytest.raises(DeviceError, match="no kernels"):
        found(monkeypatch, device(PLAIN, wanted), **fakes)


def test_a_profile_settles() -> None:
    profile = device(PLAIN, OPTIONAL)
    here = Abilities(absent={"openvino-bf16": "no kernels"}, saturating=("onnxruntime",))
    became, notes = settled(profile, here)
    assert became.runtime_names == ("onnxruntime",) and became.integer_sums == "saturating"
    assert len(notes) == 2 and "openvino-bf16" in notes[0] and "7 bits" in notes[1]
    became, notes = settled(profile, Abilities(absent={}, saturating=()))
    assert became.runtimes == profile.runtimes and became.integer_sums == "exact" and not notes


def test_the_baselines_runtime_is_never_optional() -> None:
    data = device(PLAIN).model_dump()
    data["runtimes"][0]["optional"] = True
    with pytest.raises(ValidationError, match="optional"):
        DeviceProfile.model_validate(data)


def test_an_optional_runtime_need_not_be_installed() -> None:
    missing = TensorRtSettings(name="tensorrt", optional=True)
    profile = device(PLAIN, missing)
    if missing.distributions and _installed(missing):
        pytest.skip("TensorRT's package is installed here")
    facts = local_facts(profile)
    assert tuple(facts.versions) == ("onnxruntime",)
    # What is left out makes no difference to what may be compared.
    assert make_fingerprint(profile, facts) == make_fingerprint(device(PLAIN), facts)
    with pytest.raises(DeviceError, match="not installed"):
        local_facts(device(PLAIN, missing.model_copy(update={"optional": False})))


def _installed(settings: TensorRtSettings) -> bool:
    from importlib import metadata

    names = {d.metadata["Name"] for d in metadata.distributions()}
    return bool(names & set(settings.distributions))


@pytest.mark.parametrize(("sums", "bits"), [("saturating", 7), ("exact", 8), ("auto", 8)])
def test_weights_for_integer_kernels_fit_into_their_sums(sums: str, bits: int) -> None:
    profile = device(integer_sums=sums)
    technique = technique_named("precision")
    assert on_device(technique, INTEGERS, profile).weight_bits == bits
    stored = INTEGERS.model_copy(update={"activation_bits": 32})
    assert on_device(technique, stored, profile) == stored


def test_a_device_is_asked(tmp_path: Path) -> None:
    profile, _, notes = settle(device(), tmp_path)
    assert profile.integer_sums in ("exact", "saturating")
    assert len(notes) == (profile.integer_sums == "saturating")


def test_fused_kernels_compute_what_is_in_a_file_for_this_device(tmp_path: Path) -> None:
    profile, _, _ = settle(device(), tmp_path)
    technique = technique_named("precision")
    decision = on_device(technique, INTEGERS, profile)
    steps = [Step(layer.name, decision) for layer in graph_of("residual").layers]
    network = assemble(bank_of("residual"), Plan(tuple(steps))).network
    inputs = [x.numpy() for x in make_case("residual").inputs]
    model = quantize(exporter_of("residual").export(network), inputs, profile).model
    fused, plain = (
        ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": inputs[0]})[0]
        for options in (ort.SessionOptions(), _unfused())
    )
    assert np.abs(fused - plain).max() < 0.05 * np.abs(plain).max()
