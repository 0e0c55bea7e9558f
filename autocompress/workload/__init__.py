"""What the user brings: a trained network, its data in four disjoint splits, and a metric."""

from autocompress.workload.checking import check_workload
from autocompress.workload.inputs import Axes, axis_sizes
from autocompress.workload.loading import load_workload
from autocompress.workload.network import other_sizes
from autocompress.workload.pretrained import load_network
from autocompress.workload.scoring import (
    chance_level,
    network_outputs,
    score,
    score_standard_error,
)
from autocompress.workload.types import Array, Metric, Split, Workload

__all__ = [
    "Array",
    "Axes",
    "Metric",
    "Split",
    "Workload",
    "axis_sizes",
    "chance_level",
    "check_workload",
    "load_network",
    "load_workload",
    "network_outputs",
    "other_sizes",
    "score",
    "score_standard_error",
]
