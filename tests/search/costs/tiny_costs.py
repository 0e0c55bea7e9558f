"""A network of two convolutions, its space and builder, and a device in closed form."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tiny_workload import QUICK_PROFILE, workload

from autocompress.bank import Bank
from autocompress.build import Builder
from autocompress.config import CalibrationSettings, SearchSpace
from autocompress.device import DeviceProfile
from autocompress.errors import MeasurementError
from autocompress.export.exporter import Exporter
from autocompress.graph import trace
from autocompress.measure.explain.graph import read_graph
from autocompress.measure.explain.layers import layers_of
from autocompress.measure.session import NodeTime
from autocompress.search.space import build_space

SPACE = SearchSpace(
    version=1,
    name="tiny",
    techniques={
        "filter_prune": {"pruning_ratio": (0.25, 0.5, 0.75)},
        "low_rank": {"rank_ratio": (0.5, 0.25)},
        "precision": {"weight_bits": (8,), "activation_bits": (8,)},
    },
)
_FOLDER = tempfile.TemporaryDirectory(prefix="autocompress-tests-")


@cache
def tiny() -> SimpleNamespace:
    profile = DeviceProfile.model_validate(QUICK_PROFILE)
    made = workload()
    graph = trace(made.network, made.example_inputs)
    folder = Path(_FOLDER.name)
    exporter = Exporter(
        made.network, graph, made.example_inputs, tuple(x[:2] for x in made.calibration.inputs)
    )
    settings = CalibrationSettings(statistics_samples=64, repair_samples=32)
    bank = Bank(made.network, graph, profile.channel_multiple, folder / "bank")
    bank.calibrate(made.calibration.inputs, settings)
    builder = Builder(made, exporter, bank, profile, settings, folder)
    space = build_space(graph, SPACE, profile)
    return SimpleNamespace(
        profile=profile, graph=graph, space=space, builder=builder, multiple=8,
        inputs=[made.search_split.inputs[0][:1].numpy()],
    )  # fmt: skip


class ClosedFormWorker:
    """Half a microsecond a layer and 1 ms per 10^8 multiply-accumulates of padded channels.

    Integers take a third, profiling a microsecond a node, and every run 3 microseconds.
    """

    def __init__(self, tells: bool = True, has_profile: bool = True) -> None:
        self.fingerprint = SimpleNamespace(id="closed form")
        self.tells = tells
        self.has_profile = has_profile
        self.compared = 0

    def layers_ms(self, path: Path) -> dict[tuple[str, ...], float]:
        found = {}
        for layer in layers_of(read_graph(path)):
            positions = 64 if layer.kernel else 1
            outputs, inputs = -(-layer.out_channels // 8) * 8, -(-layer.in_channels // 8) * 8
            inputs = layer.in_channels if layer.in_channels < 8 else inputs
            macs = positions * outputs * inputs * int(np.prod(layer.kernel))
            found[layer.nodes] = 5e-4 + macs / 1e8 / (3 if layer.scheme == "static" else 1)
        return found

    def latency_ms(self, path: Path) -> float:
        return 3e-3 + sum(self.layers_ms(path).values())

    def compare(self, baseline, candidate, inputs, *, final=False, seed) -> SimpleNamespace:
        self.compared += 1
        return SimpleNamespace(
            baseline_ms=self.latency_ms(baseline.model),
            candidate_ms=self.latency_ms(candidate.model),
        )

    def profile(self, subject, inputs, runs) -> tuple[NodeTime, ...]:
        if not self.has_profile:
            raise MeasurementError("There is no profile.")
        return tuple(
            NodeTime(f"n{i}", "Conv", "", ms + 1e-3, origins=keys if self.tells else ())
            for i, (keys, ms) in enumerate(self.layers_ms(subject.model).items())
        )
