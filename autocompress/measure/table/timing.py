"""Timing blocks in a worker process, by the difference between many copies and one."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import final

from autocompress.device import DeviceProfile
from autocompress.measure.client import Subject, Worker
from autocompress.measure.latency import PairedLatency
from autocompress.measure.table.block import Block, TensorType
from autocompress.measure.table.copies import Bench, bench, empty_bench, run_overhead
from autocompress.measure.table.store import Entry, overhead_key

_TARGET_HALF_WIDTH = 0.01
# With fewer rounds than these the longer limit holds.
_FEWEST_ROUNDS = 5
_TIME_LIMIT_S, _LONG_TIME_LIMIT_S = 0.15, 3.0
# A block whose time is known less well than both is timed once more.
_COARSE_SHARE, _COARSE_MS = 0.05, 3e-4


@final
class BlockTimer:
    """Times blocks on a device; a context manager, its worker ends with it.

    Args:
        profile: the device.
        runtime: full name of one of its runtimes.
        scratch: a folder for the bench models.
    """

    def __init__(self, profile: DeviceProfile, runtime: str, scratch: Path) -> None:
        limits = profile.measuring.model_copy(
            update={
                "target_half_width": _TARGET_HALF_WIDTH,
                "time_limit_s": _TIME_LIMIT_S,
                "final_target_half_width": _TARGET_HALF_WIDTH,
                "final_time_limit_s": _LONG_TIME_LIMIT_S,
            }
        )
        # The batch is part of a block's shapes; a bench model's own inputs have one row.
        own = profile.model_copy(update={"measuring": limits, "batch_size": 1})
        self._runtime = runtime
        self._worker = Worker(own, scratch)
        self._models = (scratch / "one.onnx", scratch / "many.onnx")

    def __enter__(self) -> BlockTimer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker."""
        self._worker.close()
        for path in self._models:
            path.unlink(missing_ok=True)

    def block(self, block: Block) -> Entry:
        """Time a block.

        Raises:
            MeasurementError: the runtime cannot run it.
        """
        first = self._block(block, 0)
        if first.noise_ms <= max(_COARSE_MS, _COARSE_SHARE * first.latency_ms):
            return first
        return min(first, self._block(block, 1), key=lambda entry: entry.noise_ms)

    def overhead(self, inputs: tuple[TensorType, ...], outputs: tuple[TensorType, ...]) -> Entry:
        """Time a run that computes next to nothing."""
        built = empty_bench(inputs, outputs)
        paired = self._compare(built, 0)
        overhead_ms = run_overhead(paired.baseline_ms, paired.candidate_ms, built.copies)
        noise = paired.candidate_ms * paired.half_width
        return Entry(overhead_key(inputs, outputs), overhead_ms, noise)

    def _block(self, block: Block, seed: int) -> Entry:
        built = bench(block, seed)
        paired = self._compare(built, seed)
        difference = paired.candidate_ms - paired.baseline_ms
        noise = paired.candidate_ms * paired.half_width
        return Entry(block.key, difference / built.copies, noise / built.copies, block)

    def _compare(self, built: Bench, seed: int) -> PairedLatency:
        subjects = []
        for path, model in zip(self._models, (built.one, built.many), strict=True):
            path.write_bytes(model)
            subjects.append(Subject(path, self._runtime))
        paired = self._worker.compare(subjects[0], subjects[1], built.inputs, seed=seed)
        if paired.rounds >= _FEWEST_ROUNDS:
            return paired
        # A slow model, or a runtime that was only just starting.
        return self._worker.compare(subjects[0], subjects[1], built.inputs, final=True, seed=seed)
