"""Repair and recovery of a stitched network."""

from autocompress.recover.normalization import BatchNormRepair

__all__ = ["BatchNormRepair"]
