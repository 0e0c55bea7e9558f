"""What is done to a compressed network so that it computes well again."""

from autocompress.recover.checkpoint import restore, tensors_of
from autocompress.recover.codebook_tuning import tune_codebooks
from autocompress.recover.gradual import gradual
from autocompress.recover.normalization import BatchNormRepair
from autocompress.recover.qat import train_quantized
from autocompress.recover.recovery import RecoveryContext, recover_network, training_identity

__all__ = [
    "BatchNormRepair",
    "RecoveryContext",
    "gradual",
    "recover_network",
    "restore",
    "tensors_of",
    "train_quantized",
    "training_identity",
    "tune_codebooks",
]
