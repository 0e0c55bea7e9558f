"""A workload that needs no training: how far compressed networks agree with a random one."""

from __future__ import annotations

import torch
from networks import set_statistics
from torch import nn

from autocompress import Split, Workload

# A device whose measurements end at once; its figures are real but wide.
QUICK_PROFILE = {
    "version": 2,
    "name": "quick",
    "kind": "cpu",
    "runtimes": [{"name": "onnxruntime"}],
    "channel_multiple": 8,
    "kernels": {"Conv": [32, 8], "Gemm": [32, 8], "MatMul": [32, 8]},
    "measuring": {
        "target_half_width": 0.3,
        "time_limit_s": 0.5,
        "final_target_half_width": 0.3,
        "final_time_limit_s": 0.5,
        "hang_limit_s": 30.0,
    },
}


def make_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    set_statistics(network, (torch.randn(256, 3, 8, 8, generator=generator),))
    return network


def workload() -> Workload:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 3, 8, 8, generator=generator)
    parts = [Split(inputs[i : i + 64]) for i in range(0, 256, 64)]
    return Workload(
        network=make_network(),
        example_inputs=inputs[:1],
        calibration=parts[0],
        train=parts[1],
        search_split=parts[2],
        test_split=parts[3],
        metric="agreement",
    )


def raises() -> Workload:
    raise ValueError("the moon is in the wrong house")


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [row if row.sum() > 0 else row.relu() for row in self.layer(x)]
        return torch.stack(rows)


def untraceable() -> Workload:
    generator = torch.Generator().manual_seed(1)
    parts = [Split(torch.randn(16, 4, generator=generator)) for _ in range(4)]
    return Workload(
        Untraceable().eval(), parts[0].inputs, parts[0], None, parts[2], parts[3], "agreement"
    )
