"""Runs the graph of an ONNX file with PyTorch's operators. Only imported where PyTorch runs."""

from __future__ import annotations

from autocompress.measure.runtimes.torch_graph.clock import clock_of
from autocompress.measure.runtimes.torch_graph.graph import Graph, read_graph
from autocompress.measure.runtimes.torch_graph.node import Target
from autocompress.measure.runtimes.torch_graph.program import Program, compile_program

__all__ = ["Graph", "Program", "Target", "clock_of", "compile_program", "read_graph"]
