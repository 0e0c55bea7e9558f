"""Everything costly, solved once per layer: calibration statistics and solved variants."""

from autocompress.bank.bank import Bank
from autocompress.bank.observations import Counter
from autocompress.bank.stitch import Stitched, apply_stage, stitch

__all__ = ["Bank", "Counter", "Stitched", "apply_stage", "stitch"]
