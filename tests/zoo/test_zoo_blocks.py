"""Which blocks of known architectures can be taken out, and that they are."""

from __future__ import annotations

from pathlib import Path

import hub_networks
import pytest
import torch
from networks import make_device
from passing import SAMPLES, make_member, workload_of

from autocompress.bank import Bank
from autocompress.build import Builder, Stopwatch
from autocompress.config import CalibrationSettings
from autocompress.export.exporter import Exporter
from autocompress.graph import NetworkGraph, trace
from autocompress.plan import Plan, Step
from autocompress.search.arrange import arranged
from autocompress.techniques.block_drop import BlockDrop
from autocompress.techniques.precision import Precision

ENCODER, DECODER = "model.bert.encoder.layer", "model.transformer.h"
STAGES = "model.resnet.encoder.stages"
BLOCKS = {
    "BERT": (f"{ENCODER}.0", f"{ENCODER}.1"),
    "GPT-2": (f"{DECODER}.0", f"{DECODER}.1"),
    # Those without a stride.
    "ResNet": (f"{STAGES}.0.layers.0", f"{STAGES}.1.layers.1"),
    # One layer, called again and again.
    "ALBERT": (),
    "densenet": (),
    "unet": (),
    "squeeze_excite": ("2", "3"),
}


def graph_of_member(name: str) -> NetworkGraph:
    if name in hub_networks.NETWORKS:
        pytest.importorskip("transformers", reason="builds architectures of transformers")
    data = arranged(workload_of(make_member(name)))
    return trace(data.network, data.example_inputs)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_whole_layers_without_a_stride(name: str) -> None:
    graph = graph_of_member(name)
    assert tuple(block.name for block in graph.blocks) == BLOCKS[name]
    for block in graph.blocks:
        inside = {x.name for x in graph.layers if x.name.startswith(f"{block.name}.")}
        assert set(block.layers) == inside and len(inside) >= 2


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_a_transformer_without_a_layer_is_the_configuration_with_one_less(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="builds architectures of transformers")
    data = arranged(workload_of(make_member(name)))
    graph = trace(data.network, data.example_inputs)
    parity = tuple(x[:4] for x in data.calibration.inputs)
    exporter = Exporter(data.network, graph, data.example_inputs, parity)
    settings = CalibrationSettings(statistics_samples=SAMPLES, repair_samples=SAMPLES)
    bank = Bank(data.network, graph, 1, tmp_path / "bank")
    bank.calibrate(data.calibration.inputs, settings)
    builder = Builder(data, exporter, bank, make_device(), settings, tmp_path)
    first, second = graph.blocks
    drop = Step(first.name, BlockDrop(drop=True))
    network = builder.network(Plan((drop,)), Stopwatch()).network
    smaller = bank.copy_network()
    layers = smaller.get_submodule(first.name.rpartition(".")[0])
    del layers[0]
    with torch.no_grad():
        torch.testing.assert_close(network(*parity), smaller(*parity), rtol=0, atol=0)
    int8 = Precision(weight_bits=8, activation_bits=8, activation_range="dynamic")
    rounded = [Step(layer, int8) for layer in second.layers]
    artifact = builder.build("dropped", Plan((drop, *rounded)))
    assert artifact.details["parity"] <= 1e-3 and not artifact.details["exported_afresh"]
    assert len(artifact.details["layers"]) == len(second.layers)
