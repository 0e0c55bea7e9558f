"""The latency table: blocks of ONNX files timed one by one, and whole files predicted from them."""
