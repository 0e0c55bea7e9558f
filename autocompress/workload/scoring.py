"""Running a network on a split, and judging its outputs by the metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.workload.inputs import describe
from autocompress.workload.types import Array, Metric


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
                given=describe(batch),
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
                given=f"{describe(outputs)} for a batch of {len(batch[0])}",
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


def chance_level(metric: Metric, targets: Tensor | None) -> float:
    """What a network that does not look at its inputs scores at best; -inf where nothing says so.

    Args:
        targets: integers of shape (n, ...), for `accuracy`.
    """
    if metric != "accuracy" or targets is None:
        return -math.inf
    counts = np.unique(np.asarray(targets), return_counts=True)[1]
    return float(counts.max()) / targets.numel()


def score_standard_error(metric: Metric, value: float, samples: int) -> float | None:
    """Standard error of an accuracy or agreement; None for a custom metric.

    Binomial, with two successes and two failures added (Agresti and Coull 1998), so that a
    perfect score on few samples does not count as certain.
    """
    if callable(metric):
        return None
    share = (value * samples + 2) / (samples + 4)
    return math.sqrt(share * (1 - share) / (samples + 4))


def check_finite(outputs: tuple[Array, ...], what: str) -> None:
    """Check that no output holds NaN or infinite values.

    Args:
        outputs: each of shape (n, ...).
        what: begins the error's sentence.

    Raises:
        WorkloadError: one does.
    """
    for index, output in enumerate(outputs):
        broken = ~np.isfinite(output).reshape(len(output), -1).all(axis=1)
        if broken.any():
            raise WorkloadError(
                f"{what} hold NaN or infinite values.",
                given=f"output {index}: {broken.sum()} of {len(output)} samples, the first at "
                f"index {broken.argmax()}",
                allowed="finite numbers",
                advice="run the network on that sample, and mend its input or the layer that "
                "overflows; leave outputs out that nobody reads",
            )


def _classes(outputs: Array) -> Array:
    if outputs.ndim < 2 or len(outputs) == 0:
        raise WorkloadError(
            "Class scores are needed along axis 1.",
            given=f"output shape {outputs.shape}",
            allowed="(n, classes, ...), n >= 1",
        )
    check_finite((outputs,), "The outputs that are scored")
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
