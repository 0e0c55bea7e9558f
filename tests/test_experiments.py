from __future__ import annotations

import gzip
import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.config import load_experiment
from autocompress.errors import WorkloadError
from autocompress.workload import Split, check_workload, load_workload, network_outputs, score

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture
def import_experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "autocompress"


def write_idx(path: Path, array: np.ndarray) -> bytes:
    content = b"\x00\x00\x08" + bytes([array.ndim])
    content += b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return content


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda p: p.stem)
def test_experiment_files_are_valid_and_name_existing_workloads(path):
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert (EXPERIMENTS / experiment.workload.split(":")[0]).is_file()


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.glob("*/*.py")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_scripts_find_what_they_import(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    # Not as `__main__`: nothing is run.
    runpy.run_path(str(path), run_name="imported")


# --- digits


def test_digits_is_a_sound_workload_of_disjoint_splits():
    workload = load_workload("digits.py:workload", EXPERIMENTS / "digits.yaml")
    assert check_workload(workload) == ()
    sizes = {name: len(split) for name, split in workload.splits().items()}
    assert sizes == {"calibration": 200, "train": 897, "search_split": 350, "test_split": 350}
    rows = [row.numpy().tobytes() for s in workload.splits().values() for row in s.inputs[0]]
    assert len(set(rows)) == len(rows) == 1797
    for split in workload.splits().values():
        counts = split.targets.bincount().float()
        assert counts.max() / counts.min() < 1.25
    test = workload.test_split
    outputs = network_outputs(workload.network, test.inputs)
    assert score("accuracy", outputs, test.targets) >= 0.98


# --- training


def tiny(residual, **changes):
    shape = residual.Architecture(channels=1, classes=2, widths=(4, 8), blocks=1)
    settings = {"epochs": 3, "batch_size": 8, "peak_learning_rate": 0.1, "augment": "shift_flip"}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, 6, 6, generator=generator)
    data = Split(images, (images.mean((1, 2, 3)) > 0).long())
    return shape, data, residual.Training(**(settings | {"threads": 1} | changes))


def weights(network) -> list[torch.Tensor]:
    return list(network.state_dict().values())


def test_training_is_deterministic_cached_and_leaves_global_state(
    import_experiment, cache, monkeypatch
):
    residual = import_experiment("residual")
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = residual.trained_network("tiny", *tiny(residual))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads
    assert not first.training
    assert not list(cache.glob("*.checkpoint*"))

    (file,) = cache.glob("tiny-*.safetensors")
    file.unlink()
    again = residual.trained_network("tiny", *tiny(residual))
    assert all(map(torch.equal, weights(first), weights(again)))

    other = residual.trained_network("tiny", *tiny(residual, seed=1))
    assert not torch.equal(first.head.weight, other.head.weight)
    assert len(list(cache.glob("tiny-*.safetensors"))) == 2

    monkeypatch.setattr(residual, "_train", lambda *a: pytest.fail("trained in spite of the cache"))
    cached = residual.trained_network("tiny", *tiny(residual))
    assert all(map(torch.equal, weights(first), weights(cached)))


def test_an_interrupted_training_ends_with_the_same_weights(import_experiment, cache, monkeypatch):
    residual = import_experiment("residual")
    whole = residual.trained_network("tiny", *tiny(residual))
    for file in cache.glob("tiny-*.safetensors"):
        file.unlink()

    real, calls = residual._loss, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(residual, "_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        residual.trained_network("tiny", *tiny(residual))
    assert len(list(cache.glob("tiny-*.checkpoint"))) == 1
    resumed = residual.trained_network("tiny", *tiny(residual))
    assert len(calls) == 6 + 2 * 4
    assert all(map(torch.equal, weights(whole), weights(resumed)))


@pytest.mark.faults
def test_a_killed_training_ends_with_the_same_weights(import_experiment, cache, tmp_path):
    residual = import_experiment("residual")
    shape, data, training = tiny(residual, epochs=200)
    whole = residual.trained_network("tiny", shape, data, training)
    for file in cache.glob("tiny-*.safetensors"):
        file.unlink()
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import residual, test_experiments\n"
        "residual.trained_network('tiny', *test_experiments.tiny(residual, epochs=200))\n"
    )
    command = [sys.executable, "-c", code, str(EXPERIMENTS), str(ROOT), str(ROOT / "tests")]
    process = subprocess.Popen(command, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    while not list(cache.glob("*.checkpoint")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("*.safetensors"))
    resumed = residual.trained_network("tiny", shape, data, training)
    assert all(map(torch.equal, weights(whole), weights(resumed)))


# --- Fashion-MNIST's files


def test_idx_files_are_read(import_experiment, tmp_path):
    read_idx = import_experiment("fashion_mnist").read_idx
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(read_idx(write_idx(tmp_path / "a", images)), images)
    labels = np.array([3, 1], np.uint8)
    np.testing.assert_array_equal(read_idx(write_idx(tmp_path / "b", labels)), labels)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no idx file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00", "no idx file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", r"3 bytes .* \(5,\)"),
    ],
)
def test_malformed_idx_files_are_refused(import_experiment, content, words):
    with pytest.raises(ValueError, match=words):
        import_experiment("fashion_mnist").read_idx(content)


@pytest.fixture
def fashion(import_experiment, cache, monkeypatch, tmp_path):
    """The module, with one tiny known file and neither Debian's folder nor a network."""
    module = import_experiment("fashion_mnist")

    def offline(*arguments, **options):
        raise OSError("offline")

    digest = "1f9d7a7ae7d6e5f8"
    monkeypatch.setattr(module, "FILES", {"tiny-idx": digest})
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("AUTOCOMPRESS_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "fashion-mnist").mkdir(parents=True)
    return module


def know(module, monkeypatch, content: bytes) -> None:
    digest = module.hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(module, "FILES", {"tiny-idx": digest})


def test_missing_data_says_how_to_get_it(fashion):
    with pytest.raises(WorkloadError) as caught:
        fashion.find_content("tiny-idx")
    text = str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in text
    assert "AUTOCOMPRESS_DATA" in text
    assert "offline" in text


@pytest.mark.parametrize(
    "place", ["data", "data/fashion-mnist", "debian", "autocompress/fashion-mnist"]
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_data_is_found_packed_or_not(fashion, monkeypatch, tmp_path, place, end):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    content = write_idx(tmp_path / place / f"tiny-idx{end}", np.arange(5, dtype=np.uint8))
    know(fashion, monkeypatch, content)
    assert fashion.find_content("tiny-idx") == content


def test_other_contents_are_refused(fashion, tmp_path):
    write_idx(tmp_path / "data" / "tiny-idx", np.arange(5, dtype=np.uint8))
    with pytest.raises(WorkloadError, match=r"other contents(.|\n)*data/tiny-idx"):
        fashion.find_content("tiny-idx")


def test_a_download_is_verified_and_kept(fashion, monkeypatch, tmp_path):
    content = write_idx(tmp_path / "made.gz", np.arange(5, dtype=np.uint8))
    packed = (tmp_path / "made.gz").read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(packed))
    with pytest.raises(WorkloadError, match="other contents"):
        fashion.find_content("tiny-idx")
    know(fashion, monkeypatch, content)
    assert fashion.find_content("tiny-idx") == content
    assert (tmp_path / "autocompress/fashion-mnist/tiny-idx.gz").read_bytes() == packed
