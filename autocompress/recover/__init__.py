"""What is done to a compressed network so that it computes well again."""

from autocompress.recover.normalization import BatchNormRepair
from autocompress.recover.trainer import Trainer, Watch, recovery_of

__all__ = ["BatchNormRepair", "Trainer", "Watch", "recovery_of"]
