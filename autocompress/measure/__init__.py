"""Latency, outputs and memory of ONNX files, taken in worker processes without PyTorch."""
