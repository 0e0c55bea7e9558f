"""The settings of each runtime, as they stand in a device profile under `runtimes`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from autocompress.config import Strict


class _Common(Strict):
    """What every runtime's settings have.

    Attributes:
        distributions: the packages that may bring the runtime.
        extra: the extra of autocompress that installs it; empty where autocompress needs it anyway.
        label: what the runtime is called in `front.csv`, if not by its settings.
        optional: leave it out, with a note, where the device cannot run it; else that is an error.
    """

    distributions: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]

    name: str
    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+$", max_length=24)
    optional: bool = False

    @property
    def full_name(self) -> str:
        """What the runtime with these settings is called in tables and files."""
        return self.label or "-".join([self.name, *self._suffixes()])

    def _suffixes(self) -> tuple[str, ...]:
        """What tells these settings from the runtime's defaults."""
        return ()


class OnnxRuntimeCpuSettings(_Common):
    """ONNX Runtime's CPU provider."""

    distributions: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnxruntime-gpu")
    extra: ClassVar[str] = ""

    name: Literal["onnxruntime"]
    graph_optimization: Literal["all", "extended", "basic", "none"] = "all"

    def _suffixes(self) -> tuple[str, ...]:
        return () if self.graph_optimization == "all" else (self.graph_optimization,)


class OnnxRuntimeCudaSettings(_Common):
    """ONNX Runtime's CUDA provider."""

    distributions: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu",)
    extra: ClassVar[str] = "cuda"

    name: Literal["onnxruntime_cuda"]
    tf32: bool = True
    cuda_graphs: bool = False

    def _suffixes(self) -> tuple[str, ...]:
        return (*(() if self.tf32 else ("fp32",)), *(("graphs",) if self.cuda_graphs else ()))


class TensorRtSettings(_Common):
    """TensorRT through ONNX Runtime's provider; engines are kept in a cache."""

    distributions: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu",)
    extra: ClassVar[str] = "tensorrt"

    name: Literal["tensorrt"]
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    cuda_graphs: bool = False

    def _suffixes(self) -> tuple[str, ...]:
        return (self.precision, *(("graphs",) if self.cuda_graphs else ()))


class OpenVinoSettings(_Common):
    """OpenVINO's CPU plugin; `precision` is its inference precision hint."""

    distributions: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "openvino"

    name: Literal["openvino"]
    precision: Literal["f32", "bf16", "f16"] = "f32"

    def _suffixes(self) -> tuple[str, ...]:
        return (self.precision,)


class PyTorchSettings(_Common):
    """PyTorch, which runs the ONNX file's graph operator by operator or as one CUDA graph."""

    distributions: ClassVar[tuple[str, ...]] = ("torch",)
    extra: ClassVar[str] = ""

    name: Literal["pytorch"]
    device: Literal["cuda", "cpu"] = "cuda"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    cuda_graphs: bool = False

    def _suffixes(self) -> tuple[str, ...]:
        return (self.precision, *(("graphs",) if self.cuda_graphs else ()))


RuntimeSettings = Annotated[
    OnnxRuntimeCpuSettings
    | OnnxRuntimeCudaSettings
    | TensorRtSettings
    | OpenVinoSettings
    | PyTorchSettings,
    Field(discriminator="name"),
]
