"""From a stitched network to the ONNX file that ships."""

from autocompress.export.exporter import Exporter, FloatModel
from autocompress.export.packed import stored_weight_bytes
from autocompress.export.quantize import Label, QuantizedModel, quantize
from autocompress.export.stock import StockOptions, advised_options, stock_quantize

__all__ = [
    "Exporter",
    "FloatModel",
    "Label",
    "QuantizedModel",
    "StockOptions",
    "advised_options",
    "quantize",
    "stock_quantize",
    "stored_weight_bytes",
]
