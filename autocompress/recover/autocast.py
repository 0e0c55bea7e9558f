"""Whether to use bf16 autocast: by what the device and the network can do, never by the clock."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autocompress.device import cpu_facts

# Instructions that multiply bf16 (x86: AVX-512 BF16 and AMX; Arm: BF16). Without them oneDNN
# converts to fp32 and back, which is slower than fp32 alone.
_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_FEW = 2


def bf16_pays(device: torch.device) -> bool:
    """Whether a device has arithmetic for bf16.

    A rule and no measurement, because a noisy clock would make the result of one seed differ from
    call to call. Machines of different kinds may still decide differently.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not _CPU_FLAGS.isdisjoint(cpu_facts()[1])


def takes_bf16(network: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether the network's device has arithmetic for bf16, and the network runs in it.

    Some operators, such as `nn.Bilinear`, take no mixture of bf16 and fp32.

    Args:
        network: left as it was.
        inputs: batch in dimension 0; a few samples are tried.
    """
    device = next(network.parameters(), inputs[0]).device
    if not bf16_pays(device):
        return False
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            network(*(x[:_FEW].to(device) for x in inputs))
    except RuntimeError:
        return False
    finally:
        for module in training:
            module.training = True
    return True
