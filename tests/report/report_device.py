"""The device of the report tests."""

from __future__ import annotations

from autocompress.device import Fingerprint, RuntimeFacts

DEVICE = Fingerprint(
    profile="cpu",
    kind="cpu",
    cpu_model="Test CPU",
    instruction_sets=("avx2",),
    accelerator="",
    threads=1,
    batch_size=1,
    runtimes=(
        RuntimeFacts(
            name="onnxruntime",
            version="1.32.0",
            settings={"name": "onnxruntime", "graph_optimization": "all"},
        ),
    ),
)
