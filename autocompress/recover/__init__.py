"""Repair and recovery of a stitched network."""

from autocompress.recover.normalization import repair_batch_norm

__all__ = ["repair_batch_norm"]
