"""The latency table: what is known of blocks, and what follows for whole files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import onnx

from autocompress.errors import MeasurementError
from autocompress.measure.measurement import Measurement
from autocompress.measure.table.block import Block, TensorType
from autocompress.measure.table.cut import Cut, cut_model
from autocompress.measure.table.families import Kin, Traits, traits_of
from autocompress.measure.table.joint import Meeting, distinct_edges, meeting_of
from autocompress.measure.table.store import Entry, overhead_key

# How far an interpolated block and the cost of a meeting are off, as shares: 95 % of them.
_INTERPOLATION_NOISE = 0.3
# Differences of three timings are known no better than to this share of what was timed.
_MEETING_NOISE = 0.02


@final
@dataclass(frozen=True)
class Estimate:
    """What a block takes.

    Attributes:
        noise_ms: half-width of its 95 % interval.
        measured: whether the block itself was measured, not only its kin.
    """

    latency_ms: float
    noise_ms: float
    measured: bool


@final
@dataclass(frozen=True)
class Prediction:
    """What a whole file takes by the table.

    Attributes:
        latency_ms: blocks, meetings and overhead together.
        noise_ms: half-width of its 95 % interval, as far as the entries' own noise goes.
        overhead_ms: what any run with such inputs and outputs takes.
        meetings_ms: what conversions between blocks add or fusions save.
        measured: how many of the file's blocks were measured.
        interpolated: how many were guessed from their kin.
    """

    latency_ms: float
    noise_ms: float
    overhead_ms: float
    meetings_ms: float
    measured: int
    interpolated: int

    def measurement(self, device: str) -> Measurement:
        """The prediction as a latency that was not measured.

        Args:
            device: the id of the fingerprint of the table's device.
        """
        ends = (self.latency_ms - self.noise_ms, self.latency_ms + self.noise_ms)
        return Measurement(self.latency_ms, *ends, "ms", "estimated", device)


@final
class Table:
    """What is known of blocks on one device in one runtime; never changes.

    Args:
        entries: of the device and runtime; of entries with one key the last counts.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = {entry.key: entry for entry in entries}
        self._traits: dict[str, Traits | None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, block: Block) -> Entry | None:
        """The entry of a block that was measured."""
        return self._entries.get(block.key)

    def estimate(self, block: Block) -> Estimate | None:
        """What a block takes, measured or by its kin; None if neither is known."""
        entry = self.lookup(block)
        if entry is not None:
            return Estimate(entry.latency_ms, entry.noise_ms, measured=True)
        traits = self._traits_of(block)
        if traits is None or traits.kin not in self._kins:
            return None
        latency_ms = self._kins[traits.kin].estimate(traits)
        return Estimate(latency_ms, _INTERPOLATION_NOISE * latency_ms, measured=False)

    def overhead(
        self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]
    ) -> Entry | None:
        """What a run with such inputs and outputs takes before it computes anything."""
        return self._entries.get(overhead_key(inputs, outputs))

    def meeting(self, meeting: Meeting) -> Estimate:
        """What two blocks take more together than alone; nothing where none such was measured.

        Costs that could be noise are none. For a tensor that was not measured the cost lies between
        those of the next smaller and the next larger one at the place, because what is paid is a
        conversion of the tensor.
        """
        entry = self._entries.get(meeting.key)
        if entry is not None:
            return Estimate(_significant(entry), entry.noise_ms, measured=True)
        found = self._places.get(meeting.place)
        if not found:
            return Estimate(0.0, 0.0, measured=False)
        sizes, costs, noise_ms = found
        cost = float(np.interp(meeting.tensor.elements, sizes, costs))
        # Beyond the largest one it grows with the tensor.
        cost *= max(meeting.tensor.elements / sizes[-1], 1.0)
        return Estimate(cost, noise_ms, measured=False)

    def meetings(self) -> tuple[Entry, ...]:
        """All measured meetings."""
        return tuple(entry for entry in self._entries.values() if entry.meeting is not None)

    def predict(self, model: onnx.ModelProto, batch_size: int) -> Prediction:
        """What a model takes.

        Raises:
            MeasurementError: it cannot be cut into blocks, or nothing is known of one of them.
        """
        return self.predict_cut(cut_model(model, batch_size))

    def predict_cut(self, cut: Cut) -> Prediction:
        """What a model takes that was cut into blocks; see `predict`."""
        overhead = self.overhead(cut.inputs, cut.outputs)
        found = [self.estimate(block) for block in cut.blocks]
        known = [estimate for estimate in found if estimate is not None]
        if overhead is None or len(known) < len(found):
            unknown = [p.layer for p, e in zip(cut.placed, found, strict=True) if e is None]
            raise MeasurementError(
                "The latency table knows nothing like some parts of the model.",
                given=", ".join([*unknown, *(["a run's overhead"] if overhead is None else [])]),
                advice="measure them: autocompress profile DEVICE --network EXPERIMENT",
            )
        meetings = [self.meeting(meeting_of(cut, e)) for e in distinct_edges(cut).values()]
        meetings_ms = sum(meeting.latency_ms for meeting in meetings)
        noises = [overhead.noise_ms, *(e.noise_ms for e in (*known, *meetings))]
        return Prediction(
            latency_ms=overhead.latency_ms + sum(e.latency_ms for e in known) + meetings_ms,
            noise_ms=math.hypot(*noises),
            overhead_ms=overhead.latency_ms,
            meetings_ms=meetings_ms,
            measured=sum(e.measured for e in known),
            interpolated=sum(not e.measured for e in known),
        )

    def _traits_of(self, block: Block) -> Traits | None:
        if block.key not in self._traits:
            self._traits[block.key] = traits_of(block)
        return self._traits[block.key]

    @cached_property
    def _kins(self) -> dict[str, Kin]:
        found: dict[str, list[tuple[Traits, float]]] = defaultdict(list)
        for entry in self._entries.values():
            traits = None if entry.block is None else self._traits_of(entry.block)
            if traits is not None:
                found[traits.kin].append((traits, entry.latency_ms))
        return {
            kin: Kin(tuple(t for t, _ in members), tuple(ms for _, ms in members))
            for kin, members in found.items()
        }

    @cached_property
    def _places(self) -> dict[str, tuple[list[int], list[float], float]]:
        """Sizes of the tensors, costs, and the largest noise, by place."""
        found: dict[str, dict[int, Entry]] = defaultdict(dict)
        for entry in self.meetings():
            assert entry.meeting is not None
            found[entry.meeting.place][entry.meeting.tensor.elements] = entry
        return {
            place: (
                sorted(entries),
                [_significant(entries[size]) for size in sorted(entries)],
                max(entry.noise_ms for entry in entries.values()),
            )
            for place, entries in found.items()
        }


def _significant(entry: Entry) -> float:
    """A meeting's cost, if it can be told from none."""
    noise_ms = max(entry.noise_ms, _MEETING_NOISE * entry.apart_ms)
    return entry.latency_ms if abs(entry.latency_ms) > noise_ms else 0.0
