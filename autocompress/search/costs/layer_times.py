"""What a layer takes in a runtime, by its shape: a regression on few profiled files.

A profile's node times hold what profiling costs, and leave out what runs between layers. So node
times and whole latencies are fitted together, by nonnegative least squares of relative errors
(Lawson & Hanson 1974): layers' terms are in both, a node's overhead is in node times only, and
boundaries between integers and floats, sums and the constant are in latencies only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autocompress.errors import MeasurementError
from autocompress.plan import Decision
from autocompress.search.costs.layer_shapes import LayerState, PartShape
from autocompress.techniques.precision import Precision

PrecisionClass = Literal["float", "stored", "static", "dynamic"]
Terms = Mapping[str, float]

# Standard deviations that the fit believes in, as shares; node times also count in half a μs.
_NODE_ERROR, _NODE_RESOLUTION_MS, _FILE_ERROR = 0.1, 5e-4, 0.02
# Terms that the rows cannot tell apart share; in units of a column's norm.
_RIDGE: Final = 0.03
# A layer's own correction counts as much as the regression after so many rows.
_SHRINKAGE: Final = 4.0
_MOST_CORRECTION: Final = 2.0
_TILES: Final = (8, 16)


@final
@dataclass(frozen=True)
class NodeRow:
    """The time of one part of a layer in a profile.

    Attributes:
        layer: the network's layer that the part is of.
    """

    layer: str
    part: PartShape
    precision: PrecisionClass
    milliseconds: float


@final
@dataclass(frozen=True)
class Boundary:
    """Values that go from one layer to another, or of two layers that are summed.

    Attributes:
        kind: what both compute in, the producer first.
        elements: per sample.
        summed: whether both are producers, whose values meet.
    """

    kind: tuple[PrecisionClass, PrecisionClass]
    elements: int
    summed: bool = False

    @property
    def converts(self) -> bool:
        """Whether they change between integers and floats, or may."""
        return _integer(self.kind[0]) != _integer(self.kind[1])


@final
@dataclass(frozen=True)
class FileRow:
    """A whole file: the state of every layer, what goes between them, and its latency in ms.

    Attributes:
        in_blocks: values that the layers of blocks give which might be gone and are not.
    """

    layers: tuple[tuple[str, LayerState], ...]
    boundaries: tuple[Boundary, ...]
    milliseconds: float
    in_blocks: int = 0


@final
@dataclass(frozen=True)
class LayerTimes:
    """Times of layers and boundaries; every term's milliseconds per unit.

    Attributes:
        weights: by the names that terms have.
        corrections: factors of single layers, by layer and precision; others have 1.
    """

    weights: Mapping[str, float]
    corrections: Mapping[tuple[str, PrecisionClass], float]

    @property
    def constant_ms(self) -> float:
        """What a run takes beside its layers."""
        return self.weights.get("run", 0.0)

    def layer_ms(self, layer: str, state: LayerState) -> float:
        """The time of a layer in some state, and of what follows it, such as a sum."""
        kind = precision_class(state.quantize)
        own = sum(self._sum(part_terms(part, kind)) for part in state.parts)
        return own * self.corrections.get((layer, kind), 1.0) + self._sum(layer_terms(state))

    def block_ms(self, elements: int) -> float:
        """The time of what is in a block beside its layers and what follows them."""
        return self._sum(block_terms(elements))

    def boundary_ms(self, boundary: Boundary) -> float:
        """The time of a boundary; 0 where nothing is converted."""
        return self._sum(boundary_terms(boundary))

    def file_ms(self, row: FileRow) -> float:
        """The latency that a file should have."""
        layers = sum(self.layer_ms(name, state) for name, state in row.layers)
        layers += self.block_ms(row.in_blocks)
        return self.constant_ms + layers + sum(self.boundary_ms(b) for b in row.boundaries)

    def _sum(self, terms: Terms) -> float:
        return sum(self.weights.get(name, 0.0) * value for name, value in terms.items())


def precision_class(decision: Decision | None) -> PrecisionClass:
    """What a layer computes in; `stored` is floats from weights that are stored otherwise."""
    if decision is None:
        return "float"
    if not isinstance(decision, Precision):
        return "stored"
    if decision.activation_bits == 8 and decision.weight_bits <= 8:
        return "static" if decision.activation_range == "static" else "dynamic"
    return "float" if decision.weight_bits == 32 else "stored"


def _integer(kind: PrecisionClass) -> bool:
    return kind == "static"


def part_terms(part: PartShape, precision: PrecisionClass) -> Terms:
    """What a part's own time is made of, in a profile and in a run."""
    kind = "float" if precision == "stored" else precision
    family = f"{kind} {_family(part)}"
    taps = math.prod(part.kernel_size)
    terms = {
        f"{kind} nodes": 1.0,
        f"{kind} outputs": float(part.out_elements),
        f"{family} inputs": float(part.positions * taps * part.in_channels),
    }
    for tile in _TILES:
        inputs = _tiled(part.in_channels // part.groups, tile)
        if part.groups > 1 or (kind == "float" and part.in_channels < min(_TILES)):
            # Kernels for images and for single channels do not fill up.
            inputs = part.in_channels // part.groups
        work = part.positions * taps * inputs * _tiled(part.out_channels, tile)
        terms[f"{family} macs of {tile}"] = float(work)
    if precision == "stored":
        terms["stored weights"] = float(part.weights)
    return terms


def _family(part: PartShape) -> str:
    if not part.kernel_size:
        return "linear"
    if part.groups > 1:
        return "grouped"
    return "pointwise" if math.prod(part.kernel_size) == 1 else "spatial"


def _tiled(channels: int, tile: int) -> int:
    """As many channels as kernels that work on `tile` at a time go through."""
    return -(-channels // tile) * tile


def layer_terms(state: LayerState) -> Terms:
    """What else a layer makes a run do: sums and activations of its outputs."""
    kind = precision_class(state.quantize)
    return {f"after {kind}": float(part.out_elements) for part in state.parts[-1:]}


def block_terms(elements: int) -> Terms:
    """What else blocks make a run do, such as norms and the heads' products; by values given."""
    return {"in blocks": float(elements)} if elements else {}


def boundary_terms(boundary: Boundary) -> Terms:
    """What a boundary takes; nothing where both sides compute in floats, or both in integers."""
    if not boundary.converts:
        return {}
    name = "integers to floats" if _integer(boundary.kind[0]) else "floats to integers"
    name = "mixed sum" if boundary.summed else name
    return {f"{name} at all": 1.0, f"{name} elements": float(boundary.elements)}


def node_terms(row: NodeRow) -> Terms:
    """A node's terms: those of its part, and what profiling adds."""
    kind = "float" if row.precision == "stored" else row.precision
    return {**part_terms(row.part, row.precision), f"profile of {kind}": 1.0}


def file_terms(row: FileRow) -> Terms:
    """A latency's terms."""
    found: list[Terms] = [{"run": 1.0}, *(boundary_terms(b) for b in row.boundaries)]
    found.append(block_terms(row.in_blocks))
    for _, state in row.layers:
        kind = precision_class(state.quantize)
        found += [layer_terms(state), *(part_terms(part, kind) for part in state.parts)]
    total: dict[str, float] = {}
    for terms in found:
        for name, value in terms.items():
            total[name] = total.get(name, 0.0) + value
    return total


def fit_layer_times(nodes: Sequence[NodeRow], files: Sequence[FileRow]) -> LayerTimes:
    """Fit times to a few profiled and measured files.

    Args:
        nodes: of all files; those without a time that counts are left out.
        files: at least one, with a latency above zero.

    Raises:
        MeasurementError: there is no row.
    """
    nodes = [row for row in nodes if row.milliseconds > 0]
    files = [row for row in files if row.milliseconds > 0]
    if not nodes or not files:
        raise MeasurementError(
            "Times of layers cannot be told without profiled and measured files.",
            given=f"{len(nodes)} node times, {len(files)} latencies",
        )
    terms = [*(node_terms(row) for row in nodes), *(file_terms(row) for row in files)]
    times = np.array([r.milliseconds for r in nodes] + [r.milliseconds for r in files])
    errors = np.array(
        [_NODE_ERROR * r.milliseconds + _NODE_RESOLUTION_MS for r in nodes]
        + [_FILE_ERROR * r.milliseconds for r in files]
    )
    weights = _nonnegative(terms, times, errors)
    found = LayerTimes(weights, _corrections(nodes, weights))
    # Corrections shift the sums; whole latencies are what counts.
    ratios = [math.log(row.milliseconds / found.file_ms(row)) for row in files]
    scale = math.exp(sum(ratios) / len(ratios))
    return LayerTimes({n: w * scale for n, w in weights.items()}, found.corrections)


def _nonnegative(
    terms: Sequence[Terms], times: NDArray[np.float64], errors: NDArray[np.float64]
) -> dict[str, float]:
    """Milliseconds per unit of every term, none below zero."""
    names = sorted(set().union(*terms))
    matrix = np.array([[row.get(name, 0.0) for name in names] for row in terms]) / errors[:, None]
    scales = np.linalg.norm(matrix, axis=0)
    kept = scales > 0
    scaled = matrix[:, kept] / scales[kept]
    ridge = _RIDGE * np.eye(scaled.shape[1])
    wanted = np.concatenate([times / errors, np.zeros(scaled.shape[1])])
    solved, _ = nnls(np.vstack([scaled, ridge]), wanted)
    values = dict(zip(np.array(names)[kept].tolist(), solved / scales[kept], strict=True))
    return {name: float(value) for name, value in values.items()}


def _corrections(
    nodes: Iterable[NodeRow], weights: Mapping[str, float]
) -> dict[tuple[str, PrecisionClass], float]:
    """The geometric mean of measured over predicted times of every layer, shrunk towards one."""
    ratios: dict[tuple[str, PrecisionClass], list[float]] = {}
    for row in nodes:
        guess = sum(weights.get(name, 0.0) * value for name, value in node_terms(row).items())
        if guess > 0:
            found = ratios.setdefault((row.layer, row.precision), [])
            found.append(math.log(row.milliseconds / guess))
    limit = math.log(_MOST_CORRECTION)
    shrunk = {key: sum(found) / (len(found) + _SHRINKAGE) for key, found in ratios.items()}
    return {key: math.exp(max(-limit, min(limit, value))) for key, value in shrunk.items()}
