"""Exported files run at other lengths and batch sizes than those of the example inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from candidates import Candidates, run
from torch import Tensor, nn

from autocompress.errors import ExportError
from autocompress.export.torch_export import export_graph
from autocompress.measure.any_file import random_inputs
from autocompress.onnx_sizes import noted_sizes
from autocompress.plan import Plan, Step
from autocompress.techniques import NETWORK
from autocompress.techniques.filter_prune import FilterPrune
from autocompress.techniques.low_rank import LowRank
from autocompress.techniques.precision import Precision
from autocompress.techniques.stock import StockQuantizer
from autocompress.workload import Split, Workload, check_workload, score

transformers = pytest.importorskip("transformers", reason="needs autocompress[transformers]")

LENGTH, LONGEST, WORDS = 16, 40, 100
SIZES = ((1, LENGTH), (3, 5), (2, 33), (5, LONGEST))


def texts(count: int, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Tokens and a mask, in another order than the network has them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, length, dtype=torch.long)
    mask[::3, 2 * length // 3 :] = 0
    tokens = torch.randint(0, WORDS, (count, length), generator=generator)
    return {"attention_mask": mask, "input_ids": tokens}


def make_workload() -> Workload:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=LONGEST, num_labels=3,
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    axes = {name: {1: "length"} for name in texts(1)}
    parts = [Split(texts(32, seed=seed)) for seed in range(3)]
    return Workload(
        network, texts(1), parts[0], None, parts[1], parts[2], "agreement", dynamic_axes=axes
    )


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    return Candidates(make_workload(), tmp_path_factory.mktemp("open"))


def plans(candidates: Candidates) -> dict[str, tuple[Plan, float]]:
    """With the difference that its integers may make, as a share of the largest output."""
    int8 = {"weight_bits": 8, "activation_bits": 8}
    return {
        "float": (Plan(), 1e-4),
        "pruned": (candidates.groups(FilterPrune(pruning_ratio=0.5)), 1e-4),
        "low rank": (candidates.layers(LowRank(kind="svd", rank_ratio=0.5)), 1e-4),
        "dynamic": (candidates.layers(Precision(**int8, activation_range="dynamic")), 0.1),
        "static": (candidates.layers(Precision(**int8)), 0.3),
        "stock dynamic": (Plan((Step(NETWORK, StockQuantizer(mode="dynamic")),)), 0.2),
    }


@pytest.mark.parametrize(
    "name", ["float", "pruned", "low rank", "dynamic", "static", "stock dynamic"]
)
def test_files_run_at_every_length_and_batch_size(candidates, name):
    plan, tolerance = plans(candidates)[name]
    network, session = candidates.network(plan), candidates.session(name, plan)
    found = [(entry.name, entry.shape) for entry in session.get_inputs()]
    assert found == [
        ("attention_mask", ["batch", "length"]),
        ("input_ids", ["batch", "length"]),
    ]
    for count, length in SIZES:
        inputs = tuple(texts(count, length, seed=9).values())
        with torch.no_grad():
            wanted = network(*inputs).numpy()
        (output,) = run(session, inputs)
        assert output.shape == wanted.shape == (count, 3)
        assert np.abs(output - wanted).max() <= tolerance * np.abs(wanted).max()


def test_the_skeleton_serves_open_axes(candidates):
    for plan, _ in plans(candidates).values():
        artifact = candidates.builder.build("again", plan)
        assert artifact.details["exported_afresh"] is False


def test_the_workload_is_sound_and_scored_by_name(candidates):
    workload = candidates.workload
    assert check_workload(workload) == ()
    session = candidates.session("original", Plan())
    outputs = run(session, workload.search_split.inputs)
    assert score("agreement", outputs, None, outputs) == 1.0


def test_files_note_the_sizes_that_figures_are_taken_at(candidates):
    model = onnx.load(candidates.builder.build("noted", Plan()).path)
    assert noted_sizes(model) == {"length": LENGTH}
    assert [x.shape for x in random_inputs(model, 2, {}, 0)] == [(2, LENGTH)] * 2
    assert [x.shape for x in random_inputs(model, 2, {"length": 9}, 0)] == [(2, 9)] * 2


def test_a_program_with_an_open_length_is_compressed_and_stays_open(tmp_path):
    original = make_workload()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=LONGEST)
    shapes = {name: {0: batch, 1: length} for name in texts(1)}
    program = torch.export.export(original.network.network, (), texts(2), dynamic_shapes={**shapes})
    candidates = Candidates(replace(original, network=program), tmp_path)
    assert "bert.encoder.layer.0.intermediate.dense" in {
        group.name for group in candidates.graph.groups if group.prunable
    }
    plan = Plan(
        (
            *candidates.groups(FilterPrune(pruning_ratio=0.25)).steps,
            *candidates.layers(Precision(weight_bits=8, activation_bits=32)).steps,
        )
    )
    network = candidates.network(plan)
    session = candidates.session("program", plan)
    for count, size in SIZES:
        inputs = tuple(texts(count, size, seed=9).values())
        with torch.no_grad():
            wanted = network(*inputs).numpy()
        np.testing.assert_allclose(run(session, inputs)[0], wanted, rtol=1e-3, atol=1e-3)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, : 2 if int(x.shape[1]) == 6 else 3]


def test_an_axis_that_the_exporter_finds_fixed_is_an_error():
    with pytest.raises(ExportError, match="dynamic_axes"):
        export_graph(Fixed().eval(), (torch.zeros(2, 6, 4),), ({1: "length"},))
