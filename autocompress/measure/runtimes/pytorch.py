"""PyTorch, on an NVIDIA GPU or on the CPU, for the graph of an ONNX file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, final

import numpy as np

from autocompress.device import PyTorchSettings, RuntimeSettings
from autocompress.device.facts import how_to_install
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure.runtimes.by_shape import ByShape, Compiled
from autocompress.measure.runtimes.onnx_files import trivial_model
from autocompress.measure.session import Array, NodeTime, Placement, Runtime, Session

if TYPE_CHECKING:
    from torch import Tensor

    from autocompress.measure.runtimes.torch_graph import Graph, Program, Target

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_WARM_UPS = 3


@final
class PyTorch(Runtime):
    """PyTorch's own operators, one after the other or as one CUDA graph.

    Quantized files run in floating point: their values are rounded as the file says, but no
    integer kernel is used (on GPUs, those for such files are TensorRT's). `fp32` is float32
    throughout, without TensorFloat-32. In `fp16` and `bf16` all floating-point inputs, weights
    and results are of that type; outputs come back as float32.
    """

    @property
    def name(self) -> str:
        """`pytorch`."""
        return "pytorch"

    def check_available(self, settings: RuntimeSettings) -> None:
        """Check that PyTorch is installed, and that it has a GPU if one is asked for."""
        assert isinstance(settings, PyTorchSettings)
        torch = _import_torch(settings)
        if settings.device == "cpu":
            if settings.cuda_graphs:
                raise DeviceError(
                    "CUDA graphs need a GPU.",
                    given="cuda_graphs with device cpu",
                    advice="set `device: cuda`, or leave `cuda_graphs` out of the device profile",
                )
            return
        if not torch.cuda.is_available():
            raise DeviceError(
                "PyTorch finds no GPU that it can use.",
                given=f"device cuda, PyTorch {torch.__version__}",
                allowed="an NVIDIA GPU with its driver, and PyTorch built for CUDA",
                advice="install a PyTorch built for the driver's CUDA, or set `device: cpu`",
            )
        if settings.precision == "bf16" and not torch.cuda.is_bf16_supported(False):
            raise DeviceError(
                "The GPU has no bfloat16 arithmetic.",
                given="precision bf16",
                allowed="fp32, fp16",
                advice="correct `precision` in the device profile",
            )

    def load(self, path: Path, settings: RuntimeSettings, placement: Placement) -> Session:
        """Read a file's graph; it is compiled once shapes are known.

        Raises:
            MeasurementError: an operator that is not covered; the error names it.
        """
        self.check_available(settings)
        target = _prepare(settings, placement)
        from autocompress.measure.runtimes.torch_graph import read_graph

        graph = read_graph(path, target)
        assert isinstance(settings, PyTorchSettings)
        graphs = settings.cuda_graphs

        def compile_for(inputs: Sequence[Array]) -> Compiled:
            return _CudaGraph(graph, inputs).run if graphs else _Eager(graph, inputs).run

        return ByShape(graph.input_names, compile_for)

    def start(self, settings: RuntimeSettings, placement: Placement) -> None:
        """Import the library, and make it load its kernels by running a trivial model."""
        import onnx

        _import_torch(settings)
        with TemporaryDirectory(prefix="autocompress-pytorch-") as folder:
            path = Path(folder) / "trivial.onnx"
            onnx.save(trivial_model(), path)
            self.load(path, settings, placement).run([np.zeros((1, 4, 4, 4), np.float32)])

    def profile(
        self,
        path: Path,
        settings: RuntimeSettings,
        placement: Placement,
        inputs: Sequence[Array],
        runs: int,
    ) -> tuple[NodeTime, ...]:
        """The time from each node's launch to the next one's; see `torch_graph.clock`.

        Raises:
            MeasurementError: with CUDA graphs, which have no nodes.
        """
        self.check_available(settings)
        assert isinstance(settings, PyTorchSettings)
        if settings.cuda_graphs:
            raise MeasurementError(
                "A CUDA graph runs as a whole: there are no times of its nodes.",
                given=settings.full_name,
                advice="profile the same precision without `cuda_graphs`",
            )
        target = _prepare(settings, placement)
        from autocompress.measure.runtimes.torch_graph import read_graph

        return _Eager(read_graph(path, target), inputs).profile(inputs, runs)


@final
class _Eager:
    """A program that is run step by step."""

    def __init__(self, graph: Graph, inputs: Sequence[Array]) -> None:
        import torch

        self._mode = torch.inference_mode
        self._graph = graph
        self._program = _compile(graph, inputs)

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once; the outputs are copies."""
        with self._mode():
            return _to_host(self._program.run(_to_device(self._graph, inputs)))

    def profile(self, inputs: Sequence[Array], runs: int) -> tuple[NodeTime, ...]:
        """Median time of each step."""
        from autocompress.measure.runtimes.torch_graph import clock_of

        clock = clock_of(self._graph.target)
        with self._mode():
            tensors = _to_device(self._graph, inputs)
            for _ in range(_WARM_UPS):
                self._program.run(tensors)
            times = [self._program.profile(tensors, clock) for _ in range(runs)]
        return tuple(
            NodeTime(
                name=step.node.name,
                operator=step.node.key[1],
                kernel="",
                milliseconds=statistics.median(column),
                inputs=step.description[0],
                outputs=step.description[1],
                origins=(step.node.name,),
            )
            for step, column in zip(self._program.steps, zip(*times, strict=True), strict=True)
        )


@final
class _CudaGraph:
    """A program captured as one CUDA graph, with inputs and outputs at fixed places."""

    def __init__(self, graph: Graph, inputs: Sequence[Array]) -> None:
        import torch

        program = _compile(graph, inputs)
        with torch.inference_mode():
            self._inputs = _to_device(graph, inputs)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            # Libraries choose kernels and set up their handles, which cannot be captured.
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    program.run(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._captured):
                self._outputs = program.run(self._inputs)
        self._from_numpy = torch.from_numpy
        self._mode = torch.inference_mode
        # Holds the constants, whose addresses the captured graph reads.
        self._program = program

    def run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once; the outputs are copies."""
        with self._mode():
            for place, array in zip(self._inputs, inputs, strict=True):
                place.copy_(self._from_numpy(np.ascontiguousarray(array)))
            self._captured.replay()
            return _to_host(self._outputs)


def _compile(graph: Graph, inputs: Sequence[Array]) -> Program:
    import torch

    from autocompress.measure.runtimes.torch_graph import compile_program

    with torch.inference_mode():
        return compile_program(graph, _to_device(graph, inputs))


def _to_device(graph: Graph, inputs: Sequence[Array]) -> list[Tensor]:
    import torch

    target = graph.target
    tensors = []
    for name, array in zip(graph.input_names, inputs, strict=True):
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(target.device)
        tensors.append(tensor.to(target.dtype) if name in graph.float_inputs else tensor)
    return tensors


def _to_host(outputs: Sequence[Tensor]) -> tuple[Array, ...]:
    """Copies in host memory, finished; floating-point numbers as float32."""
    import torch

    arrays = []
    for output in outputs:
        half = output.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else output.dtype
        # An output may be a view of an input, of a constant or of a captured graph's memory.
        copy = output.to("cpu", dtype, copy=True)
        arrays.append(copy.contiguous().numpy())
    return tuple(arrays)


def _prepare(settings: RuntimeSettings, placement: Placement) -> Target:
    """Set what PyTorch keeps for the whole process, and say where and in which type it runs."""
    assert isinstance(settings, PyTorchSettings)
    torch = _import_torch(settings)
    from autocompress.measure.runtimes.torch_graph import Target

    torch.set_num_threads(placement.threads)
    # PyTorch's default is TensorFloat-32 for convolutions and float32 for matrix products.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Shapes are fixed, so that cuDNN may try its algorithms out once.
    torch.backends.cudnn.benchmark = True
    if settings.device == "cuda":
        if placement.gpu >= torch.cuda.device_count():
            raise DeviceError(
                "There is no GPU of the device profile's index.",
                given=f"gpu {placement.gpu}",
                allowed=f"0 to {torch.cuda.device_count() - 1}",
                advice="correct `gpu` in the device profile",
            )
        torch.cuda.set_device(placement.gpu)
    place = f"cuda:{placement.gpu}" if settings.device == "cuda" else "cpu"
    return Target(torch.device(place), getattr(torch, _DTYPES[settings.precision]))


def _import_torch(settings: RuntimeSettings) -> Any:
    try:
        import torch
    except ImportError as cause:
        raise DeviceError(
            "The runtime of the device profile cannot be imported.",
            given=f"{settings.name}: {cause}",
            advice=how_to_install(settings),
        ) from cause
    return torch
