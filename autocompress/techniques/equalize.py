"""Cross-layer equalization: channels of one layer get like ranges, and the next makes up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn

from autocompress.graph import Layer, NetworkGraph, trace
from autocompress.graph.layers import flatten_outputs
from autocompress.plan import Decision
from autocompress.techniques.boundaries import Boundary, Side, boundaries_of, channels, fits
from autocompress.techniques.technique import (
    LayerGradients,
    LayerStatistics,
    NetworkTechnique,
    Stage,
)

# Outputs may differ by this share of the largest one: channels are summed in another scale.
_TOLERANCE = 1e-4
# An activation that is homogeneous for small inputs only shows it on large ones.
_PROBES = (1.0, 16.0, 256.0)
_SMALLEST_RANGE = 1e-9
_LARGEST_FACTOR = 1e3
_INPUT, _OUTPUT = "input_factor", "output_factor"


@final
class Equalize(Decision):
    """Equalize channel ranges so many times over the network; 0 leaves it as it is."""

    technique: ClassVar[str] = "equalize"
    iterations: int = Field(ge=0, le=10)


def equalize(
    network: nn.Module,
    graph: NetworkGraph,
    example_inputs: tuple[Tensor, ...],
    decision: Equalize,
) -> int:
    """Scale channels so that writers' and readers' weights have like ranges, in place.

    With ranges r1 of a channel's folded rows and r2 of the columns that read it, the rows are
    divided and the columns multiplied by s = sqrt(r1 / r2) (Nagel et al. 2019, DFQ, eq. 9 to 11).
    Several writers or readers count by the geometric mean of their ranges. The outputs stay: where
    an activation between is not positively homogeneous (ReLU6, sigmoid, GELU) they would not, and
    the boundary is left as it was. Layers keep in the buffers `input_factor`, shape
    (in_channels,), and `output_factor`, shape (out_channels,), by what their inputs and outputs
    were multiplied; see `equalized`.

    Args:
        network: in evaluation mode.
        graph: of this network or of that which it was pruned from, which is traced again then.
        example_inputs: batch in dimension 0.

    Returns:
        The number of channel groups that were equalized.
    """
    if not decision.iterations:
        return 0
    if not fits(network, graph):
        graph = trace(network, example_inputs)
    boundaries = [b for group in graph.groups for b in boundaries_of(network, graph, group)]
    probes = [_scaled(example_inputs, factor) for factor in _PROBES]
    with torch.no_grad():
        wanted = [flatten_outputs(network(*probe)) for probe in probes]
        for _ in range(decision.iterations):
            boundaries = [b for b in boundaries if _equalize_one(network, b, probes, wanted)]
    return len({b.group for b in boundaries})


def equalized(
    module: nn.Module,
    layer: Layer,
    statistics: LayerStatistics | None,
    gradients: LayerGradients | None,
) -> tuple[LayerStatistics | None, LayerGradients | None]:
    """Statistics and gradients of a layer as they are after its channels were equalized."""
    read, written = getattr(module, _INPUT, None), getattr(module, _OUTPUT, None)
    if isinstance(read, Tensor):
        columns = read.repeat_interleave(layer.columns_per_channel)
        if statistics is not None:
            wide = columns.double()
            statistics = replace(
                statistics,
                moment=statistics.moment * torch.outer(wide, wide),
                mean=statistics.mean * wide,
                magnitude=statistics.magnitude * wide,
            )
        if gradients is not None:
            gradients = replace(gradients, fisher=gradients.fisher * columns.square())
    if isinstance(written, Tensor) and gradients is not None:
        # A smaller output means that the same change of a weight does more.
        rows = written.square()[:, None]
        gradients = replace(gradients, fisher=gradients.fisher / rows)
    return statistics, gradients


def _equalize_one(
    network: nn.Module,
    boundary: Boundary,
    probes: Sequence[tuple[Tensor, ...]],
    wanted: Sequence[list[Tensor]],
) -> bool:
    """Equalize a boundary if that keeps the outputs."""
    log_factor = torch.zeros(boundary.size)
    for sides, sign in ((boundary.writers, 0.5), (boundary.readers, -0.5)):
        for side in sides:
            ranges = _ranges(side, boundary.size)
            log_factor += sign / len(sides) * (ranges / ranges.max()).log()
    factor = log_factor.exp().clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    before = [(p, p.clone()) for p in _parameters(boundary)]
    _apply(boundary, factor)
    found = [flatten_outputs(network(*probe)) for probe in probes]
    same = all(
        float((a - b).abs().max()) <= _TOLERANCE * float(b.abs().max())
        for after, before in zip(found, wanted, strict=True)
        for a, b in zip(after, before, strict=True)
        if b.is_floating_point()
    )
    for parameter, value in () if same else before:
        parameter.copy_(value)
    if same:
        for reader in boundary.readers:
            _note(reader, _INPUT, factor)
        for writer in boundary.writers:
            # A batch norm's factors are no part of the layer's output.
            if writer.norm is None:
                _note(writer, _OUTPUT, factor)
    return same


def _parameters(boundary: Boundary) -> list[Tensor]:
    sides = (*boundary.writers, *boundary.readers)
    owners = [owner for side in sides for owner in (side.layer, side.norm) if owner is not None]
    return [p for owner in owners for p in owner.parameters(recurse=False)]


def _ranges(side: Side, size: int) -> Tensor:
    """The largest weight of each channel with the norm folded into it, shape (size,)."""
    weight = cast(Tensor, side.layer.weight).detach().abs()
    rows = _norm_factor(side.norm, len(weight)).abs()
    weight = weight * rows.reshape(-1, *(1 for _ in weight.shape[1:]))
    if side.by_column:
        weight = weight.movedim(1, 0)
    largest = weight.reshape(len(weight), -1).amax(1)[side.index]
    return largest.reshape(size, side.per_channel).amax(1).clamp(min=_SMALLEST_RANGE)


def _norm_factor(norm: nn.Module | None, rows: int) -> Tensor:
    """What a batch norm multiplies each channel with, shape (rows,)."""
    if norm is None:
        return torch.ones(rows)
    known = cast(nn.BatchNorm2d, norm)
    assert known.running_var is not None
    factor = torch.rsqrt(known.running_var + known.eps)
    return factor * known.weight.detach() if known.affine else factor


def _apply(boundary: Boundary, factor: Tensor) -> None:
    """Divide what is written by a factor per channel, shape (size,), and multiply what reads it."""
    for writer in boundary.writers:
        spread = factor.repeat_interleave(writer.per_channel)
        owner = writer.layer if writer.norm is None else writer.norm
        for parameter in (owner.weight, owner.bias):
            if isinstance(parameter, Tensor):
                shape = (-1, *(1 for _ in parameter.shape[1:]))
                parameter[writer.index] /= spread.reshape(shape)
    for reader in boundary.readers:
        spread = factor.repeat_interleave(reader.per_channel)
        weight = cast(Tensor, reader.layer.weight)
        columns = weight.movedim(1, 0) if reader.by_column else weight
        columns[reader.index] *= spread.reshape(-1, *(1 for _ in weight.shape[1:]))


def _note(side: Side, name: str, divisor: Tensor) -> None:
    """Keep by what a layer's inputs or outputs were multiplied."""
    factor = getattr(side.layer, name, None)
    if not isinstance(factor, Tensor):
        factor = torch.ones(channels(side.layer)[name == _OUTPUT])
        side.layer.register_buffer(name, factor, persistent=False)
    factor[side.index] /= divisor.repeat_interleave(side.per_channel)


def _scaled(inputs: tuple[Tensor, ...], factor: float) -> tuple[Tensor, ...]:
    return tuple(x * factor if x.is_floating_point() else x for x in inputs)


EQUALIZE = NetworkTechnique(
    name=Equalize.technique,
    decision=Equalize,
    stage=Stage.EQUALIZE,
    identity=Equalize(iterations=0),
    choices=lambda graph, offered, device: _choices(offered),
)


def _choices(offered: Sequence[Decision]) -> tuple[Decision, ...]:
    found = {d.iterations: d for d in offered if isinstance(d, Equalize) and d.iterations}
    return tuple(found[k] for k in sorted(found))
