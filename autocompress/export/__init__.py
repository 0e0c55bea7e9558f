"""From a stitched network to the ONNX file that ships."""

from autocompress.export.exporter import Exporter, FloatModel
from autocompress.export.qdq import QuantizedModel, quantize
from autocompress.export.stock import stock_int8

__all__ = ["Exporter", "FloatModel", "QuantizedModel", "quantize", "stock_int8"]
