"""Everything costly, solved once per layer: calibration statistics and solved variants."""

from autocompress.bank.bank import Bank
from autocompress.bank.stitch import Stitched, apply_stage, stitch

__all__ = ["Bank", "Stitched", "apply_stage", "stitch"]
