"""Freed memory stays with the process; seen in a process of its own, as the setting lasts."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
import sys
import torch
from autocompress.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
layers = [torch.nn.Conv2d(8, 8, 1) if i % 2 else torch.nn.ReLU6() for i in range(8)]
network = torch.nn.Sequential(*layers)
x = torch.zeros(32, 8, 256, 256)  # activations of 64 MiB
with torch.no_grad():
    for repetition in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        network(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_a_block_that_was_freed_serves_the_next_request() -> None:
    # Pages that the system hands out in a forward pass like those before.
    faults = {}
    for how in ("keep", "default"):
        run = [sys.executable, "-c", _PROGRAM, how]
        faults[how] = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert faults["keep"] * 4 < faults["default"]
