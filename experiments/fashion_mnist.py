"""Fashion-MNIST (28 x 28) and a residual network of three stages."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
from residual import Architecture, Training, cache_folder, trained_network

from autocompress.errors import WorkloadError
from autocompress.workload import Split, Workload

SHAPE = Architecture(channels=1, classes=10, widths=(32, 64, 128), blocks=2)
# Two threads, because a first use should not take longer than need be on an idle machine.
TRAINING = Training(
    epochs=5,
    batch_size=128,
    peak_learning_rate=0.2,
    augment="shift_flip",
    shift=2,
    threads=2,
)
TRAIN, CALIBRATION, SEARCH = 50_000, 2_000, 1_500
MEAN, DEVIATION = 0.286, 0.353

# SHA-256 of the idx bytes, decompressed: distributions compress them anew.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
HOSTS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TIMEOUT_S = 30


def read_idx(content: bytes) -> np.ndarray:
    """The array in an idx file of unsigned bytes, as in the MNIST family.

    Raises:
        ValueError: another type of number, or a length that the header does not announce.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError("no idx file of unsigned bytes")
    header = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if len(content) != header + int(np.prod(shape)):
        raise ValueError(f"{len(content) - header} bytes for an array of shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def find_content(name: str) -> bytes:
    """The verified idx bytes of one of `FILES`: from disk, else downloaded into the cache.

    Raises:
        WorkloadError: the file is nowhere and cannot be downloaded, or has other contents.
    """
    folders = _folders()
    for path in (folder / f"{name}{end}" for folder in folders for end in ("", ".gz")):
        if path.is_file():
            return _verified(name, path.read_bytes(), str(path))
    complaints = []
    for host in HOSTS:
        try:
            with urllib.request.urlopen(f"{host}/{name}.gz", timeout=TIMEOUT_S) as answer:
                packed = answer.read()
        except OSError as cause:
            complaints.append(f"{host}: {cause}")
            continue
        content = _verified(name, packed, host)
        _keep(folders[-1] / f"{name}.gz", packed)
        return content
    raise WorkloadError(
        f"Fashion-MNIST's file {name} was not found, and could not be downloaded.",
        given="; ".join(complaints),
        allowed="the file, or the same with .gz, in one of " + ", ".join(map(str, folders)),
        advice=(
            "apt-get install dataset-fashion-mnist, or set AUTOCOMPRESS_DATA to a folder "
            "that holds the four idx files"
        ),
    )


def splits() -> tuple[Split, Split, Split, Split]:
    """Train, calibration, search (all from the train file) and test; always the same samples."""
    arrays = {name: read_idx(find_content(name)) for name in FILES}
    whole = _split(arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"])
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    train, calibration, search, _ = order.split(
        [TRAIN, CALIBRATION, SEARCH, len(whole) - TRAIN - CALIBRATION - SEARCH]
    )
    test = _split(arrays["t10k-images-idx3-ubyte"], arrays["t10k-labels-idx1-ubyte"])
    return whole.subset(train), whole.subset(calibration), whole.subset(search), test


def workload() -> Workload:
    """The workload; trains the network on first use (see `residual.trained_network`)."""
    train, calibration, search, test = splits()
    return Workload(
        network=trained_network("fashion_mnist", SHAPE, train, TRAINING),
        example_inputs=search.subset(1).inputs,
        calibration=calibration,
        train=train,
        search_split=search,
        test_split=test,
        metric="accuracy",
    )


def _folders() -> list[Path]:
    given = os.environ.get("AUTOCOMPRESS_DATA")
    own = [Path(given), Path(given) / "fashion-mnist"] if given else []
    return [*own, DEBIAN_FOLDER, cache_folder() / "fashion-mnist"]


def _verified(name: str, content: bytes, source: str) -> bytes:
    try:
        unpacked = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError) as cause:
        raise WorkloadError("A file is not valid gzip.", given=f"{name} from {source}") from cause
    found = hashlib.sha256(unpacked).hexdigest()
    if found != FILES[name]:
        raise WorkloadError(
            f"Fashion-MNIST's file {name} has other contents than it should have.",
            given=f"SHA-256 {found} from {source}",
            allowed=f"SHA-256 {FILES[name]} (decompressed)",
            advice="remove the file; another copy is then looked for or downloaded",
        )
    return unpacked


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    inputs = torch.from_numpy(images.astype(np.float32))[:, None] / 255
    return Split(((inputs - MEAN) / DEVIATION,), torch.from_numpy(labels.astype(np.int64)))
