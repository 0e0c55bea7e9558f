"""How the cost of a search grows with the network's depth and with the trials of a study."""

# mypy: disable-error-code="arg-type, list-item"
from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from residual import Architecture, ResidualNetwork

from autocompress.bank import Bank
from autocompress.config import CalibrationSettings, load_search_space
from autocompress.device import load_profile
from autocompress.evaluation import Evaluation
from autocompress.graph import trace
from autocompress.measure.measurement import Measurement
from autocompress.search.costs.latency import macs_costs
from autocompress.search.front import build_front
from autocompress.search.seeding.lagrangian import frontier
from autocompress.search.sensitivity import SensitivityRun
from autocompress.search.space import Parameter, Space, build_space
from autocompress.search.study import Sampling, Study
from autocompress.techniques import Stage
from autocompress.techniques.filter_prune import FilterPrune

SAMPLES, BUDGETS = 256, 24
# Blocks per stage of residual networks with 6 n + 2 layers.
DEPTHS = {20: 3, 110: 18}
PARAMETERS, LEVELS = 45, 6
WINDOW = 20


def depth_table() -> Mapping[str, Any]:
    """Seconds of sensitivity and seeds of untrained residual networks of 20 and 110 layers."""
    rows = []
    seconds = {}
    for layers, blocks in DEPTHS.items():
        parts = _depth(blocks)
        seconds[layers] = parts["sensitivity"] + parts["seeds"]
        rows.append([layers, *(round(v, 1) for v in parts.values()), round(seconds[layers], 1)])
    ratio = seconds[110] / seconds[20]
    rows.append(["ratio", "", "", "", f"{ratio:.1f} x"])
    return {
        "title": "Growth with depth (bank: statistics and solved variants, once per network)",
        "columns": ["layers", "bank s", "sensitivity s", "seeds s", "sensitivity and seeds s"],
        "rows": rows,
    }


def _depth(blocks: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = Architecture(channels=3, classes=10, widths=(16, 32, 64), blocks=blocks)
        network = ResidualNetwork(shape).eval()
    inputs = torch.randn(SAMPLES, 3, 32, 32, generator=generator)
    profile = load_profile("cpu")
    graph = trace(network, (inputs[:1],))
    space = build_space(graph, load_search_space("cnn"), profile)
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        bank = Bank(network, graph, profile.channel_multiple, Path(name) / "bank")
        bank.calibrate((inputs,), CalibrationSettings())
        run = SensitivityRun(bank, space, (inputs,), Path(name) / "losses", class_scores=True)
        banked = time.perf_counter()
        for _ in run.steps():
            pass
        loss = run.result().of(space)
        measured = time.perf_counter()
        frontier(loss, macs_costs(graph, space, profile.channel_multiple, 1.0), BUDGETS)
        solved = time.perf_counter()
    return {"bank": banked - start, "sensitivity": measured - banked, "seeds": solved - measured}


def trial_cost_table(trials: int = 5000) -> Mapping[str, Any]:
    """What a trial costs beside building and measuring: proposing, keeping, showing the front."""
    decisions = tuple(FilterPrune(pruning_ratio=(i + 1) / (LEVELS + 2)) for i in range(LEVELS))
    space = Space(tuple(Parameter(Stage.PRUNE, f"layer{i}", decisions) for i in range(PARAMETERS)))
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = Study(
            folder, space, load_profile("cpu"), ("metric", "latency"), Sampling("mutation", 0)
        )
        for number in range(trials + WINDOW):
            start = time.perf_counter()
            proposal = study.propose()
            assert proposal is not None
            study.begin_judging(proposal)
            study.keep_judgement(proposal, {"loss": 0.1}, float(number))
            study.start(proposal)
            levels = np.array(list(proposal.indices.values())) / LEVELS
            study.succeed(proposal, _evaluation(proposal, levels), float(number))
            if study.evaluations[-1] in study.evaluations_on_front:
                build_front(folder, ("metric", "latency"), study.evaluations, []).save()
            seconds.append(time.perf_counter() - start)
    early, late = (
        1000 * float(np.median(seconds[at - WINDOW : at + WINDOW])) for at in (50, trials)
    )
    return {
        "title": "Growth with trials (median of 40 trials, without building and measuring)",
        "columns": ["trial", "ms"],
        "rows": [[50, round(early, 1)], [trials, round(late, 1)], ["more", round(late - early, 1)]],
    }


def _evaluation(proposal: Any, levels: np.ndarray) -> Evaluation:
    """A stand-in with the trade-off of a real one; nothing of it is a measurement."""
    weights = np.linspace(0.2, 1.0, len(levels))
    lost = 0.1 * float((weights * levels**2).mean())
    speedup = 1.0 + 8.0 * float(levels.mean())
    figure = {
        "metric": Measurement(0.92 - lost, 0.91 - lost, 0.93 - lost, "share", "estimated", "none"),
        "latency": Measurement(1 / speedup, 1 / speedup, 1 / speedup, "ms", "estimated", "none"),
        "speedup": Measurement(speedup, speedup, speedup, "x", "estimated", "none"),
    }
    return Evaluation(
        candidate=proposal.candidate,
        runtime=proposal.runtime,
        plan=tuple(proposal.plan.to_rows()),
        split="search",
        file_bytes=1,
        artifact="none",
        **figure,
    )
