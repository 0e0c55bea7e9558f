"""Pretrained networks by name: `transformers:NAME` and `timm:NAME`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from autocompress.errors import WorkloadError
from autocompress.workload.network import Positional

Task: TypeAlias = Literal[
    "features",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "causal-lm",
    "image-classification",
    "semantic-segmentation",
    "object-detection",
    "audio-classification",
]
_CLASSES: dict[str, str] = {
    "features": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "audio-classification": "AutoModelForAudioClassification",
}
_LIBRARIES = ("transformers", "timm")


def load_network(name: str, task: Task = "features") -> nn.Module:
    """A pretrained network by name, downloaded or from a folder.

    Args:
        name: `transformers:NAME_OR_FOLDER` or `timm:NAME`, as these libraries name them.
        task: which head a transformers network has; those of timm classify images.

    Returns:
        The network in fp32 and evaluation mode; its inputs are tensors, by position or, in a
        workload whose example inputs are a mapping, by name; it gives a tensor or a flat tuple.

    Raises:
        WorkloadError: the name is malformed, its library is not installed, or it does not load.
    """
    library, separator, rest = name.partition(":")
    if not separator or not rest or library not in _LIBRARIES:
        raise WorkloadError(
            "A pretrained network's name is malformed.",
            given=name,
            allowed="transformers:NAME_OR_FOLDER or timm:NAME",
        )
    if task not in get_args(Task):
        raise WorkloadError(
            "The task of a pretrained network is unknown.",
            given=task,
            allowed=", ".join(get_args(Task)),
        )
    module = _imported(library)
    try:
        network = _loaded(module, library, rest, task)
    except Exception as cause:
        # The libraries raise whatever their files, hubs and configurations meet.
        reason = (str(cause).strip().splitlines() or [""])[0]
        raise WorkloadError(
            f"The pretrained network does not load: {type(cause).__name__}: {reason}",
            given=f"{name}, task {task}",
            allowed="a name on the hub that can be reached, or a folder with its files",
            advice="check the name and the connection, or give a folder: transformers:./folder",
        ) from cause
    return Positional(network.float().eval(), ())


def _imported(library: str) -> ModuleType:
    try:
        return import_module(library)
    except (ImportError, RuntimeError) as cause:
        # timm's own imports fail with a RuntimeError where versions do not match.
        raise WorkloadError(
            f"The library '{library}' cannot be imported: {cause}",
            advice=f"pip install 'autocompress[{library}]'",
        ) from cause


def _loaded(module: ModuleType, library: str, name: str, task: Task) -> nn.Module:
    network: nn.Module
    if library == "timm":
        network = module.create_model(name, pretrained=True)
        return network
    network = getattr(module, _CLASSES[task]).from_pretrained(name)
    config: Any = network.config
    if getattr(config, "use_cache", False):
        # A cache of keys and values is no output of a network that is called once.
        config.use_cache = False
    return network
