"""Candidates of small workloads, built without a search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from networks import as_run_here, this_device
from torch import Tensor, nn

from autocompress.bank import Bank
from autocompress.build import Builder, Stopwatch
from autocompress.config import CalibrationSettings
from autocompress.export.exporter import Exporter
from autocompress.graph import NetworkGraph, trace
from autocompress.plan import Decision, Plan, Step
from autocompress.workload import Workload

SETTINGS = CalibrationSettings(statistics_samples=64, repair_samples=32)


class Candidates:
    """The builder of a workload, and what a test asks of it."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload = workload
        self.graph: NetworkGraph = trace(workload.network, workload.example_inputs)
        bank = Bank(workload.network, self.graph, 1, folder / "bank")
        bank.calibrate(workload.calibration.inputs, SETTINGS)
        parity = tuple(x[:4] for x in workload.calibration.inputs)
        example, axes = workload.example_inputs, workload.dynamic_axes
        exporter = Exporter(workload.network, self.graph, example, parity, axes)
        self.builder = Builder(workload, exporter, bank, this_device(), SETTINGS, folder)

    def layers(self, decision: Decision) -> Plan:
        """The decision for every dense layer."""
        layers = [layer.name for layer in self.graph.layers if layer.dense]
        return Plan(tuple(Step(name, as_run_here(decision)) for name in layers))

    def groups(self, decision: Decision) -> Plan:
        """The decision for every prunable group."""
        return Plan(tuple(Step(g.name, decision) for g in self.graph.groups if g.prunable))

    def network(self, plan: Plan) -> nn.Module:
        """The candidate in PyTorch."""
        return self.builder.network(plan, Stopwatch()).network

    def session(self, name: str, plan: Plan) -> ort.InferenceSession:
        """The candidate's file, loaded."""
        path = self.builder.build(name, plan).path
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, inputs: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
    """A file's outputs."""
    names = [entry.name for entry in session.get_inputs()]
    return tuple(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)}))
