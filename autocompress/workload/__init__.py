"""What the user brings: a trained network, its data in four disjoint splits, and a metric."""

from autocompress.workload.checking import check_workload
from autocompress.workload.find_padding import find_padding
from autocompress.workload.inputs import Axes, axis_sizes
from autocompress.workload.loading import load_workload
from autocompress.workload.network import other_sizes
from autocompress.workload.padding import NO_PADDING, Padding
from autocompress.workload.pretrained import load_network
from autocompress.workload.scoring import (
    chance_level,
    network_outputs,
    score,
    score_standard_error,
)
from autocompress.workload.types import Array, Metric, Split, Workload

__all__ = [
    "NO_PADDING",
    "Array",
    "Axes",
    "Metric",
    "Padding",
    "Split",
    "Workload",
    "axis_sizes",
    "chance_level",
    "check_workload",
    "find_padding",
    "load_network",
    "load_workload",
    "network_outputs",
    "other_sizes",
    "score",
    "score_standard_error",
]
