"""What the user brings: a trained network, its data in four disjoint splits, and a metric."""

from autocompress.workload.checking import check_workload
from autocompress.workload.loading import load_workload
from autocompress.workload.scoring import network_outputs, score, score_standard_error
from autocompress.workload.types import Array, Metric, Split, Workload

__all__ = [
    "Array",
    "Metric",
    "Split",
    "Workload",
    "check_workload",
    "load_workload",
    "network_outputs",
    "score",
    "score_standard_error",
]
