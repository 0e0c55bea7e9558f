"""Training of codebooks that many weights share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.bank.store import tensors_hash
from autocompress.errors import PlanError
from autocompress.recover.frozen import frozen_weights
from autocompress.recover.recovery import (
    RETRAIN_TEMPERATURE,
    RecoveryContext,
    recovery_settings,
    response_loss,
    training_identity,
)
from autocompress.recover.training import train
from autocompress.recover.training_types import TrainingReport
from autocompress.techniques.codebook_tuning import TuneCodebooks
from autocompress.workload import Split
from autocompress.workload.inputs import describe


def tune_codebooks(
    network: nn.Module,
    teacher: nn.Module,
    split: Split,
    decision: TuneCodebooks,
    context: RecoveryContext | None = None,
) -> TrainingReport:
    """Distil the original's outputs into a network whose weights are looked up in codebooks.

    In place; the network is left in evaluation mode. What has no codebook (biases, norms, other
    layers) is trained along. The weights with the least loss on held-out samples are kept, those
    from before included.

    Args:
        network: layers with codebooks as `shared_codebooks` says; in evaluation mode.
        teacher: the original, in evaluation mode; not changed.
        split: its targets may be None.

    Raises:
        PlanError: no layer has a codebook, a codebook does not fit its layer, or the training
            diverges.
        WorkloadError: targets or outputs do not fit.
        OutOfTimeError: `context.stop` said so.
    """
    context = context or RecoveryContext()
    network.eval()
    loss = response_loss(teacher, split, decision.epochs, RETRAIN_TEMPERATURE, context)
    pace = (decision.epochs, decision.learning_rate)
    settings = recovery_settings(network, len(split), pace, context)
    if decision.epochs == 0:
        return train(network, split, loss, settings)
    identity = ""
    if context.folder is not None:
        held = [b for layer in _coded_layers(network) for b in layer.buffers()]
        identity = training_identity(
            (network, teacher), split, "tune_codebooks", tensors_hash(tuple(held)),
            decision.model_dump(mode="json"), context.class_scores, *context.padding.key,
        )  # fmt: skip
    with frozen_weights(network, "integer_weight"), shared_codebooks(network):
        return train(network, split, loss, settings, context.surroundings(identity))


@contextmanager
def shared_codebooks(network: nn.Module) -> Iterator[None]:
    """Within, the parameters of layers with codebooks are their codebooks.

    A layer with the buffers `codebook`, shape (K, d), floating, and `codes`, shape (out, in / d),
    integers, has as its weight, unfolded to (out, in), the codewords of its codes one after the
    other; times the buffer `weight_scale`, shape (out, 1), if it has one, which is not trained.
    So a codeword's gradient is the sum over all places that use it (Han et al. 2016, Deep
    Compression, section 3.3). Numbers of a codebook that are exactly zero stay zero.

    Afterwards the layers have plain weights again, exactly what their trained `codebook` says.

    Raises:
        PlanError: no layer has a codebook, or one does not fit its layer.
    """
    layers = _coded_layers(network)
    if not layers:
        raise PlanError(
            "No layer of the network has a codebook to train.",
            allowed="layers with the buffers `codebook` and `codes`",
            advice="cluster the weights first",
        )
    lookups = [_Lookup(layer) for layer in layers]
    for layer, lookup in zip(layers, lookups, strict=True):
        parametrize.register_parametrization(layer, "weight", lookup, unsafe=True)
    try:
        yield
    finally:
        for layer, lookup in zip(layers, lookups, strict=True):
            _make_plain(layer, lookup)


@final
class _Lookup(nn.Module):
    """A parametrization from a codebook to the weight of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight, codebook, codes = (
            cast(Tensor, getattr(layer, name)) for name in ("weight", "codebook", "codes")
        )
        _check(weight, codebook, codes)
        self._shape = weight.shape
        self._scale = cast("Tensor | None", getattr(layer, "weight_scale", None))
        # No buffers: checkpoints need not hold what follows from the codes.
        self._codebook = codebook.detach().clone()
        self._alive = self._codebook != 0
        width = codebook.shape[1]
        places = codes.long()[..., None] * width + torch.arange(width, device=codes.device)
        self._places = places.flatten()

    def forward(self, codebook: Tensor) -> Tensor:
        """The weight: places (out * in,) in the flat codebook."""
        # The backward of `index_select` sums in a fixed order, that of indexing does not.
        flat = self.alive(codebook).flatten()
        unfolded = flat.index_select(0, self._places).reshape(self._shape[0], -1)
        if self._scale is not None:
            unfolded = unfolded * self._scale
        return unfolded.reshape(self._shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook that the training starts from."""
        return self._codebook.clone()

    def alive(self, codebook: Tensor) -> Tensor:
        """The codebook with zeros where it had zeros at first."""
        return torch.where(self._alive, codebook, 0.0)


def _coded_layers(network: nn.Module) -> list[nn.Module]:
    return [
        module for module in network.modules()
        if {"codebook", "codes"} <= {name for name, _ in module.named_buffers(recurse=False)}
    ]  # fmt: skip


def _check(weight: Tensor, codebook: Tensor, codes: Tensor) -> None:
    rows, columns = weight.shape[0], weight[0].numel()
    fits = (
        codebook.ndim == 2
        and codebook.dtype == weight.dtype
        and not codes.is_floating_point()
        and codes.ndim == 2
        and (codes.shape[0], codes.shape[1] * codebook.shape[1]) == (rows, columns)
        and int(codes.min()) >= 0
        and int(codes.max()) < len(codebook)
    )
    if not fits:
        raise PlanError(
            "A codebook does not fit its layer's weight.",
            given=f"codebook {describe(codebook)}, codes {describe(codes)} from "
            f"{int(codes.min())} to {int(codes.max())}, weight {describe(weight)}",
            allowed=f"codebook (K, d) of the weight's type, codes ({rows}, {columns} / d) "
            "from 0 to K - 1",
        )


def _make_plain(layer: Any, lookup: _Lookup) -> None:
    with torch.no_grad():
        codebook = lookup.alive(layer.parametrizations.weight.original).clone()
        parametrize.remove_parametrizations(layer, "weight")
        layer.codebook.copy_(codebook)
    layer.weight.grad = None
