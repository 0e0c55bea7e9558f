"""Whether bf16 autocast pays on a device: by what the device can do, never by the clock."""

from __future__ import annotations

import torch

from autocompress.device import cpu_facts

# Instructions that multiply bf16 (x86: AVX-512 BF16 and AMX; Arm: BF16). Without them oneDNN
# converts to fp32 and back, which is slower than fp32 alone.
_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def bf16_pays(device: torch.device) -> bool:
    """Whether a device has arithmetic for bf16.

    A rule and no measurement, because a noisy clock would make the result of one seed differ from
    call to call. Machines of different kinds may still decide differently.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not _CPU_FLAGS.isdisjoint(cpu_facts()[1])
