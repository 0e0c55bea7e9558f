"""Refusing a workload whose search would mislead."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.workload.inputs import axis_sizes, describe
from autocompress.workload.network import other_sizes
from autocompress.workload.scoring import check_finite, network_outputs, score
from autocompress.workload.types import Array, Split, Workload

_CHECKED_SAMPLES = 64
_ALLOWED_OVERLAP = 0.01
# Differences in the outputs, as shares of the largest output.
_REPEAT_TOLERANCE = 1e-4
_BATCH_TOLERANCE = 1e-2
# PyTorch's cross-entropy leaves such targets out.
_NO_CLASS = -100


def check_workload(workload: Workload) -> tuple[str, ...]:
    """Refuse a workload whose search would mislead; runs a copy of the network on <= 64 samples.

    Returns:
        Warnings, each one sentence.

    Raises:
        WorkloadError: the splits are empty, overlap or do not fit the example inputs; inputs or
            outputs are not finite; open axes are fixed in the network; it is in training mode,
            random, changed by being run or dependent on its batch; targets or metric do not work.
    """
    _check_mode(workload.network)
    for name, split in workload.splits().items():
        _check_split(name, split, workload)
    _check_place(workload)
    warnings = _check_overlap(workload.splits())
    samples = workload.search_split.subset(_CHECKED_SAMPLES)
    outputs = _check_network(workload.network, samples)
    _check_axes(workload)
    if workload.class_scores:
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
            given=describe(network),
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


def _check_place(workload: Workload) -> None:
    """Everything is taken as fp32 on the CPU: that is what is exported and compared."""
    held = (*workload.network.parameters(), *workload.network.buffers())
    inputs = [t for split in workload.splits().values() for t in split.inputs]
    for what, tensors in (("network", held), ("inputs", inputs)):
        away = {str(t.device) for t in tensors if t.device.type != "cpu"}
        odd = {str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype != torch.float32}
        if away or odd:
            raise WorkloadError(
                f"The workload's {what} must be fp32 on the CPU.",
                given=", ".join(sorted(away | odd)),
                allowed="torch.float32, cpu",
                advice="call .float() and .cpu() on it; the original is exported as fp32",
            )


def _check_split(name: str, split: Split, workload: Workload) -> None:
    if len(split) == 0:
        raise WorkloadError(f"The split '{name}' is empty.", allowed="at least one sample")
    found = [(tuple(t.shape[1:]), t.dtype) for t in split.inputs]
    expected = [(tuple(t.shape[1:]), t.dtype) for t in workload.example_inputs]
    if found != expected:
        raise WorkloadError(
            f"The inputs of split '{name}' do not fit example_inputs.",
            given=describe(split.inputs),
            allowed=describe(workload.example_inputs) + " (any batch)",
            advice="pad, cut or resize the samples to one size: dynamic_axes are open in the files "
            "only, and figures are taken at one size"
            if workload.dynamic_axes
            else None,
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
    check_finite(first, "The network's outputs on search_split")
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


def _check_axes(workload: Workload) -> None:
    """An axis that is called open has to be so in the network, before it can be in a file."""
    axes, inputs = workload.dynamic_axes, workload.example_inputs
    if axes and other_sizes(copy.deepcopy(workload.network), inputs, axes) is None:
        raise WorkloadError(
            "The network runs at no other size of its dynamic_axes.",
            given=", ".join(f"{n} of {size}" for n, size in axis_sizes(inputs, axes).items()),
            allowed="axes that half, double or three quarters of the size works for",
            advice="leave axes that the network fixes out of dynamic_axes, or rename those that "
            "do not vary together",
        )


def _check_targets(workload: Workload, outputs: Array) -> None:
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise WorkloadError(
            f"The metric '{workload.metric}' needs class scores along axis 1 of the first output.",
            given=f"output shape {outputs.shape}",
            allowed="(n, classes, ...) with two or more classes",
            advice="give a function of outputs and targets as the metric",
        )
    if workload.metric != "accuracy":
        _check_labels(workload.train, outputs)
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
                given=describe(split.targets),
                allowed=f"integers of shape {shape}",
                advice="for one-hot targets: targets.argmax(1)",
            )
        _check_range(name, split.targets, outputs.shape[1])


def _check_labels(train: Split | None, outputs: Array) -> None:
    """What looks like class numbers is learned, whatever the metric reads."""
    if train is None or train.targets is None or train.targets.is_complex():
        return
    scores = tuple(train.targets.shape) == (len(train), *outputs.shape[2:])
    if scores and not train.targets.is_floating_point():
        labels = train.targets[train.targets != _NO_CLASS]
        if len(labels):
            _check_range("train", labels, outputs.shape[1])


def _check_range(name: str, targets: Tensor, classes: int) -> None:
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise WorkloadError(
            f"The targets of split '{name}' are outside the network's classes.",
            given=f"{low} to {high}",
            allowed=f"0 to {classes - 1}",
            advice="to distil only, give the train split no targets" if name == "train" else None,
        )


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
