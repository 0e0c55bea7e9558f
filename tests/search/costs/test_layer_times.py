from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import MeasurementError
from autocompress.plan import Decision
from autocompress.search.costs.layer_shapes import LayerState, PartShape
from autocompress.search.costs.layer_times import (
    Boundary,
    FileRow,
    LayerTimes,
    NodeRow,
    boundary_terms,
    fit_layer_times,
    node_terms,
    part_terms,
    precision_class,
)
from autocompress.techniques.codebook import Codebook
from autocompress.techniques.precision import Precision

INT8 = Precision(weight_bits=8, activation_bits=8)
DYNAMIC = Precision(weight_bits=8, activation_bits=8, activation_range="dynamic")
STORED = Precision(weight_bits=4, activation_bits=32)
LAYERS = tuple(f"layer{i}" for i in range(4))
OVERHEAD_MS = 2e-3


def conv(inputs: int, outputs: int, kernel: int = 3, positions: int = 64) -> PartShape:
    return PartShape(inputs, outputs, (kernel, kernel), (1, 1), 1, positions)


def true_ms(part: PartShape, decision: Decision | None) -> float:
    """A device whose kernels work on sixteen channels at a time; integers are thrice as fast."""
    full = part.positions * 9 * -(-part.in_channels // 16) * -(-part.out_channels // 16) * 256
    return 1e-3 + full / 6e7 / (1 if decision is None else 3) + part.out_elements * 1e-7


def make_files(count: int, seed: int, slow: str = "") -> tuple[list[NodeRow], list[FileRow]]:
    rng = np.random.default_rng(seed)
    nodes, files = [], []
    for _ in range(count):
        states: list[tuple[str, LayerState]] = []
        total, inputs = 5e-3, 16
        kinds = []
        for name in LAYERS:
            part = conv(inputs, int(rng.integers(1, 9)) * 8)
            decision = INT8 if rng.uniform() < 0.5 else None
            own = true_ms(part, decision) * (1.5 if name == slow else 1.0)
            states.append((name, LayerState((part,), decision)))
            nodes.append(NodeRow(name, part, precision_class(decision), own + OVERHEAD_MS))
            total, inputs = total + own, part.out_channels
            kinds.append((precision_class(decision), part.out_elements))
        boundaries = [Boundary((a, b), n) for (a, n), (b, _) in itertools.pairwise(kinds)]
        total += sum(2e-3 + 1e-6 * b.elements for b in boundaries if b.converts)
        files.append(FileRow(tuple(states), tuple(boundaries), total))
    return nodes, files


def mean_error(times: LayerTimes, files: list[FileRow]) -> float:
    return float(np.mean([abs(times.file_ms(f) / f.milliseconds - 1) for f in files]))


def test_a_few_files_tell_the_others() -> None:
    times = fit_layer_times(*make_files(10, 0))
    _, others = make_files(40, 1)
    assert mean_error(times, others) < 0.04
    for _, state in others[0].layers:
        found = times.layer_ms("layer0", state)
        assert found == pytest.approx(true_ms(state.parts[0], state.quantize), rel=0.2)


def test_what_profiling_costs_is_not_in_the_layers() -> None:
    nodes, files = make_files(10, 0)
    costly = [replace(row, milliseconds=row.milliseconds + 0.01) for row in nodes]
    plain, other = fit_layer_times(nodes, files), fit_layer_times(costly, files)
    _, others = make_files(10, 1)
    assert mean_error(other, others) < 0.06
    for name in ("profile of float", "profile of static"):
        assert other.weights[name] - plain.weights.get(name, 0.0) == pytest.approx(0.01, rel=0.2)


def test_a_slow_layer_has_its_own_correction() -> None:
    times = fit_layer_times(*make_files(12, 0, slow="layer2"))
    factor = {name: times.corrections[name, "float"] for name in LAYERS}
    assert max(factor, key=factor.__getitem__) == "layer2" and factor["layer2"] > 1.08
    _, others = make_files(20, 1, slow="layer2")
    assert mean_error(times, others) < 0.1


def test_one_row_of_a_layer_hardly_corrects_it() -> None:
    nodes, files = make_files(10, 0)
    part = nodes[0].part
    odd = NodeRow("odd", part, "float", 5 * (true_ms(part, None) + OVERHEAD_MS))
    assert 1.2 < fit_layer_times([*nodes, odd], files).corrections["odd", "float"] < 1.6


def test_without_rows_there_is_no_fit() -> None:
    nodes, files = make_files(2, 0)
    for given_nodes, given_files in ((nodes, []), ([], files)):
        with pytest.raises(MeasurementError, match="without profiled and measured"):
            fit_layer_times(given_nodes, given_files)
    zero = [replace(row, milliseconds=0.0) for row in nodes]
    with pytest.raises(MeasurementError):
        fit_layer_times(zero, files)


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (None, "float"),
        (INT8, "static"),
        (DYNAMIC, "dynamic"),
        (STORED, "stored"),
        (Precision(weight_bits=32, activation_bits=32), "float"),
        (Codebook(code_bits=4), "stored"),
    ],
)
def test_precision_classes(decision, expected) -> None:
    assert precision_class(decision) == expected


def test_only_changes_between_integers_and_floats_are_boundaries() -> None:
    for kind in (("float", "float"), ("static", "static"), ("float", "stored")):
        assert boundary_terms(Boundary(kind, 100)) == {}
    into = boundary_terms(Boundary(("float", "static"), 100))
    back = boundary_terms(Boundary(("static", "float"), 100))
    assert set(into.values()) == set(back.values()) == {1.0, 100.0}
    assert not set(into) & set(back)
    one, other = (
        boundary_terms(Boundary(kind, 9, summed=True))
        for kind in (("float", "static"), ("static", "float"))
    )
    assert one == other and not set(one) & set(into)


def test_channels_count_in_tiles() -> None:
    assert part_terms(conv(9, 17), "float")["float spatial macs of 8"] == 64 * 9 * 16 * 24
    assert part_terms(conv(9, 17), "float")["float spatial macs of 16"] == 64 * 9 * 16 * 32
    # A float kernel for images reads as many channels as there are; integers are padded.
    assert part_terms(conv(3, 8), "float")["float spatial macs of 8"] == 64 * 9 * 3 * 8
    assert part_terms(conv(3, 8), "static")["static spatial macs of 8"] == 64 * 9 * 8 * 8
    depthwise = PartShape(12, 12, (3, 3), (1, 1), 12, 10)
    assert part_terms(depthwise, "float")["float grouped macs of 8"] == 10 * 9 * 16


def test_stored_weights_run_as_floats_that_are_unpacked() -> None:
    part = conv(8, 8)
    stored = dict(part_terms(part, "stored"))
    assert stored.pop("stored weights") == part.weights
    assert stored == part_terms(part, "float")
    assert "profile of float" in node_terms(NodeRow("a", part, "stored", 1.0))


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 64), st.floats(1e-4, 10)),
        min_size=2,
        max_size=6,
    )
)
def test_times_are_finite_and_never_negative(rows) -> None:
    nodes = [NodeRow("a", conv(i, o), "float", ms) for i, o, ms in rows]
    files = [FileRow((("a", LayerState((conv(i, o),))),), (), ms) for i, o, ms in rows]
    times = fit_layer_times(nodes, files)
    for row in files:
        assert math.isfinite(times.file_ms(row)) and times.file_ms(row) >= 0
    assert all(weight >= 0 for weight in times.weights.values())
