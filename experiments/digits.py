"""scikit-learn's handwritten digits (8 x 8) and a small residual network: the embedded example."""

from __future__ import annotations

import torch
from residual import Architecture, Training, trained_network
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from autocompress.workload import Split, Workload

SHAPE = Architecture(channels=1, classes=10, widths=(48, 96), blocks=2)
TRAINING = Training(epochs=16, batch_size=64, peak_learning_rate=0.1, augment="shift", threads=1)
TRAIN, CALIBRATION, SEARCH, TEST = 897, 200, 350, 350
MEAN, DEVIATION = 0.305, 0.376


def splits() -> tuple[Split, Split, Split, Split]:
    """Train, calibration, search and test: disjoint, stratified, always the same samples."""
    images, targets = load_digits(return_X_y=True)
    rest = torch.arange(len(images)).numpy()
    parts = []
    for size in (TRAIN, CALIBRATION, SEARCH):
        part, rest = train_test_split(rest, train_size=size, stratify=targets[rest], random_state=0)
        parts.append(part)
    inputs = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    whole = Split(((inputs - MEAN) / DEVIATION,), torch.tensor(targets, dtype=torch.int64))
    train, calibration, search, test = (whole.subset(torch.tensor(p)) for p in (*parts, rest))
    return train, calibration, search, test


def workload() -> Workload:
    """The workload; trains the network on first use (see `residual.trained_network`)."""
    train, calibration, search, test = splits()
    return Workload(
        network=trained_network("digits", SHAPE, train, TRAINING),
        example_inputs=search.subset(1).inputs,
        calibration=calibration,
        train=train,
        search_split=search,
        test_split=test,
        metric="accuracy",
    )
