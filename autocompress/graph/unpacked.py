"""Modules that pack several weights together, as modules of single weights.

What compresses knows modules with one weight each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from autocompress.graph.attention import Attention, is_packed_attention
from autocompress.graph.layers import same_outputs
from autocompress.graph.recurrent import Recurrent, is_recurrent


def with_unpacked(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> nn.Module:
    """The network with its recurrent layers and packed attention taken apart.

    Proven on the example inputs; what reads more of a module than its outputs keeps it.

    Args:
        network: in evaluation mode; not changed, and given back itself if there is nothing to do.
        example_inputs: batch in dimension 0.
    """
    names = [
        name
        for name, module in network.named_modules()
        if name and (is_recurrent(module) or is_packed_attention(module))
    ]
    if not names:
        return network
    changed = _replaced(network, names)
    if same_outputs(network, changed, example_inputs):
        return changed
    alone = [n for n in names if same_outputs(network, _replaced(network, [n]), example_inputs)]
    changed = _replaced(network, alone)
    return changed if alone and same_outputs(network, changed, example_inputs) else network


def _replaced(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy that shares the network's tensors."""
    shared = {id(x): x for x in (*network.parameters(), *network.buffers())}
    changed = copy.deepcopy(network, shared)
    for name in names:
        changed.set_submodule(name, _unpacked(changed.get_submodule(name)))
    return changed


def _unpacked(module: nn.Module) -> nn.Module:
    if is_recurrent(module):
        made: nn.Module = Recurrent(cast(nn.RNNBase, module))
    else:
        made = Attention(cast(nn.MultiheadAttention, module))
    return made.train(module.training)
