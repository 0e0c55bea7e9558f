from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from autocompress.export import function_table
from autocompress.export.torch_export import export_graph


def exported() -> bytes:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    return export_graph(network, (torch.randn(2, 3, 8, 8),)).SerializeToString(deterministic=True)


@pytest.fixture
def forgotten():
    """No table was made before, and what a test leaves is forgotten."""
    kept = (function_table._class_and_maker, function_table._kept_table)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


def test_the_table_is_made_once_and_the_files_are_the_same(forgotten, monkeypatch):
    made, maker = [], vars(ONNXRegistry)["from_torchlib"]

    def counted(cls, **options):
        made.append(options)
        return maker.__func__(cls, **options)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    before = vars(ONNXRegistry)["from_torchlib"]
    first, second = exported(), exported()
    assert len(made) == 1
    assert vars(ONNXRegistry)["from_torchlib"] is before
    assert first == second


@pytest.mark.parametrize(
    ("name", "value"), [("_MODULE", "torch.nowhere"), ("_CLASS", "Absent"), ("_MAKER", "absent")]
)
def test_a_version_without_such_a_table_exports_as_ever(forgotten, monkeypatch, name, value):
    wanted = exported()
    function_table._class_and_maker.cache_clear()
    monkeypatch.setattr(function_table, name, value)
    with function_table.kept_function_table():
        assert function_table._class_and_maker() is None
    assert exported() == wanted


def test_the_class_is_put_back_when_an_export_fails(forgotten):
    before = vars(ONNXRegistry)["from_torchlib"]
    with pytest.raises(ZeroDivisionError), function_table.kept_function_table():
        assert vars(ONNXRegistry)["from_torchlib"] is not before
        raise ZeroDivisionError
    assert vars(ONNXRegistry)["from_torchlib"] is before
