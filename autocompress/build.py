"""From a plan to the file that ships: stitch, recover, quantize, export, code."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import onnx
import torch
from torch import Tensor, nn

from autocompress.bank import Bank, Stitched, apply_stage, stitch
from autocompress.config import CalibrationSettings
from autocompress.device import DeviceProfile
from autocompress.errors import PlanError
from autocompress.export.coding import CODED_SUFFIX
from autocompress.export.coding.beside import Coding
from autocompress.export.exporter import Exporter, FloatModel
from autocompress.export.quantize import quantize
from autocompress.export.stock import StockOptions, advised_options, stock_quantize
from autocompress.files import write_whole
from autocompress.plan import Plan
from autocompress.recover import BatchNormRepair, Trainer, Watch, recovery_of
from autocompress.recover.autocast import takes_bf16
from autocompress.techniques import LayerTechnique, Stage, consistent, technique_of
from autocompress.techniques.equalize import Equalize, equalize
from autocompress.techniques.stock import StockQuantizer
from autocompress.workload import Split, Workload

# The original's file, which speed-ups are relative to.
BASELINE = "original"
_RANGE_SAMPLES = 64
_STOCK_SAMPLES = 256
# Of the search split, for a first look at a network.
_SAMPLE = 64
# Never stops.
_UNWATCHED = Watch()


@final
@dataclass(frozen=True)
class Artifact:
    """A candidate's file, with what was noticed while it was made."""

    path: Path
    details: Mapping[str, Any]
    seconds: Mapping[str, float]


@final
@dataclass(frozen=True)
class Tried:
    """A candidate's network, and what it gave for `Builder.sample_inputs` in passing.

    Attributes:
        outputs: flat list; None for networks that were trained or not changed.
    """

    network: nn.Module
    outputs: list[Tensor] | None


@final
class Builder:
    """Makes the files of one workload's candidates.

    Args:
        workload: checked; its network is in evaluation mode.
        exporter: of the workload's network.
        bank: calibrated.
        profile: the device.
        settings: how many calibration samples each step reads.
        folder: `artifacts/` gets the files, `recovered/` trained networks and checkpoints,
            `scratch/` what no later call needs.
    """

    def __init__(
        self,
        workload: Workload,
        exporter: Exporter,
        bank: Bank,
        profile: DeviceProfile,
        settings: CalibrationSettings,
        folder: Path,
    ) -> None:
        self._workload = workload
        self._exporter = exporter
        self._bank = bank
        self._profile = profile
        self._calibration = workload.calibration.inputs
        self._repair = BatchNormRepair(
            bank.network,
            self._calibration,
            settings.repair_samples,
            bf16=takes_bf16(bank.network, self._calibration),
        )
        order = torch.randperm(
            len(workload.search_split), generator=torch.Generator().manual_seed(0)
        )
        self._sample = workload.search_split.subset(order[:_SAMPLE])
        self._artifacts = folder / "artifacts"
        self._trainer = Trainer(bank, self._repair, workload, folder / "recovered")
        self._artifacts.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a candidate's file is."""
        return self._artifacts / f"{name}.onnx"

    def build(
        self,
        name: str,
        plan: Plan,
        watch: Watch = _UNWATCHED,
        network: nn.Module | None = None,
    ) -> Artifact:
        """Make a candidate's file.

        Args:
            watch: follows the plan's trainings, and may stop them.
            network: what `network` gave for the plan; None to make it.

        Raises:
            PlanError: the plan does not fit the network.
            ExportError: the file is invalid or does not compute what the network computes.
            OutOfTimeError: `watch.stop` said so; a later call goes on from there.
        """
        if consistent(plan) != plan:
            raise PlanError(
                "A plan has steps that another one makes void.",
                given=[s for s in plan.to_rows() if s not in consistent(plan).to_rows()],
                advice="quantize either the whole network or single layers; train what there is",
            )
        clock = Stopwatch()
        network = network or self.network(plan, clock, watch).network
        with clock.step("export"):
            floating = self._exporter.export(network)
        with clock.step("quantize"):
            model, labels = self._quantized(floating, plan)
        with clock.step("write"):
            # A container of an earlier file of that name would be taken for this one's.
            self.path(name).with_suffix(CODED_SUFFIX).unlink(missing_ok=True)
            write_whole(self.path(name), model.SerializeToString())
        self._trainer.forget_checkpoints(plan)
        details = {
            "parity": floating.parity,
            "layers": dict(labels),
            "exported_afresh": floating.fresh,
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        return Artifact(self.path(name), details, clock.seconds)

    def build_stock(self, name: str, original: Path) -> Artifact:
        """The stock tool's int8 file of the original network, made from its file as it advises.

        Raises:
            ExportError: the stock tool fails on this network.
        """
        clock = Stopwatch()
        self.path(name).with_suffix(CODED_SUFFIX).unlink(missing_ok=True)
        options = advised_options(self._bank.network, self._bank.graph.layers, self._profile)
        with clock.step("build"):
            self._stock(onnx.load(original), self.path(name), options)
        return Artifact(self.path(name), {"ranges": options.mode}, clock.seconds)

    def start_coding(self, model: Path, cores: Collection[int], *, checked: bool) -> Coding:
        """Begin to write a file's coded container beside it; see `Coding`."""
        return Coding(model, model.with_suffix(CODED_SUFFIX), cores, checked=checked)

    @property
    def sample(self) -> Split:
        """The few samples of the search split that each network is run on in passing."""
        return self._sample

    @property
    def sample_inputs(self) -> tuple[Tensor, ...]:
        """What `Tried.outputs` belong to: calibration inputs, then those of `sample`."""
        pairs = zip(self._repair.inputs, self._sample.inputs, strict=True)
        return tuple(torch.cat(pair) for pair in pairs)

    def network(self, plan: Plan, clock: Stopwatch, watch: Watch = _UNWATCHED) -> Tried:
        """The candidate's network: quantized weights, batch norms still apart."""
        stitched, outputs = self._trained(plan, clock, watch)
        network = stitched.network
        for decision in plan.of(Equalize.technique).values():
            assert isinstance(decision, Equalize)
            with clock.step("equalize"):
                equalize(network, self._bank.graph, self._workload.example_inputs, decision)
        with clock.step("round"):
            apply_stage(self._bank, stitched, plan, Stage.QUANTIZE)
        if any(technique_of(s.decision).stage is Stage.QUANTIZE for s in plan.steps):
            with clock.step("repair_rounded"):
                outputs = self._repair(network, stitched.kept_channels, self._sample.inputs)
        if _trains(plan):
            self._trainer.retrain(network, plan, clock.step, watch)
            outputs = None
        return Tried(network, outputs)

    def training_seconds(self, plan: Plan) -> float | None:
        """An estimate of how long the trainings of a plan will take (see `Trainer.seconds`).

        0 where there is nothing to train, or it is on disk; None before any training.

        Raises:
            PlanError: the plan does not fit the network, or there is no train split.
        """
        shape = _until(plan, Stage.RECOVER)
        if not _trains(plan):
            return 0.0
        return self._trainer.seconds(stitch(self._bank, shape).network, plan)

    def training_files(self, plan: Plan) -> list[Path]:
        """Where what a plan's recovery ends with, cycle by cycle, is kept.

        Raises:
            PlanError: the plan does not fit the network, or there is no train split.
        """
        shape = _until(plan, Stage.RECOVER)
        if recovery_of(shape) is None:
            return []
        return self._trainer.files(stitch(self._bank, shape).network, shape)

    def _trained(
        self, plan: Plan, clock: Stopwatch, watch: Watch
    ) -> tuple[Stitched, list[Tensor] | None]:
        """The float network, trained if the plan says so, and the outputs of its repair.

        What was trained before is read.
        """
        outputs = None
        shape = _until(plan, Stage.RECOVER)
        with clock.step("stitch"):
            stitched = stitch(self._bank, shape)
        if recovery_of(shape) is not None:
            self._trainer.recover(stitched, shape, clock.step, watch)
        elif shape.steps and _reads_norms(plan):
            with clock.step("repair"):
                outputs = self._repair(
                    stitched.network, stitched.kept_channels, self._sample.inputs
                )
        return stitched, outputs

    def _quantized(
        self, floating: FloatModel, plan: Plan
    ) -> tuple[onnx.ModelProto, Mapping[str, str]]:
        some = tuple(x[:_RANGE_SAMPLES] for x in self._calibration)
        inputs = [x.numpy() for x in self._workload.padding.cut(some)]
        quantized = quantize(floating, inputs, self._profile)
        stock = list(plan.of(StockQuantizer.technique).values())
        choice = stock[0] if stock else None
        if not isinstance(choice, StockQuantizer) or choice.mode == "none":
            return quantized.model, quantized.labels
        options = StockOptions(
            choice.mode, choice.per_channel, choice.signed_activations, choice.calibration,
            reduce_range=self._profile.integer_weight_bits < 8,
        )  # fmt: skip
        # What a killed search leaves there, the next one clears.
        scratch = self._artifacts.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            target = Path(folder) / "stock.onnx"
            self._stock(quantized.model, target, options)
            return onnx.load(target), {"network": f"stock {options.mode} int8"}

    def _stock(self, model: onnx.ModelProto, target: Path, options: StockOptions) -> None:
        inputs = [x[:_STOCK_SAMPLES].numpy() for x in self._calibration]
        stock_quantize(model, target, inputs, options)


def _trains(plan: Plan) -> bool:
    return any(technique_of(step.decision).stage.trains for step in plan.steps)


def _until(plan: Plan, last: Stage) -> Plan:
    return Plan(tuple(s for s in plan.steps if technique_of(s.decision).stage <= last))


def _reads_norms(plan: Plan) -> bool:
    """Whether something reads batch norms before quantization, after which they are repaired."""
    techniques = [(technique_of(s.decision), s.decision) for s in plan.steps]
    return (
        all(technique.stage is not Stage.QUANTIZE for technique, _ in techniques)
        or any(isinstance(decision, Equalize) for _, decision in techniques)
        or any(isinstance(t, LayerTechnique) and t.folds_norm(d) for t, d in techniques)
    )


@final
class Stopwatch:
    """Seconds by step name."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement."""
        start = self._clock()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + self._clock() - start
            self.seconds[name] = round(spent, 4)
