"""The plain loop: what a competent user writes with stock tools, to compare the search with.

Each trial of Optuna's default TPE draws an L1 pruning ratio per channel group and int8 or not per
layer; then batch-norm statistics are estimated anew, the network is exported, quantized by ONNX
Runtime's own quantizer, judged on 1,000 images and timed by 50 runs.

    python experiments/search/plain_loop.py experiments/digits.yaml --seconds 30 --out runs/plain
"""

# mypy: disable-error-code="misc, no-untyped-call, operator"
from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
import onnxruntime
import optuna
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from torch import Tensor, nn

from autocompress.build import Stopwatch
from autocompress.config import load_experiment
from autocompress.device import usable_cores
from autocompress.graph import ChannelGroup, NetworkGraph, trace
from autocompress.graph.groups import dense_producers, kept_size, remove_channels
from autocompress.graph.layers import NORM_TYPES
from autocompress.workload import Workload, load_workload, score

HIGHEST_RATIO, RATIO_STEP = 0.75, 0.125
# Kept channels are multiples of this, as with torch-pruning's `round_to`.
ROUND_TO = 8
NORM_SAMPLES, NORM_BATCH = 2_000, 250
QUANTIZER_SAMPLES, QUANTIZER_BATCH = 100, 50
ACCURACY_SAMPLES, ACCURACY_BATCH = 1_000, 100
WARM_UP_RUNS, TIMED_RUNS = 10, 50
ROWS_FILE = "rows.jsonl"


@final
@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        t_s: seconds from the loop's begin, tracing included, to this trial's end.
        ratios: of each channel group.
        int8: names of the layers that the quantizer was given.
        accuracy_1000: on the first 1,000 samples of the search split, a share; NaN if it failed.
        latency_ms: median of the timed runs; NaN if it failed.
        model: the file in `models/`; empty if an earlier trial dominates this one.
        seconds: of each step.
        failure: why there are no figures; empty otherwise.
    """

    t_s: float
    ratios: Mapping[str, float]
    int8: tuple[str, ...]
    accuracy_1000: float
    latency_ms: float
    model: str
    seconds: Mapping[str, float]
    failure: str = ""


def run_plain_loop(workload: Workload, seconds: float, seed: int, out: Path) -> list[Row]:
    """Run trials until the time is over, one at least; an unfinished earlier call starts anew.

    Args:
        workload: with accuracy as its metric.
        seconds: no trial begins later than this.
        seed: of the sampler.
        out: gets `rows.jsonl`, each row as soon as it is known, and `models/`.
    """
    begin = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    (out / "models").mkdir(parents=True)
    rows: list[Row] = []
    with _quiet(), _all_threads():
        loop = _Loop(workload)
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed)
        )
        # A user starts with what is known to work: nothing pruned, everything in int8.
        study.enqueue_trial(loop.known_good)
        while not rows or time.perf_counter() - begin < seconds:
            rows.append(_trial(loop, study, rows, begin, out / "models"))
            with (out / ROWS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
    return rows


def read_rows(out: Path) -> list[Row]:
    """The rows that `run_plain_loop` wrote."""
    lines = (out / ROWS_FILE).read_text(encoding="utf-8").splitlines()
    data = [json.loads(line) for line in lines]
    return [Row(**(fields | {"int8": tuple(fields["int8"])})) for fields in data]


def dominated(rows: Sequence[Row], accuracy: float, latency_ms: float) -> bool:
    """Whether a row is no worse in both figures, and better in one."""
    return any(
        row.accuracy_1000 >= accuracy
        and row.latency_ms <= latency_ms
        and (row.accuracy_1000, row.latency_ms) != (accuracy, latency_ms)
        for row in rows
    )


def l1_order(network: nn.Module, group: ChannelGroup) -> list[int]:
    """The group's channels by the L1 norm of the filters that write them, smallest first.

    Norms of several producers are summed, each relative to that producer's mean.
    """
    total = torch.zeros(group.size)
    for member in dense_producers(network, group):
        weight = network.get_submodule(member.module).weight.detach()
        norms = torch.stack([weight[member.select([c])].abs().sum() for c in range(group.size)])
        total += norms / norms.mean().clamp(min=1e-12)
    return [int(i) for i in total.argsort(stable=True)]


def nodes_to_quantize(model: onnx.ModelProto, layers: Collection[str]) -> list[str]:
    """Names of the layers' nodes, and of all other nodes that read only what these wrote.

    The exporter names a layer's weight after its module.
    """
    chosen: list[str] = []
    written: dict[str, bool] = {}
    for node in model.graph.node:
        weights = [name for name in node.input if name.endswith(".weight")]
        if weights:
            taken = weights[0].removesuffix(".weight") in layers
        else:
            sources = [written[name] for name in node.input if name in written]
            taken = bool(sources) and all(sources)
        written |= dict.fromkeys(node.output, taken)
        if taken:
            chosen.append(node.name)
    return chosen


@final
class _Loop:
    """The steps of a trial on one workload."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._network = workload.network
        self._graph: NetworkGraph = trace(workload.network, workload.example_inputs)
        prunable = [group for group in self._graph.groups if group.prunable]
        self._orders = [(group, l1_order(self._network, group)) for group in prunable]
        self._layers = [layer.name for layer in self._graph.layers]
        first = range(min(ACCURACY_SAMPLES, len(workload.search_split)))
        self._judged = workload.search_split.subset(first)

    @property
    def known_good(self) -> dict[str, Any]:
        """Parameters of: nothing pruned, every layer in int8."""
        ratios = {f"{group.name}|ratio": 0.0 for group, _ in self._orders}
        return ratios | {f"{name}|int8": True for name in self._layers}

    def draw(self, trial: optuna.Trial) -> tuple[dict[str, float], tuple[str, ...]]:
        """A trial's pruning ratios by group and its int8 layers."""
        ratios = {
            group.name: trial.suggest_float(
                f"{group.name}|ratio", 0.0, HIGHEST_RATIO, step=RATIO_STEP
            )
            for group, _ in self._orders
        }
        taken = [trial.suggest_categorical(f"{n}|int8", [False, True]) for n in self._layers]
        return ratios, tuple(n for n, yes in zip(self._layers, taken, strict=True) if yes)

    def prune(self, ratios: Mapping[str, float]) -> nn.Module:
        """A copy of the network without the channels of least L1 norm."""
        network = copy.deepcopy(self._network)
        removals = [
            (group, order[: group.size - kept_size(group.size, ratios[group.name], ROUND_TO)])
            for group, order in self._orders
        ]
        remove_channels(network, removals)
        return network

    def estimate_norms(self, network: nn.Module) -> None:
        """Batch-norm statistics as plain means over calibration batches, in place."""
        norms = [m for m in network.modules() if isinstance(m, NORM_TYPES)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        inputs = [x[:NORM_SAMPLES].split(NORM_BATCH) for x in self._workload.calibration.inputs]
        with torch.no_grad():
            for batch in zip(*inputs, strict=True):
                network(*batch)
        network.eval()

    def export(self, network: nn.Module, target: Path) -> None:
        """The network's fp32 file, with a free batch."""
        # A batch of one would be taken for a constant.
        example = tuple(torch.cat([x[:1], x[:1]]) for x in self._workload.example_inputs)
        free = tuple({0: torch.export.Dim("batch")} for _ in example)
        program = torch.onnx.export(
            network, example, dynamo=True, verbose=False, dynamic_shapes=free
        )
        assert program is not None
        program.save(target)

    def quantize(self, source: Path, target: Path, layers: Collection[str]) -> None:
        """The file with some layers in int8; ONNX Runtime's pre-processing has nothing to add.

        The exporter has folded the batch norms, and shapes make no difference to the result.
        """
        model = onnx.load(source)
        inputs = [x[:QUANTIZER_SAMPLES] for x in self._workload.calibration.inputs]
        quantize_static(
            model, target, _Reader(_feeds(model, inputs, QUANTIZER_BATCH)),
            quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_quantize=nodes_to_quantize(model, layers),
        )  # fmt: skip

    def accuracy(self, path: Path) -> float:
        """On the first samples of the search split, on all cores."""
        session = _session(path, threads=0)
        batches = _feeds(onnx.load(path), self._judged.inputs, ACCURACY_BATCH)
        outputs = [session.run(None, feed) for feed in batches]
        joined = tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))
        return score(self._workload.metric, joined, self._judged.targets)

    def latency_ms(self, path: Path) -> float:
        """Median of the timed runs, one thread, batch 1."""
        session = _session(path, threads=1)
        feed = next(_feeds(onnx.load(path), self._judged.inputs, 1))
        times = []
        for _ in range(WARM_UP_RUNS + TIMED_RUNS):
            begin = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - begin)
        return 1000 * float(np.median(times[WARM_UP_RUNS:]))


@final
class _Reader(CalibrationDataReader):
    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _trial(
    loop: _Loop, study: optuna.Study, rows: Sequence[Row], begin: float, folder: Path
) -> Row:
    """One trial from the sampler's draw to its answer; a failure is an answer too."""
    clock = Stopwatch()
    with clock.step("sampler"):
        trial = study.ask()
        ratios, int8 = loop.draw(trial)
    path = folder / f"{trial.number:05d}.onnx"
    figures, failure = (math.nan, math.nan), ""
    try:
        figures = _figures(loop, ratios, int8, path, clock)
    except Exception as cause:
        # A trial that no tool can handle must not end the loop.
        failure = f"{type(cause).__name__}: {cause}"
    with clock.step("sampler"):
        if failure:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, figures)
    kept = not failure and not dominated(rows, *figures)
    if not kept:
        path.unlink(missing_ok=True)
    seconds = time.perf_counter() - begin
    model = path.name if kept else ""
    return Row(seconds, ratios, int8, *figures, model, dict(clock.seconds), failure)


def _figures(
    loop: _Loop, ratios: Mapping[str, float], int8: Sequence[str], path: Path, clock: Stopwatch
) -> tuple[float, float]:
    with clock.step("prune"):
        network = loop.prune(ratios)
    with clock.step("batch_norm"):
        loop.estimate_norms(network)
    with clock.step("export"):
        loop.export(network, path)
    if int8:
        with clock.step("quantize"):
            loop.quantize(path, path, int8)
    with clock.step("accuracy"):
        accuracy = loop.accuracy(path)
    with clock.step("latency"):
        return accuracy, loop.latency_ms(path)


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feeds(
    model: onnx.ModelProto, inputs: Sequence[Tensor], batch: int
) -> Iterator[dict[str, Any]]:
    names = [entry.name for entry in model.graph.input]
    for parts in zip(*(x.split(batch) for x in inputs), strict=True):
        yield {name: part.numpy() for name, part in zip(names, parts, strict=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Run the loop on an experiment's workload and print what its steps took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    spec = load_experiment(options.experiment).workload
    workload = load_workload(spec, options.experiment)
    rows = run_plain_loop(workload, options.seconds, options.seed, options.out)
    print(f"{len(rows)} trials, {60 * len(rows) / rows[-1].t_s:.1f} a minute")
    print(", ".join(f"{name} {mean:.3f} s" for name, mean in step_seconds(rows).items()))


def step_seconds(rows: Sequence[Row]) -> dict[str, float]:
    """Mean seconds of each step over all trials."""
    names = dict.fromkeys(name for row in rows for name in row.seconds)
    return {n: sum(row.seconds.get(n, 0.0) for row in rows) / len(rows) for n in names}


if __name__ == "__main__":
    main()
