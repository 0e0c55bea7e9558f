"""What the user brings: a trained network, its data in four disjoint splits, and a metric."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, cast, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocompress.errors import AutocompressError, WorkloadError

Array: TypeAlias = npt.NDArray[Any]
Metric: TypeAlias = Literal["accuracy", "agreement"] | Callable[[Any, Any], float]

_CHECKED_SAMPLES = 64
_ALLOWED_OVERLAP = 0.01
# Differences in the outputs, as shares of the largest output.
_REPEAT_TOLERANCE = 1e-4
_BATCH_TOLERANCE = 1e-2


@final
@dataclass(frozen=True, eq=False)
class Split:
    """Samples with their targets; dimension 0 of every tensor counts the samples.

    Args:
        inputs: one tensor per network input, each of shape (n, ...); a single tensor will do.
        targets: shape (n, ...), or None where the metric needs none.

    Raises:
        WorkloadError: no tensor, or tensors of different lengths.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", _as_batch(self.inputs, "A split's inputs"))
        if self.targets is None:
            return
        if not isinstance(self.targets, Tensor) or self.targets.ndim == 0:
            raise WorkloadError(
                "A split's targets must be a tensor with one entry per sample.",
                given=_describe(self.targets),
                allowed="a torch.Tensor of shape (n, ...), or None",
            )
        if len(self.targets) != len(self):
            raise WorkloadError(
                "A split has not one target per sample.",
                given=f"{len(self)} samples, {len(self.targets)} targets",
                allowed="as many targets as samples",
            )

    def __len__(self) -> int:
        return len(self.inputs[0])

    def subset(self, which: int | Sequence[int] | Tensor) -> Split:
        """The samples with the given indices, or for a number n: n evenly spaced ones (or all)."""
        if isinstance(which, int):
            count = min(which, len(self))
            index = torch.arange(count) * len(self) // max(count, 1)
        else:
            index = torch.as_tensor(which, dtype=torch.long)
        targets = None if self.targets is None else self.targets[index]
        return Split(tuple(tensor[index] for tensor in self.inputs), targets)

    def numpy_inputs(self) -> tuple[Array, ...]:
        """The inputs as numpy arrays, sharing memory where they can."""
        return tuple(tensor.detach().cpu().numpy() for tensor in self.inputs)


@final
@dataclass(frozen=True, eq=False)
class Workload:
    """A trained network and all that is needed to compress and judge it.

    Args:
        network: trained, in eval mode; its outputs have the batch in dimension 0.
        example_inputs: a batch of one or more per network input; a single tensor will do.
        calibration: for statistics and ranges; needs no targets.
        train: for recovery; None leaves recovery out.
        search_split: judges candidates during the search.
        test_split: judges the final front only; the search never reads it.
        metric: higher is better. `accuracy`: share of samples whose argmax over axis 1 of the
            first output equals the integer target; `agreement`: the same against the original
            network's argmax; or a function of the outputs (one array, or a tuple of arrays where
            the network has several outputs) and the targets (an array or None).

    Raises:
        WorkloadError: `example_inputs` are no batch of tensors.
    """

    network: nn.Module
    example_inputs: tuple[Tensor, ...]
    calibration: Split
    train: Split | None
    search_split: Split
    test_split: Split
    metric: Metric = "accuracy"

    def __post_init__(self) -> None:
        batch = _as_batch(self.example_inputs, "A workload's example_inputs")
        if len(batch[0]) == 0:
            raise WorkloadError(
                "A workload's example_inputs hold no sample.",
                given=_describe(batch),
                allowed="a batch of at least one in dimension 0",
            )
        object.__setattr__(self, "example_inputs", batch)

    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        named = {
            "calibration": self.calibration,
            "train": self.train,
            "search_split": self.search_split,
            "test_split": self.test_split,
        }
        return {name: split for name, split in named.items() if split is not None}


def network_outputs(
    network: nn.Module, inputs: tuple[Tensor, ...], batch_size: int = 64
) -> tuple[Array, ...]:
    """Run a network, in the mode that it is in, without gradients.

    Args:
        network: gets the inputs as positional arguments.
        inputs: tensors of shape (n, ...), n >= 1.
        batch_size: samples per forward pass.

    Returns:
        One array of shape (n, ...) per output, float32 for floating outputs.

    Raises:
        WorkloadError: the network raises, or returns something else than tensors of batches.
    """
    chunks: list[tuple[Array, ...]] = []
    for start in range(0, len(inputs[0]), batch_size):
        batch = tuple(tensor[start : start + batch_size] for tensor in inputs)
        try:
            with torch.no_grad():
                result = network(*batch)
        except Exception as cause:
            raise WorkloadError(
                f"The network does not run on its inputs: {type(cause).__name__}: {cause}",
                given=_describe(batch),
                advice="make network(*inputs) work for the inputs of every split",
            ) from cause
        outputs = (result,) if isinstance(result, Tensor) else result
        if (
            not isinstance(outputs, (tuple, list))
            or not outputs
            or not all(isinstance(o, Tensor) and o.shape[:1] == batch[0].shape[:1] for o in outputs)
        ):
            raise WorkloadError(
                "The network's outputs are no tensors with the batch in dimension 0.",
                given=f"{_describe(outputs)} for a batch of {len(batch[0])}",
                allowed="a Tensor, or a tuple or list of Tensors, each of shape (batch, ...)",
                advice="wrap the network in a module that returns such tensors",
            )
        chunks.append(
            tuple((o.float() if o.is_floating_point() else o).cpu().numpy() for o in outputs)
        )
    return tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))


def score(
    metric: Metric,
    outputs: Array | tuple[Array, ...],
    targets: Tensor | Array | None,
    original_outputs: Array | tuple[Array, ...] | None = None,
) -> float:
    """Judge outputs by a metric; higher is better.

    Args:
        metric: see `Workload`.
        outputs: one array, or one per network output; shape (n, classes, ...) for `accuracy` and
            `agreement`, which read the first output.
        targets: shape (n, ...); may be None for `agreement` and custom metrics.
        original_outputs: those of the original network on the same samples, for `agreement`.

    Raises:
        WorkloadError: outputs or score are not finite, a custom metric raises, shapes disagree,
            or what the metric compares with is missing.
    """
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = None if targets is None else np.asarray(targets)
    if callable(metric):
        return _custom_score(metric, several, wanted)
    if metric == "accuracy":
        reference = wanted
    elif metric == "agreement":
        first = original_outputs[0] if isinstance(original_outputs, tuple) else original_outputs
        reference = None if first is None else _classes(first)
    else:
        raise WorkloadError(
            "The metric is unknown.", given=metric, allowed="accuracy, agreement, or a function"
        )
    if reference is None:
        missing = "targets" if metric == "accuracy" else "the original network's outputs"
        raise WorkloadError(f"The metric '{metric}' needs {missing}.", given="none")
    predicted = _classes(several[0])
    if predicted.shape != reference.shape:
        raise WorkloadError(
            f"The metric '{metric}' cannot compare arrays of different shapes.",
            given=f"predictions {predicted.shape}, reference {reference.shape}",
            allowed="integer targets of shape (n, ...) for outputs of shape (n, classes, ...)",
        )
    return float((predicted == reference).mean())


def score_standard_error(metric: Metric, value: float, samples: int) -> float | None:
    """Standard error of an accuracy or agreement; None for a custom metric.

    Binomial, with two successes and two failures added (Agresti and Coull 1998), so that a
    perfect score on few samples does not count as certain.
    """
    if callable(metric):
        return None
    share = (value * samples + 2) / (samples + 4)
    return math.sqrt(share * (1 - share) / (samples + 4))


def load_workload(spec: str, near: Path | None = None) -> Workload:
    """Call the user's function that returns a workload.

    Args:
        spec: `file.py:function`; the file's folder can be imported from, as for a script.
        near: the experiment file; the path is looked up beside it first, then from the working
            directory.

    Raises:
        WorkloadError: no such file or function, or it raises or returns something else.
    """
    name, separator, function_name = spec.rpartition(":")
    if not separator or not name.endswith(".py") or not function_name.isidentifier():
        raise WorkloadError(
            "A workload's name is malformed.", given=spec, allowed="file.py:function"
        )
    candidates = [*([near.parent / name] if near else []), Path(name)]
    path = next((p.resolve() for p in candidates if p.is_file()), None)
    if path is None:
        raise WorkloadError(
            "The workload's file does not exist.",
            given=spec,
            allowed="one of " + ", ".join(dict.fromkeys(str(p.absolute()) for p in candidates)),
            advice="correct `workload` in the experiment file",
        )
    with _importable(path.parent):
        module = _import_file(path)
        function = getattr(module, function_name, None)
        if not callable(function):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise WorkloadError(
                f"The workload's file has no function '{function_name}'.",
                given=spec,
                allowed=", ".join(names) or "the file has no functions at all",
                advice="correct `workload` in the experiment file",
            )
        workload = _guarded(function, f"The workload's function '{function_name}' raised", path)
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"The workload's function '{function_name}' returned no Workload.",
            given=_describe(workload),
            allowed="autocompress.workload.Workload",
        )
    return workload


def check_workload(workload: Workload) -> tuple[str, ...]:
    """Refuse a workload whose search would mislead; runs a copy of the network on <= 64 samples.

    Returns:
        Warnings, each one sentence.

    Raises:
        WorkloadError: the splits are empty, overlap or do not fit the example inputs; inputs or
            outputs are not finite; the network is in training mode, random, changed by being run
            or dependent on its batch; targets or metric do not work.
    """
    _check_mode(workload.network)
    for name, split in workload.splits().items():
        _check_split(name, split, workload.example_inputs)
    warnings = _check_overlap(workload.splits())
    samples = workload.search_split.subset(_CHECKED_SAMPLES)
    outputs = _check_network(workload.network, samples)
    if not callable(workload.metric):
        _check_targets(workload, outputs[0])
    value = score(workload.metric, outputs, samples.targets, outputs)
    classes = outputs[0].shape[1] if outputs[0].ndim > 1 else 0
    if workload.metric == "accuracy" and value <= 1 / classes:
        warnings.append(
            f"The original network's accuracy on {len(samples)} samples of search_split is "
            f"{value:.1%}, no better than chance among {classes} classes: is its input prepared "
            "as in training?"
        )
    return tuple(warnings)


def _check_mode(network: object) -> None:
    if not isinstance(network, nn.Module):
        raise WorkloadError(
            "The workload's network is no module.",
            given=_describe(network),
            allowed="torch.nn.Module",
        )
    training = [name or "the network itself" for name, m in network.named_modules() if m.training]
    if training:
        raise WorkloadError(
            "The network is in training mode.",
            given=", ".join(training[:3]) + (" ..." if len(training) > 3 else ""),
            allowed="a network whose modules are all in eval mode",
            advice="call network.eval() before you return the workload",
        )


def _check_split(name: str, split: Split, example_inputs: tuple[Tensor, ...]) -> None:
    if len(split) == 0:
        raise WorkloadError(f"The split '{name}' is empty.", allowed="at least one sample")
    found = [(tuple(t.shape[1:]), t.dtype) for t in split.inputs]
    expected = [(tuple(t.shape[1:]), t.dtype) for t in example_inputs]
    if found != expected:
        raise WorkloadError(
            f"The inputs of split '{name}' do not fit example_inputs.",
            given=_describe(split.inputs),
            allowed=_describe(example_inputs) + " (any batch)",
        )
    for position, tensor in enumerate(split.inputs):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).reshape(len(split), -1).any(1).sum())
            raise WorkloadError(
                f"The split '{name}' holds NaN or infinite values.",
                given=f"{bad} of {len(split)} samples of input {position}",
                advice="drop these samples or repair their preparation",
            )


def _check_overlap(splits: dict[str, Split]) -> list[str]:
    hashes = {name: _sample_hashes(split) for name, split in splits.items()}
    unique = {name: set(values) for name, values in hashes.items()}
    warnings = []
    for small, large in combinations(sorted(hashes, key=lambda name: len(hashes[name])), 2):
        shared = sum(value in unique[large] for value in hashes[small])
        fact = f"{shared} of the {len(hashes[small])} samples of '{small}' also occur in '{large}'"
        if shared > _ALLOWED_OVERLAP * len(hashes[small]):
            raise WorkloadError(
                f"The splits '{small}' and '{large}' overlap.",
                given=fact,
                allowed=f"at most {_ALLOWED_OVERLAP:.0%} of the smaller split",
                advice="give every sample to one split only, else the scores flatter the search",
            )
        if shared:
            warnings.append(f"{fact}; they are kept.")
    return warnings


def _check_network(network: nn.Module, samples: Split) -> tuple[Array, ...]:
    try:
        trial = copy.deepcopy(network)
    except Exception as cause:
        raise WorkloadError(
            f"The network cannot be copied: {type(cause).__name__}: {cause}",
            advice="make copy.deepcopy(network) work, for example detach stored activations",
        ) from cause
    before = {name: tensor.clone() for name, tensor in _state(trial)}
    with torch.random.fork_rng(devices=[]):
        first = network_outputs(trial, samples.inputs)
        again = network_outputs(trial, samples.inputs)
        part = tuple(tensor[: (len(samples) + 1) // 2] for tensor in samples.inputs)
        alone = network_outputs(trial, part)
    after = dict(_state(trial))
    changed = [n for n in before.keys() | after.keys() if not _same(before.get(n), after.get(n))]
    if changed:
        raise WorkloadError(
            "The network changes when it is run in eval mode.",
            given=", ".join(sorted(changed)[:3]),
            allowed="parameters and buffers that a forward pass leaves as they are",
            advice="update state in training mode only",
        )
    if not all(np.isfinite(o).all() for o in first):
        raise WorkloadError("The network's outputs hold NaN or infinite values on search_split.")
    if _difference(first, again) > _REPEAT_TOLERANCE:
        raise WorkloadError(
            "The network's outputs are not deterministic: two runs in eval mode differ.",
            given=f"difference {_difference(first, again):.1%} of the largest output",
            advice="switch randomness off in eval mode: F.dropout(x, p, training=self.training)",
        )
    if _difference(tuple(o[: len(part[0])] for o in first), alone) > _BATCH_TOLERANCE:
        raise WorkloadError(
            "The network's output for a sample depends on the other samples of the batch.",
            advice="use stored statistics in eval mode: F.batch_norm(..., training=self.training)",
        )
    return first


def _check_targets(workload: Workload, outputs: Array) -> None:
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise WorkloadError(
            f"The metric '{workload.metric}' needs class scores along axis 1 of the first output.",
            given=f"output shape {outputs.shape}",
            allowed="(n, classes, ...) with two or more classes",
            advice="give a function of outputs and targets as the metric",
        )
    if workload.metric != "accuracy":
        return
    for name, split in workload.splits().items():
        if split.targets is None:
            if name in ("search_split", "test_split"):
                raise WorkloadError(
                    f"The metric 'accuracy' needs targets, but split '{name}' has none.",
                    advice="give targets, or use the metric 'agreement'",
                )
            continue
        shape = (len(split), *outputs.shape[2:])
        kind = split.targets.dtype
        if tuple(split.targets.shape) != shape or kind.is_floating_point or kind.is_complex:
            raise WorkloadError(
                f"The targets of split '{name}' are no class numbers.",
                given=_describe(split.targets),
                allowed=f"integers of shape {shape}",
                advice="for one-hot targets: targets.argmax(1)",
            )
        low, high = int(split.targets.min()), int(split.targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise WorkloadError(
                f"The targets of split '{name}' are outside the network's classes.",
                given=f"{low} to {high}",
                allowed=f"0 to {outputs.shape[1] - 1}",
            )


def _as_batch(tensors: object, what: str) -> tuple[Tensor, ...]:
    batch = (tensors,) if isinstance(tensors, Tensor) else tensors
    if (
        not isinstance(batch, (tuple, list))
        or not batch
        or not all(isinstance(t, Tensor) and t.ndim > 0 for t in batch)
        or len({len(t) for t in batch}) > 1
    ):
        raise WorkloadError(
            f"{what} must be tensors that have the same number of samples.",
            given=_describe(tensors),
            allowed="a torch.Tensor, or a tuple of them, with the samples in dimension 0",
        )
    return tuple(batch)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of [" + ", ".join(_describe(v) for v in value) + "]"
    return type(value).__name__


def _classes(outputs: Array) -> Array:
    if outputs.ndim < 2 or len(outputs) == 0:
        raise WorkloadError(
            "Class scores are needed along axis 1.",
            given=f"output shape {outputs.shape}",
            allowed="(n, classes, ...), n >= 1",
        )
    if not np.isfinite(outputs).all():
        raise WorkloadError("The outputs hold NaN or infinite values.")
    return cast(Array, outputs.argmax(axis=1))


def _custom_score(
    metric: Callable[[Any, Any], float], outputs: tuple[Array, ...], targets: Array | None
) -> float:
    name = getattr(metric, "__name__", type(metric).__name__)
    try:
        value = float(metric(outputs[0] if len(outputs) == 1 else outputs, targets))
    except Exception as cause:
        raise WorkloadError(
            f"The metric '{name}' raised {type(cause).__name__}: {cause}",
            given="outputs " + ", ".join(str(o.shape) for o in outputs),
            allowed="a function of (outputs, targets) as numpy arrays that returns one number",
        ) from cause
    if not math.isfinite(value):
        raise WorkloadError(
            f"The metric '{name}' returned no finite number.",
            given=value,
            advice="return a finite number for every output that a network may have",
        )
    return value


def _sample_hashes(split: Split) -> list[bytes]:
    rows = [
        np.ascontiguousarray(t.detach().cpu().reshape(len(split), -1).view(torch.uint8).numpy())
        for t in split.inputs
    ]
    hashes = []
    for i in range(len(split)):
        digest = hashlib.blake2b(digest_size=16)
        for row in rows:
            digest.update(row[i])
        hashes.append(digest.digest())
    return hashes


def _state(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None or first.shape != second.shape:
        return False
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _difference(first: tuple[Array, ...], second: tuple[Array, ...]) -> float:
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        size = max(float(np.abs(wide_a).max(initial=0)), 1e-12)
        largest = max(largest, float(np.abs(wide_a - wide_b).max(initial=0)) / size)
    return largest


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import_file(path: Path) -> ModuleType:
    # A hash of the path keeps two files of the same name apart, and apart from installed modules.
    name = f"_workload_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise WorkloadError("The workload's file cannot be imported.", given=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader = spec.loader
    try:
        _guarded(lambda: loader.exec_module(module), "The workload's file cannot be imported", path)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(function: Callable[[], object], what: str, path: Path) -> object:
    try:
        return function()
    except AutocompressError:
        raise
    except (Exception, SystemExit) as cause:
        raise WorkloadError(
            f"{what}: {type(cause).__name__}: {cause}",
            given=path,
            advice=f"run `python {path.name}` or read the traceback above to find the cause",
        ) from cause
