"""From a stitched network to the ONNX file that ships.

Nothing is imported here: `coding` runs in processes that need no PyTorch.
"""
