"""Everything costly, solved once per layer: calibration statistics and solved variants."""

from autocompress.bank.bank import Bank
from autocompress.bank.stitch import stitch

__all__ = ["Bank", "stitch"]
