"""A workload's samples and layers in the order and the form that the search likes best."""

from __future__ import annotations

from dataclasses import replace

import torch

from autocompress.graph.transposed import with_linear_layers
from autocompress.graph.unpacked import with_unpacked
from autocompress.recover.layout import channels_last, takes_channels_last
from autocompress.workload import Split, Workload, find_padding


def arranged(workload: Workload) -> Workload:
    """The workload with its calibration samples in a fixed random order, images channels last.

    Several steps read the first few samples only, and many data sets are sorted by class. The
    layout of the samples is that of everything that convolutions make of them, and networks of
    depthwise convolutions run half as long in it. Samples to train on are many, and stay as they
    are. Linear layers under another name become plain ones, and modules that pack several weights
    come apart. What is padding is found out.
    """
    split = workload.calibration
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    calibration, search = split.subset(order), workload.search_split
    if takes_channels_last(workload.network, calibration.inputs):
        calibration, search = (_channels_last(s) for s in (calibration, search))
    network = with_linear_layers(workload.network, workload.example_inputs)
    network = with_unpacked(network, workload.example_inputs)
    padding = find_padding(network, calibration.inputs, workload.dynamic_axes)
    return replace(
        workload, network=network, calibration=calibration, search_split=search, padding=padding
    )


def _channels_last(split: Split) -> Split:
    return replace(split, inputs=channels_last(split.inputs))
