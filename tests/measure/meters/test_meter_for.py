from __future__ import annotations

from typing import get_args

import pytest

from autocompress.device import EnergySettings
from autocompress.errors import DeviceError
from autocompress.measure import meters
from autocompress.measure.energy import meter_report
from autocompress.measure.meters import METERS, Meter, MeterKind, Missing, meter_for


def test_the_meters_are_those_that_a_profile_may_name() -> None:
    named = get_args(EnergySettings.model_fields["meter"].annotation)
    assert named == ("auto", *(kind.name for kind in METERS))


@pytest.mark.parametrize("kind", METERS, ids=lambda kind: kind.name)
def test_a_meter_works_or_says_why_not(kind: MeterKind, device_profile) -> None:
    found = kind.find(device_profile(kind=kind.covers[0]))
    if isinstance(found, Missing):
        assert found.what and found.remedy
        return
    assert found.facts.name == kind.name and found.facts.scope
    first = found.read()
    assert found.read() >= (first if found.facts.reads == "counter" else 0)
    assert found.facts.poll_s > 0 and found.facts.update_period_s > 0
    found.close()


@pytest.fixture
def no_meters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without meters, each with a reason of its own."""

    def lacking(kind: MeterKind) -> MeterKind:
        why = Missing(f"no {kind.name} here", f"buy {kind.name}")
        return MeterKind(kind.name, kind.covers, lambda profile: why)

    monkeypatch.setattr(meters, "METERS", tuple(lacking(kind) for kind in METERS))


@pytest.mark.parametrize(
    ("kind", "meter", "tried"),
    [
        ("cpu", "auto", ("rapl", "sysfs", "zeus")),
        ("cuda", "auto", ("nvml", "sysfs", "zeus")),
        ("cpu", "nvml", ("nvml",)),
        ("cuda", "rapl", ("rapl",)),
    ],
)
def test_the_refusal_names_what_was_tried(no_meters, device_profile, kind, meter, tried) -> None:
    profile = device_profile(kind=kind, energy={"meter": meter})
    with pytest.raises(DeviceError) as refused:
        meter_for(profile)
    text = str(refused.value)
    places = [text.index(f"no {name} here") for name in tried]
    assert places == sorted(places)
    for name in ("nvml", "rapl", "sysfs", "zeus"):
        assert (f"buy {name}" in text) == (name in tried)
    assert f"energy.meter {meter}" in text and kind in text and "objectives" in text
    report = meter_report(profile)
    assert report.name is None and report.reason == text and report.idle_mw is None


def test_the_first_that_is_there_is_taken(monkeypatch, no_meters, device_profile) -> None:
    class Fixed(Meter):
        facts = None  # type: ignore[assignment]
        read = temperature_c = other_processes = close = lambda self: None  # type: ignore

    fixed = Fixed()
    kinds = [
        kind if kind.name == "rapl" else MeterKind(kind.name, kind.covers, lambda profile: fixed)
        for kind in meters.METERS
    ]
    monkeypatch.setattr(meters, "METERS", tuple(kinds))
    assert meter_for(device_profile()) is fixed
    with pytest.raises(DeviceError, match="no rapl here"):
        meter_for(device_profile(energy={"meter": "rapl"}))
