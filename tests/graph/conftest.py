from __future__ import annotations

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parent.parent
# The candidates that folding is tested on are those of the export tests.
sys.path[:0] = [str(TESTS), str(TESTS / "export")]
