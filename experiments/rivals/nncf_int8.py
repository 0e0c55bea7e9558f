"""What NNCF's post-training int8 gives for an experiment's network, in every runtime of its device.

Needs `pip install nncf`. The file is quantized with NNCF's defaults for its kind of network and
then measured like any candidate, on the test split:

    python experiments/rivals/nncf_int8.py experiments/minilm_sentiment.yaml --transformer
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx

from autocompress.bank import Bank
from autocompress.build import Artifact
from autocompress.errors import AutocompressError
from autocompress.evaluate import Evaluator, Extras
from autocompress.plan import Plan
from autocompress.search.prepare import Options, Prepared, builder_of, prepare
from autocompress.search.progress import Silent
from autocompress.workload import Workload

NAME = "nncf_int8"
# What NNCF itself takes by default.
SAMPLES = 300


def quantize(workload: Workload, original: Path, target: Path, *, transformer: bool) -> None:
    """Write NNCF's int8 file of an ONNX file."""
    # Here: it is no dependency, and only this needs it.
    import nncf

    model = onnx.load(original)
    names = [entry.name for entry in model.graph.input]
    inputs = [x.numpy() for x in workload.calibration.inputs]
    count = min(SAMPLES, len(inputs[0]))
    samples = [
        {name: x[i : i + 1] for name, x in zip(names, inputs, strict=True)} for i in range(count)
    ]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=count,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        target_device=nncf.TargetDevice.CPU,
    )
    onnx.save(quantized, target)


def measure(prepared: Prepared, folder: Path, *, transformer: bool) -> None:
    """Print a line for each runtime, with the original's beside."""
    bank = Bank(prepared.workload.network, prepared.graph, 1, prepared.folder.bank)
    builder = builder_of(prepared, bank)
    extras = Extras(coded=False, energy=False)
    with Evaluator(prepared.workload, builder, prepared.device, folder, extras) as evaluator:
        files = {"original": evaluator.build_original(), NAME: Artifact(builder.path(NAME), {}, {})}
        quantize(
            prepared.workload, files["original"].path, files[NAME].path, transformer=transformer
        )
        print(f"{'file':<10} {'runtime':<14} {'metric':>8}  speed-up")
        for name, artifact in files.items():
            for runtime in prepared.profile.runtime_names:
                try:
                    found = evaluator.measure(artifact, Plan(), runtime, "test", final=True)
                except AutocompressError as reason:
                    print(f"{name:<10} {runtime:<14} {str(reason).splitlines()[0]}")
                    continue
                low, high = found.speedup.ci_low, found.speedup.ci_high
                print(
                    f"{name:<10} {runtime:<14} {100 * found.metric.value:7.2f}%  "
                    f"{found.speedup.value:.2f}x [{low:.2f}, {high:.2f}]",
                    flush=True,
                )


def main() -> None:
    """Quantize and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/nncf"))
    parser.add_argument("--transformer", action="store_true", help="NNCF's scheme for transformers")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(arguments.experiment, Options(run=folder), Silent())
    measure(prepared, folder, transformer=arguments.transformer)


if __name__ == "__main__":
    main()
