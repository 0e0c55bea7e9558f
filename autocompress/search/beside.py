"""Many changed networks in one pass, beside the original.

A batch holds the same samples once for the original network and once for every change, and each
changed layer is computed anew for its own part; a block that is taken out gives its part what came
in. Batch norms are repaired in passing, by what the change did to the moments of its part against
the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from autocompress.graph.blocks import PassThrough, first_output, first_tensor
from autocompress.graph.layers import LAYER_TYPES, NORM_TYPES, flatten_outputs
from autocompress.recover.normalization import following, moments

_TINY = 1e-12


def run_beside(
    network: nn.Module,
    changes: Sequence[Mapping[str, nn.Module]],
    inputs: tuple[Tensor, ...],
) -> list[list[Tensor]]:
    """Outputs of the original network and of changed ones, in one pass over the same samples.

    Args:
        network: in evaluation mode; left as it was.
        changes: for each changed network its modules by name, of unchanged shapes.
        inputs: samples in dimension 0.

    Returns:
        For the original, then for every change, the flat list of outputs.
    """
    parts = len(changes) + 1
    by_layer: dict[str, list[tuple[int, nn.Module]]] = {}
    for part, modules in enumerate(changes, 1):
        for name, module in modules.items():
            by_layer.setdefault(name, []).append((part, module))
    # Unlike `repeat`, this keeps the layout.
    batch = tuple(torch.cat([x] * parts) for x in inputs)
    # In float32: the change of one layer to 8 bits is smaller than what bf16 rounds away.
    with torch.no_grad(), _hooks(network, by_layer, parts):
        outputs = flatten_outputs(network(*batch))
    return [list(chunks) for chunks in zip(*(o.chunk(parts) for o in outputs), strict=True)]


@contextmanager
def _hooks(
    network: nn.Module, by_layer: Mapping[str, Sequence[tuple[int, nn.Module]]], parts: int
) -> Iterator[None]:
    pass_ = _Pass(parts)
    norms = [m for m in network.modules() if isinstance(m, NORM_TYPES) and m.track_running_stats]
    handles = [
        network.get_submodule(name).register_forward_hook(
            _replace_parts(found, pass_), with_kwargs=True
        )
        for name, found in by_layer.items()
    ]
    handles += [module.register_forward_hook(_repair(pass_)) for module in norms]
    own = [m for m in network.modules() if isinstance(m, LAYER_TYPES) and "forward" not in vars(m)]
    shared = own + norms
    for module in shared:
        setattr(module, "forward", _once(module, pass_))  # noqa: B010 - as mypy has it
    try:
        yield
    finally:
        for module in shared:
            del module.forward
        for handle in handles:
            handle.remove()


@final
@dataclass
class _Pass:
    """Whether the parts of a batch still are copies of each other: no changed layer was reached."""

    parts: int
    changed: bool = False


def _once(module: nn.Module, pass_: _Pass) -> Callable[[Tensor], Tensor]:
    """The work of a layer that treats each row by itself, done once as long as parts are copies."""
    forward = module.forward

    def run(x: Tensor) -> Tensor:
        if not pass_.changed and len(x) % pass_.parts == 0:
            chunks = x.chunk(pass_.parts)
            # Rows may be something else than samples.
            if all(torch.equal(chunks[0], chunk) for chunk in chunks[1:]):
                return torch.cat([forward(chunks[0])] * pass_.parts)
        return cast(Tensor, forward(x))

    return run


Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


def _replace_parts(found: Sequence[tuple[int, nn.Module]], pass_: _Pass) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        pass_.changed = True
        x, given = first_tensor(args, kwargs), first_output(output)
        assert x is not None and given is not None
        rows = len(given[0]) // pass_.parts
        changed = given[0].clone()
        for part, module in found:
            mine = slice(part * rows, (part + 1) * rows)
            changed[mine] = (
                x[mine] if isinstance(module, PassThrough) else module(_rounded(module, x[mine]))
            )
        return changed if isinstance(output, Tensor) else type(output)((changed, *output[1:]))

    return hook


def _rounded(module: nn.Module, x: Tensor) -> Tensor:
    """A quantized layer's inputs as its integers would hold them, by the range of the samples."""
    # A layer whose batch norm was folded stands first in a sequence.
    inner = module[0] if isinstance(module, nn.Sequential) else module
    how = getattr(inner, "integer_weight", None)
    if how is None or how.activation_bits >= 32:
        return x
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / (2**how.activation_bits - 1)).clamp(min=_TINY)
    rounded: Tensor = torch.round((x - low) / step) * step + low
    return rounded


def _repair(pass_: _Pass) -> Hook:
    """Batch norms whose statistics follow the samples', by the rule of `BatchNormRepair`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not pass_.changed:
            return output
        norm, x, parts = cast(nn.BatchNorm2d, module), args[0], pass_.parts
        assert norm.running_mean is not None and norm.running_var is not None
        grouped = x.reshape(parts, len(x) // parts, x.shape[1], -1)
        first, spread = (m.reshape(grouped.shape[:3]) for m in moments(x))
        mean = first.mean(1)
        variance = ((spread + first.square()).mean(1) - mean.square()).clamp(min=0).to(x)
        mean = mean.to(x)
        running = (norm.running_mean, norm.running_var)
        mean, variance = following(running, (mean[0], variance[0]), (mean, variance))
        factor = torch.rsqrt(variance + norm.eps)
        shift = -mean * factor
        if norm.affine:
            factor, shift = factor * norm.weight, shift * norm.weight + norm.bias
        shape = (parts, 1, x.shape[1], 1)
        repaired = grouped * factor.reshape(shape) + shift.reshape(shape)
        return cast(Tensor, repaired.reshape(x.shape))

    return hook
